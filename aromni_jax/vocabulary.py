"""The id space that text, pictures and speech share.

One frozen `Vocabulary` names every id range and every special id. Two presets exist: `aromni_7b`
(65,536 ids, the layout of the released AR-Omni model) and `demo` (the small shipped model, the same
ranges in the same order). All functions take NumPy and JAX arrays alike and return the same kind.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax import saved

Array = np.ndarray | jax.Array

VERSION = 1  # of what `Vocabulary.to_dict` gives

TEXT, IMAGE, SPEECH, SPECIAL = range(4)
MODALITIES = ("text", "image", "speech", "special")

SPECIAL_NAMES = (
  "bos",
  "pad",
  "eos",
  "boi",
  "eoi",
  "boa",
  "eoa",
  "eoh",
  "eom",
  "instruction",
  "response",
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Ranges and special ids of one vocabulary.

  Attributes:
    name: preset name, or any name for a vocabulary of one's own.
    size: number of ids, which is also the width of the model's embedding and head.
    text, image, speech: half-open id ranges; code c of a codec is id `range.start + c`.
    bos, pad, eos: sequence begin, left padding in generation, sequence end.
    boi, eoi: begin and end of a picture. boa, eoa: begin and end of speech ("audio").
    eoh, eom: end of the human's and of the machine's turn.
    instruction, response: open the transcript and the reply of a spoken dialogue turn.
    image_length: codes of one picture (exactly that many stand between boi and eoi).
    speech_rate: speech codes per second.

  Raises:
    ValueError: if two ranges or special ids overlap or leave `[0, size)`.
  """

  name: str
  size: int
  text: range
  image: range
  speech: range
  bos: int
  pad: int
  eos: int
  boi: int
  eoi: int
  boa: int
  eoa: int
  eoh: int
  eom: int
  instruction: int
  response: int
  image_length: int
  speech_rate: int

  def __post_init__(self):
    owner: dict[int, str] = {}
    parts = [(n, getattr(self, n)) for n in ("text", "image", "speech")]
    parts += [(n, range(getattr(self, n), getattr(self, n) + 1)) for n in SPECIAL_NAMES]
    for part, ids in parts:
      if not isinstance(ids, range) or ids.step != 1 or not len(ids):
        raise ValueError(f"vocabulary {self.name}: {part} must be a non-empty range, got {ids!r}")
      if ids.start < 0 or ids.stop > self.size:
        raise ValueError(
          f"vocabulary {self.name}: {part} {ids} leaves the id space 0..{self.size - 1}"
        )
      for i in ids:
        if i in owner:
          raise ValueError(f"vocabulary {self.name}: id {i} is both {owner[i]} and {part}")
        owner[i] = part

  @property
  def special_ids(self) -> dict[str, int]:
    """Name -> id of every named special id."""
    return {n: getattr(self, n) for n in SPECIAL_NAMES}

  def modality_of(self, ids: Array) -> Array:
    """Modality of each id: TEXT, IMAGE, SPEECH or SPECIAL (which includes unused ids).

    Args:
      ids: integer array of any shape.

    Returns:
      int8 array of the same shape.
    """
    xp = jnp if isinstance(ids, jax.Array) else np
    ids = xp.asarray(ids)
    out = xp.full(ids.shape, SPECIAL, xp.int8)
    for modality, r in ((TEXT, self.text), (IMAGE, self.image), (SPEECH, self.speech)):
      out = xp.where((ids >= r.start) & (ids < r.stop), xp.int8(modality), out)
    return out

  def image_ids(self, codes: Array) -> Array:
    """Image codes `0 <= c < len(image)` -> ids, any shape."""
    return self._to_ids("image", codes)

  def image_codes(self, ids: Array) -> Array:
    """Image ids -> codes, any shape."""
    return self._to_codes("image", ids)

  def speech_ids(self, codes: Array) -> Array:
    """Speech codes `0 <= c < len(speech)` -> ids, any shape."""
    return self._to_ids("speech", codes)

  def speech_codes(self, ids: Array) -> Array:
    """Speech ids -> codes, any shape."""
    return self._to_codes("speech", ids)

  def _to_ids(self, modality: str, codes: Array) -> Array:
    r = getattr(self, modality)
    self._check(modality, "code", codes, range(len(r)))
    return codes + r.start

  def _to_codes(self, modality: str, ids: Array) -> Array:
    r = getattr(self, modality)
    self._check(modality, "id", ids, r)
    return ids - r.start

  def _check(self, modality: str, kind: str, values: Array, legal: range):
    """Raises ValueError for concrete values outside `legal`; traced values are not checked."""
    if isinstance(values, jax.core.Tracer):
      return
    values = np.asarray(values)
    bad = values[(values < legal.start) | (values >= legal.stop)]
    if bad.size:
      raise ValueError(
        f"vocabulary {self.name}: {int(bad.flat[0])} is not a {modality} {kind}; "
        f"expected {legal.start}..{legal.stop - 1}"
      )

  def to_dict(self) -> dict[str, Any]:
    """A JSON-ready dict with the version of its form; ranges become [start, stop]."""
    out: dict[str, Any] = {"version": VERSION}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      out[field.name] = [value.start, value.stop] if isinstance(value, range) else value
    return out

  @classmethod
  def from_dict(cls, data: dict[str, Any]) -> "Vocabulary":
    """Inverse of `to_dict`; a dict without a version is of version 1.

    Raises:
      ValueError: for a newer version, naming unknown and missing keys, and for wrong values.
    """
    with saved.naming("vocabulary"):
      saved.check_version(data, VERSION)
      fields = {f.name: f.type for f in dataclasses.fields(cls)}
      unknown, missing = set(data) - {"version"} - set(fields), set(fields) - set(data)
      if unknown or missing:
        raise ValueError(f"unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
      values = {n: saved.get(data, n, list if t is range else t) for n, t in fields.items()}
      for name in (n for n, kind in fields.items() if kind is range):
        ends = values[name]
        if len(ends) != 2 or not all(isinstance(i, int) for i in ends):
          raise ValueError(f"{name} is {ends}; expected [first id, the id after the last]")
        values[name] = range(*ends)
    return cls(**values)

  def fingerprint(self) -> str:
    """16 hex digits over every id: equal exactly if every id means the same."""
    data = {k: v for k, v in self.to_dict().items() if k not in ("name", "version")}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _preset_aromni_7b() -> Vocabulary:
  """The released 65,536-id layout. The start of the text range is checked against a real
  tokenizer file when one is loaded, since no public file documents it."""
  return Vocabulary(
    name="aromni_7b",
    size=65536,
    text=range(16388, 65536),
    image=range(4, 8196),
    speech=range(8724, 12820),
    bos=0,
    pad=1,
    eos=2,
    boi=8197,
    eoi=8196,
    boa=12821,
    eoa=12820,
    eoh=12830,
    eom=12831,
    instruction=12840,
    response=12841,
    image_length=1024,
    speech_rate=40,
  )


# Pieces of the shipped SentencePiece model; `codecs/text.py` checks the file against the range.
_DEMO_TEXT_PIECES = 768


def _preset_demo() -> Vocabulary:
  """The shipped model's layout: the order of the 7B one, with small codebooks."""
  image, speech = range(4, 1028), range(1030, 2054)
  return Vocabulary(
    name="demo",
    size=2944,  # 2060 + 768 rounded up to a multiple of 128, so that a mesh divides it
    text=range(2060, 2060 + _DEMO_TEXT_PIECES),
    image=image,
    speech=speech,
    bos=0,
    pad=1,
    eos=2,
    boi=1029,
    eoi=1028,
    boa=2055,
    eoa=2054,
    eoh=2056,
    eom=2057,
    instruction=2058,
    response=2059,
    image_length=64,
    speech_rate=40,
  )


PRESETS = {"aromni_7b": _preset_aromni_7b, "demo": _preset_demo}


def get_vocabulary(name: str) -> Vocabulary:
  """Returns a preset. Raises ValueError for an unknown name."""
  if name not in PRESETS:
    raise ValueError(f"vocabulary {name!r} does not exist; expected one of {sorted(PRESETS)}")
  return PRESETS[name]()
