"""Pre-training of the 7B model (arXiv 2601.17761, section 3).

aromni train --config=configs/pretrain_7b.py --workdir=DIR --config.base=models/anole \
  --config.data.shards=data/pretrain          the paper's recipe
aromni train --config=configs/pretrain_7b.py:released ...     the released code's
aromni train --config=configs/pretrain_7b.py:v5p:4x4x8 ...    for other chips than v5e:16x16,
  see configs/pods.py; :released,v5p:4x4x8 is both

It starts from the decoder of --config.base, a converted Anole or Chameleon with a speech codec
(aromni convert). The paper trains 140,000 steps of 480 samples of at most 1300 tokens: 87 billion
tokens, 3.7e21 floating-point operations. Here samples are packed into rows of 4096 tokens, as many
as the machine divides, and there are as many steps as make the same tokens. `aromni plan` tells how
long that takes.
"""

from aromni_jax.configs import base, pods
from ml_collections import ConfigDict

RECIPES = ("paper", "released")
_TOKENS = {"paper": 140_000 * 480 * 1300, "released": 150_000 * 256 * 1300}
_WARMUP = {"paper": 0.05, "released": 0.03}  # of the steps

# Text : pictures with text : speech with text = 0.5 : 1 : 2 (section 3); the paper does not say
# how a modality is shared by its tasks, nor in which unit: halves, of tokens.
_MIXTURE = {
  "text_to_text": 0.5,
  "image_caption": 0.5,
  "text_to_image": 0.5,
  "speech_to_text": 1.0,
  "text_to_speech": 1.0,
}


def get_config(argument: str = "") -> ConfigDict:
  recipe, topology = pods.split_argument(argument, RECIPES, "configs/pretrain_7b.py")
  c = base.get_config()
  c.init_from_base = True
  c.model.norm_placement = "swin"
  c.change_norm_placement = True  # Anole's norms stand before the branches; step 0 is not Anole
  c.eval_every = 5000
  c.checkpoint_every = 1000
  c.data.shards = "data/pretrain"
  c.data.long_samples = "drop"
  c.data.mixture = ConfigDict(_MIXTURE)
  c.loss.vocab_block = 8192  # 65,536 logits of all positions would not fit
  if recipe == "released":
    base.released(c)
    c.model.norm_placement = "pre"
    c.change_norm_placement = False  # the released code keeps what the checkpoint says
    c.optimizer.b2 = 0.999
    c.data.mixture = ConfigDict()  # every sample as it comes
  pods.pretraining(c, topology)
  c.num_steps = round(_TOKENS[recipe] / (c.batch_size * c.data.sequence_length))
  c.optimizer.warmup_steps = round(_WARMUP[recipe] * c.num_steps)
  return c
