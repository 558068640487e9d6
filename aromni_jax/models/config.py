"""Shape of the decoder and how it is computed."""

import dataclasses

import jax.numpy as jnp

from aromni_jax.models.attention import BACKENDS
from aromni_jax.models.remat import REMAT

_CHOICES = {
  "norm_placement": ("pre", "swin"),
  "remat_policy": tuple(REMAT),
  "attention": ("auto", *BACKENDS),
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The Chameleon decoder (arXiv 2405.09818). The defaults are the 7B model.

  Attributes:
    vocab_size: rows of the embedding and columns of the head.
    embed_dim, mlp_dim: width of the residual stream and of the MLP.
    num_layers, num_heads, num_kv_heads, head_dim: attention; query heads share the key heads.
    rope_theta: base of the rotary angles.
    norm_eps: epsilon of the RMS norms; the q/k norms have 1e-5, as the released model.
    per_head_norm: whether each head has its own q/k norm, as mainline Hugging Face checkpoints can
      have, or all heads share one, as the released model does.
    norm_placement: "pre", or "swin": norms act on the branches' outputs (AR-Omni section 3).
    dtype, param_dtype: of computation and of parameters.
    remat_policy: what the backward pass computes again of a layer: "full" everything, "mlp" the
      MLP but its last product, "up" one product of it, "norms" all but products, "none" nothing;
      see `models/remat.py`. docs/scale.md has the memory and time of each.
    scan_layers: one compiled layer in a loop, or `num_layers` copies of it.
    init_std: standard deviation of the initial weights.
    attention: "auto" or the name of a backend, see `models/attention.py`.
    max_segments: no row of a batch has more samples than this, padding counted as one; 0 if that is
      not known. With it, packed rows are faster on GPUs.
  """

  vocab_size: int = 65536
  embed_dim: int = 4096
  mlp_dim: int = 11008
  num_layers: int = 32
  num_heads: int = 32
  num_kv_heads: int = 32
  head_dim: int = 128
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  per_head_norm: bool = False
  norm_placement: str = "pre"
  dtype: str = "bfloat16"
  param_dtype: str = "float32"
  remat_policy: str = "full"
  scan_layers: bool = True
  init_std: float = 0.02
  attention: str = "auto"
  max_segments: int = 0

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      if getattr(self, field) not in choices:
        raise ValueError(f"model.{field} {getattr(self, field)!r}; expected one of {choices}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"model.num_heads {self.num_heads} is not a multiple of "
        f"model.num_kv_heads {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"model.head_dim {self.head_dim} is odd; rotary embeddings need pairs")

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  def num_params(self) -> int:
    """Parameters of the decoder with embedding and head."""
    attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
    norms = self.num_heads + self.num_kv_heads if self.per_head_norm else 2
    layer = attention + 3 * self.embed_dim * self.mlp_dim
    layer += 2 * self.embed_dim + 2 * norms * self.head_dim
    return self.num_layers * layer + 2 * self.vocab_size * self.embed_dim + self.embed_dim

  def flops_per_token(self, length: int) -> float:
    """Floating-point operations of a training step per token: 6 per weight in a product, plus
    attention over half of `length` positions (causal)."""
    products = self.num_params() - self.vocab_size * self.embed_dim
    return 6.0 * products + 6.0 * self.num_layers * self.num_heads * self.head_dim * length
