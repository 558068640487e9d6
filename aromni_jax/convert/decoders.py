"""Finds the decoder in a folder of released files, and says which tensor becomes what.

The layout is told by the names and by the rank of the q/k norms; the configuration is read from the
shapes, and must agree with the configuration file that lies beside the weights.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from aromni_jax.convert import sources
from aromni_jax.convert.layouts import LAYOUTS, Layout, get_layout, is_head_norm
from aromni_jax.convert.sources import Tensors
from aromni_jax.models.config import DecoderConfig
from aromni_jax.models.params import put
from aromni_jax.storage import Streamed

VQ_PREFIX = "model.vqmodel."
# Folders that AR-Omni's loader and the hubs have.
_FOLDERS = ("", "models/7b", "models/30b")
# In the files but not in the function: rotary frequencies, which are computed.
_SKIPPED = ("rope.freqs", "rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class ReleasedDecoder:
  """A decoder in released files.

  Attributes:
    layout: which one it has. config: its shape.
    tensors: by the names of the layout, all that the decoder needs.
    vq: the image codec's tensors among the files, without their prefix.
    skipped: name -> why a tensor is not converted.
    files: configuration files that were read.
  """

  layout: Layout
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
    layout: name of the one to take where the folder has two; found by itself otherwise.
    swin_norm: where no configuration file says it.

  Raises:
    FileNotFoundError: if there is no decoder, or a file of it is missing.
    ValueError: if files are damaged, of another model family, or contradict each other; if there
      are two decoders and no `layout`.
  """
  wanted = None if layout is None else get_layout(layout)
  file = _find_file(source, wanted)
  read = sources.read_sharded if file.suffix == ".json" else sources.read_file
  tensors = read(file)
  vq = {n.removeprefix(VQ_PREFIX): t for n, t in tensors.items() if n.startswith(VQ_PREFIX)}
  skipped = {n: "rotary frequencies are computed" for n in tensors if n.endswith(_SKIPPED)}
  tensors = {n: t for n, t in tensors.items() if not n.startswith(VQ_PREFIX) and n not in skipped}
  found = _layout_of(tensors, file)
  if wanted not in (None, found):
    raise ValueError(f"{file} has layout {found.name}, not {wanted.name} as --layout says")
  declared, files = _declared(file.parent, found)
  tensors = _split_fused(tensors, declared)
  config = _make_config(tensors, found, declared, swin_norm, file)
  _check_cover(tensors, found, config, file)
  if found.per_head and not _heads_agree(tensors, found, config):
    config = dataclasses.replace(config, per_head_norm=True)
  return ReleasedDecoder(found, config, tensors, vq, skipped, files)


def leaves(decoder: ReleasedDecoder) -> tuple[dict, dict[str, str]]:
  """Returns the parameters as nested dicts of `Streamed`, and source name -> our name."""
  params: dict = {}
  mapping: dict[str, str] = {}
  for path, names in decoder.layout.names(decoder.config.num_layers).items():
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
  tensor = np.broadcast_to(np.zeros((), np.int8), layout.shape(path, config))
  return layout.from_released(tensor, path, config).shape


def _piece(
  decoder: ReleasedDecoder, name: str, path: str, stacked: bool
) -> Callable[[], np.ndarray]:
  def make() -> np.ndarray:
    out = decoder.layout.from_released(decoder.tensors[name].read(), path, decoder.config)
    return out[None] if stacked else out

  return make


def _find_file(source: pathlib.Path, layout: Layout | None) -> pathlib.Path:
  if not source.is_dir():
    raise FileNotFoundError(f"--source {source} is not a folder; expected released model files")
  layouts = [layout] if layout else list(LAYOUTS.values())
  families = dict.fromkeys(each.files for each in layouts)  # some layouts share their file names
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
      f"{source} has no decoder; expected one of {', '.join(sum(families, ()))}, there or in "
      "models/7b"
    )
  if len(found) > 1:
    choices = ", ".join(f"{each.name} ({each.about})" for each in layouts)
    raise ValueError(
      f"{source} has more than one decoder: {', '.join(str(f) for f in found)}. Name a folder with "
      f"one, or say which with --layout={choices}"
    )
  return found[0]


