"""The peer: Chameleon of PyPI `transformers` in eager PyTorch, with our models' shapes."""

import torch
import transformers

from aromni_jax.models.config import DecoderConfig


def make_chameleon(config: DecoderConfig) -> transformers.ChameleonForConditionalGeneration:
  """Returns a Chameleon of random weights; its picture codec, which is not used, is tiny."""
  torch.manual_seed(0)
  return transformers.ChameleonForConditionalGeneration(
    transformers.ChameleonConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.embed_dim,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      swin_norm=config.norm_placement == "swin",
      max_position_embeddings=4096,
      pad_token_id=1,
      eos_token_id=2,
      vocabulary_map={"<image>": 4, "IMGIMGAZ": 5},
      vq_config={
        "base_channels": 32,
        "channel_multiplier": [1],
        "embed_dim": 32,
        "latent_channels": 32,
        "num_embeddings": 2,
        "num_res_blocks": 1,
        "resolution": 32,
      },
    )
  )


def versions() -> dict[str, str]:
  """Returns the versions that a result depends on."""
  import jax

  return {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "jax": jax.__version__,
  }
