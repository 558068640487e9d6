"""Finds the decoder in a folder of released files, and says which tensor becomes what.

The layout is told by the files and by the rank of the q/k norms; the configuration is read from the
shapes, and must agree with the configuration file that lies beside the weights.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from aromni_jax.convert import decoder_names, sources
from aromni_jax.convert.sources import Tensors
from aromni_jax.models.config import DecoderConfig
from aromni_jax.models.params import put
from aromni_jax.storage import Streamed

VQ_PREFIX = "model.vqmodel."
# Folders that AR-Omni's loader and the hubs have.
_FOLDERS = ("", "models/7b", "models/30b")
_HF_FILES = (
  "model.safetensors.index.json",
  "model.safetensors",
  "pytorch_model.bin.index.json",
  "pytorch_model.bin",
)
_NATIVE_FILES = ("consolidated.safetensors", "consolidated.pth")
# In the files but not in the function: rotary frequencies, which are computed.
_SKIPPED = ("rope.freqs", "rotary_emb.inv_freq")
# DecoderConfig field -> names in `params.json` and in `config.json`.
_DECLARED = {
  "vocab_size": ("vocab_size", "vocab_size"),
  "embed_dim": ("dim", "hidden_size"),
  "mlp_dim": ("ffn_dim", "intermediate_size"),
  "num_layers": ("n_layers", "num_hidden_layers"),
  "num_heads": ("n_heads", "num_attention_heads"),
  "num_kv_heads": ("n_kv_heads", "num_key_value_heads"),
  "norm_eps": ("norm_eps", "rms_norm_eps"),
  "rope_theta": ("rope_theta", "rope_theta"),
}


@dataclasses.dataclass(frozen=True)
class ReleasedDecoder:
  """A decoder in released files.

  Attributes:
    layout: "A", "B" or "C". config: its shape.
    tensors: by the names of the layout, all that the decoder needs.
    vq: the image codec's tensors among the files, without their prefix.
    skipped: name -> why a tensor is not converted.
    files: configuration files that were read.
  """

  layout: str
  config: DecoderConfig
  tensors: Tensors
  vq: Tensors
  skipped: dict[str, str]
  files: tuple[pathlib.Path, ...]


def find_decoder(
  source: pathlib.Path, layout: str | None = None, swin_norm: bool | None = None
) -> ReleasedDecoder:
  """Returns the decoder of a folder.

  Args:
    source: folder of released files.
    layout: which one to take where the folder has two; found by itself otherwise.
    swin_norm: where no configuration file says it.

  Raises:
    FileNotFoundError: if there is no decoder, or a file of it is missing.
    ValueError: if files are damaged, of another model family, or contradict each other; if there
      are two decoders and no `layout`.
  """
  file = _find_file(source, layout)
  read = sources.read_sharded if file.suffix == ".json" else sources.read_file
  tensors = read(file)
  vq = {n.removeprefix(VQ_PREFIX): t for n, t in tensors.items() if n.startswith(VQ_PREFIX)}
  skipped = {n: "rotary frequencies are computed" for n in tensors if n.endswith(_SKIPPED)}
  tensors = {n: t for n, t in tensors.items() if not n.startswith(VQ_PREFIX) and n not in skipped}
  found = _layout_of(tensors, file)
  if layout and found != layout:
    raise ValueError(f"{file} has layout {found}, not {layout} as --layout says")
  declared, files = _declared(file.parent, found)
  tensors = _split_fused(tensors, declared)
  config = _make_config(tensors, found, declared, swin_norm, file)
  _check_cover(tensors, found, config, file)
  if found == "C" and not _heads_agree(tensors, config):
    config = dataclasses.replace(config, per_head_norm=True)
  return ReleasedDecoder(found, config, tensors, vq, skipped, files)


def leaves(decoder: ReleasedDecoder) -> tuple[dict, dict[str, str]]:
  """Returns the parameters as nested dicts of `Streamed`, and source name -> our name."""
  params: dict = {}
  mapping: dict[str, str] = {}
  for path, names in decoder_names.names(decoder.layout, decoder.config.num_layers).items():
    first = decoder.tensors[names[0]]
    others = [n for n in names if decoder.tensors[n].dtype != first.dtype]
    if others:
      raise ValueError(
        f"{others[0]} is {decoder.tensors[others[0]].dtype}, {names[0]} is {first.dtype}; "
        "expected one dtype in all layers"
      )
    stacked = path.startswith("layers.")
    pieces = tuple(_piece(decoder, name, path, stacked) for name in names)
    shape = _our_shape(path, decoder)
    shape = (len(names), *shape) if stacked else shape
    put(params, path.split("."), Streamed(shape, first.dtype, pieces))
    for i, name in enumerate(names):
      mapping[name] = f"{path}[{i}]" if stacked else path
  return params, mapping


def _our_shape(path: str, decoder: ReleasedDecoder) -> tuple[int, ...]:
  layout, config = decoder.layout, decoder.config
  tensor = np.broadcast_to(np.zeros((), np.int8), decoder_names.shape(path, layout, config))
  return decoder_names.from_released(tensor, path, layout, config).shape


def _piece(
  decoder: ReleasedDecoder, name: str, path: str, stacked: bool
) -> Callable[[], np.ndarray]:
  def make() -> np.ndarray:
    out = decoder_names.from_released(
      decoder.tensors[name].read(), path, decoder.layout, decoder.config
    )
    return out[None] if stacked else out

  return make


def _find_file(source: pathlib.Path, layout: str | None) -> pathlib.Path:
  if not source.is_dir():
    raise FileNotFoundError(f"--source {source} is not a folder; expected released model files")
  names = {"A": _NATIVE_FILES, "B": _HF_FILES, "C": _HF_FILES}
  names = names[layout] if layout else _HF_FILES + _NATIVE_FILES
  # Of one family in one folder the first counts, safetensors before pickles.
  families = [family for family in (_HF_FILES, _NATIVE_FILES) if family[0] in names]
  places = [[source / folder / name for name in f] for folder in _FOLDERS for f in families]
  firsts = [next(filter(pathlib.Path.is_file, files), None) for files in places]
  found = [file for file in firsts if file is not None]
  parts = [p for folder in _FOLDERS for p in (source / folder).glob("consolidated.0*.pth")]
  if not found and parts:
    raise ValueError(
      f"{parts[0].parent} has a decoder in {len(parts)} model-parallel parts (Chameleon-30B); "
      "expected one file. Convert the Hugging Face version of it"
    )
  if not found:
    raise FileNotFoundError(
      f"{source} has no decoder; expected one of {', '.join(names)}, there or in models/7b"
    )
  if len(found) > 1:
    raise ValueError(
      f"{source} has more than one decoder: {', '.join(str(f) for f in found)}. Say which one with "
      "--layout=A (consolidated) or --layout=B or C (Hugging Face), or name a folder with one"
    )
  return found[0]


def _layout_of(tensors: Tensors, file: pathlib.Path) -> str:
  native = any(n.startswith("tok_embeddings.") for n in tensors)
  hugging_face = any(n.startswith("model.embed_tokens.") for n in tensors)
  if native and hugging_face:
    raise ValueError(f"{file} mixes native and Hugging Face names; expected one layout")
  norm = "layers.0.attention.q_normalization.weight" if native else ""
  norm = "model.layers.0.self_attn.q_norm.weight" if hugging_face else norm
  if norm not in tensors:
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(
      f"{file} is not a Chameleon decoder: it has no q/k norms (its tensors: {some} ...). Expected "
      "AR-Omni, Anole or Chameleon weights"
    )
  if native:
    return "A"
  return "C" if len(tensors[norm].shape) == 2 else "B"


def _declared(folder: pathlib.Path, layout: str) -> tuple[dict[str, Any], tuple[pathlib.Path, ...]]:
  """Fields of `DecoderConfig` (and `swin_norm`) that configuration files state."""
  column = int(layout != "A")
  names = ("config.json",) if column else ("params.json", "consolidate_params.json")
  files = tuple(folder / name for name in names if (folder / name).is_file())
  out: dict[str, Any] = {}
  for file in files:
    data = sources.read_json(file)
    family = data.get("model_type", "chameleon")
    if column and family != "chameleon":
      raise ValueError(f"{file}: model_type is {family}; expected chameleon")
    if not column and isinstance(data.get("model"), dict):
      data = data | data["model"]
    rope = (data.get("rope_parameters") or {}) | (data.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      raise ValueError(f"{file}: rotary positions are {kind}; expected the default ones")
    if (activation := data.get("hidden_act", "silu")) != "silu":
      raise ValueError(f"{file}: hidden_act is {activation}; expected silu")
    theta = rope.get("rope_theta")
    data = data | ({"rope_theta": theta} if theta is not None else {})
    stated = {f: data.get(pair[column]) for f, pair in _DECLARED.items()}
    stated["swin_norm"] = data.get("swin_norm")
    for field, value in stated.items():
      if value is None or (layout == "A" and value == -1):  # -1: as the shapes say
        continue
      if out.setdefault(field, value) != value:
        raise ValueError(f"{file}: {field} is {value}, but {out[field]} in {files[0].name}")
    if data.get("qk_normalization") is False or data.get("qk_layernorm") is False:
      raise ValueError(f"{file} says that there are no q/k norms, but the weights have them")
  return out, files


def _make_config(
  tensors: Tensors, layout: str, declared: dict, swin_norm: bool | None, file: pathlib.Path
) -> DecoderConfig:
  """The configuration that shapes and configuration files agree on."""
  names = decoder_names.names(layout, 1)

  def shape(path: str) -> tuple[int, ...]:
    name = names[path][0]
    if name not in tensors:
      raise ValueError(f"{file} lacks {name}; the checkpoint is not whole")
    return tensors[name].shape

  head_dim = shape("layers.attention.q_norm.scale")[-1]
  numbers = [int(m[1]) for n in tensors if (m := re.match(r"(?:model\.)?layers\.(\d+)\.", n))]
  vocab_size, embed_dim = shape("embedding")
  found = {
    "vocab_size": vocab_size,
    "embed_dim": embed_dim,
    "mlp_dim": shape("layers.mlp.gate.kernel")[0],
    "num_layers": max(numbers) + 1,
    "num_heads": shape("layers.attention.q.kernel")[0] // head_dim,
    "num_kv_heads": shape("layers.attention.k.kernel")[0] // head_dim,
  }
  for field, value in found.items():
    if declared.get(field, value) != value:
      raise ValueError(
        f"{file}: its tensors have {field} {value}, the configuration beside it says "
        f"{declared[field]}"
      )
  swin = declared.get("swin_norm")
  if swin is not None and swin_norm is not None and bool(swin) != swin_norm:
    raise ValueError(
      f"--swin_norm is {swin_norm}, but the configuration beside {file} says {bool(swin)}; the "
      "tensors are the same for both, so one of them would compute another function"
    )
  if swin is None and swin_norm is None and not declared:
    raise ValueError(
      f"no configuration lies beside {file}, and the tensors do not show where the norms stand; "
      "say it with --swin_norm or --noswin_norm"
    )
  swin = swin_norm if swin is None else bool(swin)
  dtype = str(tensors[names["embedding"][0]].dtype)
  dtype = dtype if dtype == "bfloat16" else "float32"
  return DecoderConfig(
    **found,
    head_dim=head_dim,
    rope_theta=float(declared.get("rope_theta", 10_000.0)),
    norm_eps=float(declared.get("norm_eps", 1e-5)),
    norm_placement="swin" if swin else "pre",
    dtype=dtype,
    param_dtype=dtype,
  )


def _check_cover(tensors: Tensors, layout: str, config: DecoderConfig, file: pathlib.Path) -> None:
  """Every tensor has a place and every place a tensor, of the right shape."""
  table = decoder_names.names(layout, config.num_layers)
  wanted = {n: decoder_names.shape(path, layout, config) for path, ns in table.items() for n in ns}
  missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
  if missing or extra:
    raise ValueError(
      f"{file} is not a whole Chameleon decoder of layout {layout}: missing {missing[:4]} "
      f"({len(missing)}), without a place {extra[:4]} ({len(extra)})"
    )
  for name, shape in wanted.items():
    if tensors[name].shape != shape:
      raise ValueError(
        f"{tensors[name].file}: {name} has shape {tensors[name].shape}; expected {shape}"
      )


def _heads_agree(tensors: Tensors, config: DecoderConfig) -> bool:
  """Whether the norms of layout C are the same for all heads, as they were when converted."""
  for path, names in decoder_names.names("C", config.num_layers).items():
    if ".q_norm." in path or ".k_norm." in path:
      for name in names:
        norm = tensors[name].read()
        if (norm != norm[:1]).any():
          return False
  return True


def _split_fused(tensors: Tensors, declared: dict) -> Tensors:
  """Replaces the native loader's fused `wqkv` and `w13` by their parts."""
  out = dict(tensors)
  for name, tensor in tensors.items():
    if name.endswith("attention.wqkv.weight"):
      norm = name.replace("wqkv.weight", "q_normalization.weight")
      if norm not in tensors:
        raise ValueError(f"{tensor.file} has {name} without {norm}; the checkpoint is not whole")
      head_dim = tensors[norm].shape[0]
      rows, width = tensor.shape
      q = declared.get("num_heads", width // head_dim) * head_dim
      kv = (rows - q) // 2
      parts = {"wq": (0, q), "wk": (q, q + kv), "wv": (q + kv, rows)}
    elif name.endswith("feed_forward.w13.weight"):
      half = tensor.shape[0] // 2
      parts = {"w1": (0, half), "w3": (half, 2 * half)}
    else:
      continue
    del out[name]
    fused = name.split(".")[-2]
    for part, (start, stop) in parts.items():
      new = name.replace(fused, part)
      out[new] = dataclasses.replace(
        tensor,
        name=new,
        shape=(stop - start, *tensor.shape[1:]),
        read=lambda tensor=tensor, start=start, stop=stop: tensor.read()[start:stop],
      )
  return out