def _layout_of(tensors: Tensors, file: pathlib.Path) -> Layout:
  named = [layout for layout in LAYOUTS.values() if layout.is_of(tensors)]
  if len({layout.tensors["embedding"] for layout in named}) > 1:
    names = ", ".join(layout.name for layout in named)
    raise ValueError(f"{file} mixes the names of the layouts {names}; expected those of one")
  for layout in named:
    norm = tensors.get(layout.names(1)["layers.attention.q_norm.scale"][0])
    if norm is not None and len(norm.shape) == 1 + layout.per_head:
      return layout
  some = ", ".join(sorted(tensors)[:3])
  raise ValueError(
    f"{file} is not a Chameleon decoder: it has no q/k norms (its tensors: {some} ...). Expected "
    "AR-Omni, Anole or Chameleon weights"
  )


def _declared(
  folder: pathlib.Path, layout: Layout
) -> tuple[dict[str, Any], tuple[pathlib.Path, ...]]:
  """Fields of `DecoderConfig` (and `swin_norm`) that configuration files state."""
  files = tuple(folder / name for name in layout.configs if (folder / name).is_file())
  out: dict[str, Any] = {}
  for file in files:
    data = layout.read_config(sources.read_json(file), file)
    rope = (data.get("rope_parameters") or {}) | (data.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      raise ValueError(f"{file}: rotary positions are {kind}; expected the default ones")
    if (activation := data.get("hidden_act", "silu")) != "silu":
      raise ValueError(f"{file}: hidden_act is {activation}; expected silu")
    theta = rope.get("rope_theta")
    data = data | ({"rope_theta": theta} if theta is not None else {})
    stated = {field: data.get(name) for field, name in layout.fields.items()}
    stated["swin_norm"] = data.get("swin_norm")
    for field, value in stated.items():
      if value is not None and out.setdefault(field, value) != value:
        raise ValueError(f"{file}: {field} is {value}, but {out[field]} in {files[0].name}")
    if data.get("qk_normalization") is False or data.get("qk_layernorm") is False:
      raise ValueError(f"{file} says that there are no q/k norms, but the weights have them")
  return out, files


def _make_config(
  tensors: Tensors, layout: Layout, declared: dict, swin_norm: bool | None, file: pathlib.Path
) -> DecoderConfig:
  """The configuration that shapes and configuration files agree on."""
  names = layout.names(1)

  def shape(path: str) -> tuple[int, ...]:
    name = names[path][0]
    if name not in tensors:
      raise ValueError(f"{file} lacks {name}; the checkpoint is not whole")
    return tensors[name].shape

  head_dim = shape("layers.attention.q_norm.scale")[-1]
  layers = re.escape(layout.tensors["layers.attention.q_norm.scale"].partition("{}")[0])
  numbers = [int(m[1]) for n in tensors if (m := re.match(layers + r"(\d+)\.", n))]
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


def _check_cover(
  tensors: Tensors, layout: Layout, config: DecoderConfig, file: pathlib.Path
) -> None:
  """Every tensor has a place and every place a tensor, of the right shape."""
  table = layout.names(config.num_layers)
  wanted = {name: layout.shape(path, config) for path, names in table.items() for name in names}
  missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
  if missing or extra:
    raise ValueError(
      f"{file} is not a whole Chameleon decoder of layout {layout.name}: missing {missing[:4]} "
      f"({len(missing)}), without a place {extra[:4]} ({len(extra)})"
    )
  for name, shape in wanted.items():
    if tensors[name].shape != shape:
      raise ValueError(
        f"{tensors[name].file}: {name} has shape {tensors[name].shape}; expected {shape}"
      )


def _heads_agree(tensors: Tensors, layout: Layout, config: DecoderConfig) -> bool:
  """Whether norms that stand once per head are the same for all, as they were when converted."""
  for path, names in layout.names(config.num_layers).items():
    if is_head_norm(path):
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
