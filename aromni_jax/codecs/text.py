"""Text codecs: strings <-> ids of the vocabulary's text range.

Models that are trained here have a SentencePiece model, released ones the JSON of `tokenizers`.
"""

import hashlib
import os
from typing import Protocol

import numpy as np
import sentencepiece as spm
import tokenizers

from aromni_jax.vocabulary import Vocabulary


class TextCodec(Protocol):
  """What the rest of the project asks of a tokenizer."""

  def encode(self, text: str) -> np.ndarray:
    """Returns int32[n] vocabulary ids; an empty string gives none."""

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of vocabulary ids; ids that are not text are left out."""

  def fingerprint(self) -> str:
    """16 hex digits: equal exactly if every string is encoded alike."""


class SentencePieceText:
  """A SentencePiece model with byte fallback; piece p is id `vocabulary.text.start + p`.

  Args:
    model_file: the `.model` file.
    vocabulary: its text range must have exactly as many ids as the model has pieces.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if it is not a SentencePiece model, has another number of pieces, or has no byte
      fallback, so that some texts could not be written.
  """

  def __init__(self, model_file: str | os.PathLike, vocabulary: Vocabulary):
    path = os.fspath(model_file)
    if not os.path.isfile(path):
      raise FileNotFoundError(
        f"text model {path} does not exist; a model directory holds text.model"
      )
    with open(path, "rb") as f:
      self._bytes = f.read()
    try:
      self._model = spm.SentencePieceProcessor(model_proto=self._bytes)
    except RuntimeError as e:
      raise ValueError(f"text model {path} is not a SentencePiece model: {e}") from e
    pieces, wanted = self._model.get_piece_size(), len(vocabulary.text)
    if pieces != wanted:
      raise ValueError(
        f"text model {path} has {pieces} pieces, but vocabulary {vocabulary.name} has {wanted} "
        "text ids; use the vocabulary that the model was made for"
      )
    if not any(self._model.is_byte(i) for i in range(pieces)):
      raise ValueError(f"text model {path} has no byte fallback; train it with byte_fallback=true")
    self._range = vocabulary.text

  def encode(self, text: str) -> np.ndarray:
    """Returns int32[n] vocabulary ids."""
    return np.asarray(self._model.encode(text), np.int32) + self._range.start

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of vocabulary ids; ids that are not text are left out."""
    ids = np.asarray(ids)
    ids = ids[(ids >= self._range.start) & (ids < self._range.stop)] - self._range.start
    return self._model.decode([int(i) for i in ids])

  def fingerprint(self) -> str:
    """16 hex digits over the model file."""
    return hashlib.sha256(self._bytes).hexdigest()[:16]


class TokenizerJsonText:
  """The text tokenizer of a released model, a JSON file of the `tokenizers` library.

  Args:
    file: `tokenizer.json` (AR-Omni: `text_tokenizer.json`); its ids are those of the vocabulary.
    vocabulary: id space; `convert.tokenizer.read_vocabulary` checks the file against it.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if it is no tokenizer JSON, or has another number of ids.
  """

  def __init__(self, file: str | os.PathLike, vocabulary: Vocabulary):
    self._tokenizer = load_tokenizer(file)
    size = self._tokenizer.get_vocab_size()
    if size != vocabulary.size:
      raise ValueError(
        f"tokenizer {os.fspath(file)} has {size} ids, vocabulary {vocabulary.name} has "
        f"{vocabulary.size}; use the tokenizer that the model came with"
      )
    self._range = vocabulary.text

  def encode(self, text: str) -> np.ndarray:
    """Returns int32[n] vocabulary ids; nothing is put before or after the text."""
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of vocabulary ids; ids that are not text are left out."""
    ids = np.asarray(ids)
    ids = ids[(ids >= self._range.start) & (ids < self._range.stop)]
    return self._tokenizer.decode([int(i) for i in ids])

  def fingerprint(self) -> str:
    """16 hex digits over what the library reads from the file."""
    return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]


def load_tokenizer(file: str | os.PathLike) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a JSON file; errors as `TokenizerJsonText`."""
  path = os.fspath(file)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"tokenizer {path} does not exist")
  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
  except Exception as e:  # the library raises bare exceptions
    raise ValueError(f"tokenizer {path} is not a tokenizer JSON: {e}") from e
