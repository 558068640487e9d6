"""What the ids of a released tokenizer JSON mean, checked name by name.

Everything that no public file documents is asserted here: a file that differs is refused with what
was expected and what was found.
"""

import dataclasses
import os
import re

from aromni_jax.codecs.text import load_tokenizer
from aromni_jax.vocabulary import Vocabulary, get_vocabulary

_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")
_IMAGE = re.compile(r"IMGIMG([A-J]+)Z")
_RESERVED = re.compile(r"<reserved(\d{5})>")
_SENTINEL = re.compile(r"<sentinel:(\d+)>")
_SENTINEL_START, _RESERVED_OFFSET = 8198, 4
# The Hugging Face converter gives this reserved id a name.
_IMAGE_PLACEHOLDER = ("<image>", 8711)


def read_vocabulary(file: str | os.PathLike) -> Vocabulary:
  """Returns the `aromni_7b` vocabulary with the text range that a tokenizer JSON has.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a name has another id than the released layout, naming both.
  """
  path = os.fspath(file)
  vocabulary = get_vocabulary("aromni_7b")
  ids = load_tokenizer(path).get_vocab()
  if len(ids) != vocabulary.size or set(ids.values()) != set(range(vocabulary.size)):
    raise ValueError(
      f"tokenizer {path} has {len(ids)} ids; expected {vocabulary.size}, 0 to "
      f"{vocabulary.size - 1}. It is not the tokenizer of AR-Omni, Anole or Chameleon"
    )
  named = {"<s>": 0, "<pad>": 1, "</s>": 2, "<eoss>": vocabulary.eoi}
  named |= {"<racm3:break>": vocabulary.boi}
  for name, wanted in named.items():
    _check(path, name, ids.get(name), wanted)
  codes = {int(m[1].translate(_LETTERS)): i for n, i in ids.items() if (m := _IMAGE.fullmatch(n))}
  for code in range(len(vocabulary.image)):
    _check(path, f"the image code {code}", codes.get(code), vocabulary.image.start + code)
  if len(codes) != len(vocabulary.image):
    raise ValueError(
      f"tokenizer {path} has {len(codes)} names of image codes; expected {len(vocabulary.image)}"
    )
  words = [n for n, i in ids.items() if vocabulary.boi <= i <= vocabulary.response]
  words = [n for n in words if not n.startswith("<")]
  if words:
    raise ValueError(
      f"tokenizer {path}: {words[0]!r} has id {ids[words[0]]}, but ids {vocabulary.boi} to "
      f"{vocabulary.response} are for speech and turns; expected reserved names there"
    )
  structural = [*named.values(), *codes.values()]
  for name, i in ids.items():
    if match := _RESERVED.fullmatch(name):
      _check(path, name, i, int(match[1]) + _RESERVED_OFFSET)
      structural.append(i)
    elif match := _SENTINEL.fullmatch(name):
      _check(path, name, i, int(match[1]) + _SENTINEL_START)
      structural.append(i)
    elif name == _IMAGE_PLACEHOLDER[0]:
      _check(path, *_IMAGE_PLACEHOLDER[:1], i, _IMAGE_PLACEHOLDER[1])
      structural.append(i)
  start = max(vocabulary.response, *structural) + 1
  return dataclasses.replace(vocabulary, text=range(start, vocabulary.size))


def _check(path: str, what: str, found: int | None, wanted: int) -> None:
  if found != wanted:
    raise ValueError(
      f"tokenizer {path}: {what} is {'missing' if found is None else f'id {found}'}; expected id "
      f"{wanted}, as in the released vocabulary"
    )
