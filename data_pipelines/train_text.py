"""Trains the demo's SentencePiece model: `aromni train_text --out=text.model`.

Words of PictoTalk's captions and of the prompts are whole pieces, the names of the objects kept for
fine-tuning are not; the other pieces are parts of English words, and bytes. Takes a few seconds.
"""

import io
import os
import re

import numpy as np
import sentencepiece as spm
from absl import flags, logging

from aromni_jax import logs
from aromni_jax.pictotalk import world
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import get_vocabulary

_OUT = flags.DEFINE_string("out", "text.model", "File to write.")

_NAMES = ("USER:", "ASSISTANT:", "GPT:", "This is input:")


def whole_words() -> list[str]:
  """Returns the words that become single pieces, with SentencePiece's mark of a word's begin."""
  texts = [c.text for c in world.captions("base")]
  texts += [c.object for c in world.captions("base")]
  texts += [text for task in TASKS.values() for text in task.wordings]
  words = {word for text in texts for word in re.findall(r"[\w']+", text)}
  return ["▁" + word for word in sorted(words)] + ["▁" + w for n in _NAMES for w in n.split()]


def english_words(count: int) -> list[str]:
  """Returns a fixed selection of the words in CMUdict, as pocketsphinx brings it."""
  import pocketsphinx

  path = os.path.join(os.path.dirname(pocketsphinx.__file__), "model/en-us/cmudict-en-us.dict")
  with open(path) as f:
    words = sorted({line.split()[0] for line in f if line[:1].isalpha() and "(" not in line})
  new = {c.text.split()[1] for c in world.captions("new_objects")} | set(world.NEW_OBJECTS)
  words = [word for word in words if word not in new]
  return [words[i] for i in np.random.default_rng(0).permutation(len(words))[:count]]


def train(num_pieces: int) -> bytes:
  """Returns the serialised model with exactly `num_pieces` pieces."""
  model = io.BytesIO()
  symbols = list(dict.fromkeys(whole_words()))
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(english_words(20_000)),
    model_writer=model,
    model_type="bpe",
    vocab_size=num_pieces,
    byte_fallback=True,
    user_defined_symbols=symbols,
    character_coverage=1.0,
    normalization_rule_name="identity",
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def main(argv: list[str]) -> None:
  del argv
  model = train(len(get_vocabulary("demo").text))
  os.makedirs(os.path.dirname(os.path.abspath(_OUT.value)), exist_ok=True)
  with open(_OUT.value, "wb") as f:
    f.write(model)
  logging.info("Wrote %s (%d bytes).", _OUT.value, len(model))


if __name__ == "__main__":
  logs.run(main)
