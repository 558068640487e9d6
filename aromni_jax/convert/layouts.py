"""The layouts that Chameleon decoders are released in, one entry each, and ours in their words.

All hold the same function. They differ in the names of tensors and files, in the order of the q/k
rows of a head (interleaved pairs, or half-split as here), and in whether the q/k norms are shared
by the heads or stand once per head. Linear weights are (out, in) there, [in, out] here; layers are
apart there, stacked here.

A layout is added by an entry in `LAYOUTS`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aromni_jax.convert import writers
from aromni_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """How one family of files holds a decoder.

  Attributes:
    name: what command lines, certificates and messages call it.
    alias: its older name, which is read on.
    about: whose files they are, half a line.
    tensors: our path -> its name there; `{}` is the number of the layer.
    interleaved: whether the q/k rows of a head are interleaved pairs, not half-split.
    per_head: whether the q/k norms stand once per head; otherwise all heads share one.
    files: names of the weights to look for; of one folder the first that is there counts.
    configs: names of the configuration files that may lie beside the weights.
    fields: `DecoderConfig` field -> its name in the configuration files.
    read_config: the contents of a configuration file -> its fields, in one dict.
    write: writes weights and configuration files into a folder.
    vq_encoder: whether the image encoder is among the decoder's tensors.
    vqgan: whether `tokenizer/vqgan.ckpt` is written, the whole image codec.
    perception: whether `perception.ckpt` is written, the table of the perceptual loss.
    text_tokenizer: whether `tokenizer/text_tokenizer.json` is written.
    needs_torch: whether writing makes pickles, for which PyTorch is needed.
  """

  name: str
  alias: str
  about: str
  tensors: Mapping[str, str]
  interleaved: bool
  per_head: bool
  files: tuple[str, ...]
  configs: tuple[str, ...]
  fields: Mapping[str, str]
  read_config: Callable[[dict[str, Any], pathlib.Path], dict[str, Any]]
  write: Callable[[pathlib.Path, writers.Weights], None]
  vq_encoder: bool
  vqgan: bool
  perception: bool
  text_tokenizer: bool
  needs_torch: bool

  def names(self, num_layers: int) -> dict[str, list[str]]:
    """Returns our path -> the names of its tensors: one per layer, or the only one."""
    return {
      path: [name.format(i) for i in range(num_layers if "{}" in name else 1)]
      for path, name in self.tensors.items()
    }

  def is_of(self, names: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of this layout: their embedding stands where it has one."""
    embedding = self.tensors["embedding"].removesuffix("weight")
    return any(name.startswith(embedding) for name in names)

  def shape(self, path: str, config: DecoderConfig) -> tuple[int, ...]:
    """Returns the shape that each tensor of our path has there."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
      "embedding": (c.vocab_size, c.embed_dim),
      "head": (c.vocab_size, c.embed_dim),
      "q.kernel": (q, c.embed_dim),
      "k.kernel": (kv, c.embed_dim),
      "v.kernel": (kv, c.embed_dim),
      "out.kernel": (c.embed_dim, q),
      "gate.kernel": (c.mlp_dim, c.embed_dim),
      "up.kernel": (c.mlp_dim, c.embed_dim),
      "down.kernel": (c.embed_dim, c.mlp_dim),
    }
    for end, value in shapes.items():
      if path.endswith(end):
        return value
    if is_head_norm(path):
      heads = c.num_heads if ".q_norm." in path else c.num_kv_heads
      return (heads, c.head_dim) if self.per_head else (c.head_dim,)
    return (c.embed_dim,)

  def from_released(self, tensor: np.ndarray, path: str, config: DecoderConfig) -> np.ndarray:
    """Returns a tensor of this layout as our decoder has it, for one layer.

    A view wherever possible, in the tensor's dtype. Norms that stand once per head become the first
    head's, unless `config.per_head_norm`.
    """
    if is_head_norm(path):
      if self.per_head and not config.per_head_norm:
        tensor = tensor[0]
      return tensor[..., _half_split(config.head_dim)] if self.interleaved else tensor
    if tensor.ndim == 1 or path == "embedding":
      return tensor
    if self.interleaved and _has_pairs(path):
      tensor = _permute_rows(tensor, _half_split(config.head_dim))
    return tensor.T

  def to_released(self, tensor: np.ndarray, path: str, config: DecoderConfig) -> np.ndarray:
    """Inverse of `from_released`.

    Raises:
      ValueError: for norms that differ between heads, if this layout has one for all heads.
    """
    interleaved = np.argsort(_half_split(config.head_dim))
    if is_head_norm(path):
      self.check_heads(config, f"{path} differs")
      if self.per_head and not config.per_head_norm:
        tensor = np.tile(tensor, (self.shape(path, config)[0], 1))
      return tensor[..., interleaved] if self.interleaved else tensor
    if tensor.ndim == 1 or path == "embedding":
      return tensor
    tensor = tensor.T
    return _permute_rows(tensor, interleaved) if self.interleaved and _has_pairs(path) else tensor

  def check_heads(self, config: DecoderConfig, what: str) -> None:
    """Raises ValueError that begins with `what` if each head has a norm and all share one here."""
    if config.per_head_norm and not self.per_head:
      others = " or ".join(f"--format={x.name}" for x in LAYOUTS.values() if x.per_head)
      raise ValueError(
        f"{what} between heads, and layout {self.name} has one norm for all heads; "
        f"export with {others}"
      )


def get_layout(name: str) -> Layout:
  """Returns a layout by its name or its alias. Raises ValueError for an unknown one."""
  for layout in LAYOUTS.values():
    if name in (layout.name, layout.alias):
      return layout
  raise ValueError(f"layout {name!r} does not exist; expected one of {', '.join(LAYOUTS)}")


def is_head_norm(path: str) -> bool:
  """Whether our path is a norm of queries or keys."""
  return ".q_norm." in path or ".k_norm." in path


def _has_pairs(path: str) -> bool:
  """Whether the rows of a tensor are turned by the rotary positions."""
  return path.endswith(("attention.q.kernel", "attention.k.kernel"))


def _half_split(head_dim: int) -> np.ndarray:
  """Row numbers 0, 2, 4, ..., 1, 3, 5, ...: interleaved pairs -> half-split."""
  return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def _permute_rows(tensor: np.ndarray, order: np.ndarray) -> np.ndarray:
  heads = tensor.reshape(-1, len(order), tensor.shape[-1])
  return heads[:, order].reshape(tensor.shape)


def _in_layers(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
  return {f"layers.{path}": prefix + name for path, name in names.items()}


_NATIVE_NAMES = {
  "embedding": "tok_embeddings.weight",
  "norm.scale": "norm.weight",
  "head": "output.weight",
} | _in_layers(
  "layers.{}.",
  {
    "attention_norm.scale": "attention_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "attention.q.kernel": "attention.wq.weight",
    "attention.k.kernel": "attention.wk.weight",
    "attention.v.kernel": "attention.wv.weight",
    "attention.out.kernel": "attention.wo.weight",
    "attention.q_norm.scale": "attention.q_normalization.weight",
    "attention.q_norm.bias": "attention.q_normalization.bias",
    "attention.k_norm.scale": "attention.k_normalization.weight",
    "attention.k_norm.bias": "attention.k_normalization.bias",
    "mlp.gate.kernel": "feed_forward.w1.weight",
    "mlp.up.kernel": "feed_forward.w3.weight",
    "mlp.down.kernel": "feed_forward.w2.weight",
  },
)
_HF_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "norm.scale": "model.norm.weight",
  "head": "lm_head.weight",
} | _in_layers(
  "model.layers.{}.",
  {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attention.q.kernel": "self_attn.q_proj.weight",
    "attention.k.kernel": "self_attn.k_proj.weight",
    "attention.v.kernel": "self_attn.v_proj.weight",
    "attention.out.kernel": "self_attn.o_proj.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.q_norm.bias": "self_attn.q_norm.bias",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "attention.k_norm.bias": "self_attn.k_norm.bias",
    "mlp.gate.kernel": "mlp.gate_proj.weight",
    "mlp.up.kernel": "mlp.up_proj.weight",
    "mlp.down.kernel": "mlp.down_proj.weight",
  },
)
_HF_FILES = (
  "model.safetensors.index.json",
  "model.safetensors",
  "pytorch_model.bin.index.json",
  "pytorch_model.bin",
)
_HF_FIELDS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "mlp_dim": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "norm_eps": "rms_norm_eps",
  "rope_theta": "rope_theta",
}


def _read_native_config(data: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
  """`params.json`, whose fields may stand in a section; -1 means what the shapes say."""
  del file
  section = data.get("model")
  data = data | (section if isinstance(section, dict) else {})
  return {key: value for key, value in data.items() if value != -1}


def _read_hf_config(data: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
  family = data.get("model_type", "chameleon")
  if family != "chameleon":
    raise ValueError(f"{file}: model_type is {family}; expected chameleon")
  return data


_NATIVE = Layout(
  name="native",
  alias="A",
  about="Meta's consolidated.pth, which AR-Omni's inference reads",
  tensors=_NATIVE_NAMES,
  interleaved=True,
  per_head=False,
  files=("consolidated.safetensors", "consolidated.pth"),
  configs=("params.json", "consolidate_params.json"),
  fields={
    "vocab_size": "vocab_size",
    "embed_dim": "dim",
    "mlp_dim": "ffn_dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
  },
  read_config=_read_native_config,
  write=writers.write_native,
  vq_encoder=False,
  vqgan=True,
  perception=False,
  text_tokenizer=True,
  needs_torch=True,
)
_AR_OMNI = Layout(
  name="ar_omni",
  alias="B",
  about="the Hugging Face fork of AR-Omni and Anole, which AR-Omni's training saves",
  tensors=_HF_NAMES,
  interleaved=True,
  per_head=False,
  files=_HF_FILES,
  configs=("config.json",),
  fields=_HF_FIELDS,
  read_config=_read_hf_config,
  write=lambda folder, weights: writers.write_hugging_face(
    folder, weights, architecture="ChameleonForCausalLM"
  ),
  vq_encoder=True,
  vqgan=True,
  perception=True,
  text_tokenizer=False,
  needs_torch=True,
)
_HF = dataclasses.replace(
  _AR_OMNI,
  name="hf",
  alias="C",
  about="mainline Hugging Face Chameleon",
  interleaved=False,
  per_head=True,
  write=lambda folder, weights: writers.write_hugging_face(
    folder, weights, architecture="ChameleonForConditionalGeneration"
  ),
  vqgan=False,
  perception=False,
  needs_torch=False,
)

LAYOUTS = {layout.name: layout for layout in (_NATIVE, _AR_OMNI, _HF)}
