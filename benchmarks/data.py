"""Tokens per second of the loader, and the share of real tokens in its rows.

python -m benchmarks.data --shards=data/tokens_base
"""

import json
import time

from absl import app, flags

from aromni_jax.data import token_shards
from aromni_jax.data.pipeline import DataConfig, make_train_iterator
from aromni_jax.vocabulary import Vocabulary

_SHARDS = flags.DEFINE_string("shards", "data/tokens_base", "Folder of token shards.")
_BATCHES = flags.DEFINE_integer("batches", 100, "Measured batches.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows of a batch.")
_LENGTH = flags.DEFINE_integer("sequence_length", 512, "Tokens of a row.")
_THREADS = flags.DEFINE_integer("threads", 2, "Reader threads.")


def main(argv: list[str]) -> None:
  del argv
  vocabulary = Vocabulary.from_dict(token_shards.read_manifest(_SHARDS.value)["vocabulary"])
  config = DataConfig(
    _SHARDS.value, sequence_length=_LENGTH.value, long_samples="drop", threads=_THREADS.value
  )
  iterator = make_train_iterator(config, vocabulary, batch_size=_BATCH_SIZE.value)
  next(iterator)
  real = total = 0
  began = time.perf_counter()
  for _ in range(_BATCHES.value):
    batch = next(iterator)
    real, total = real + int((batch.segment_ids > 0).sum()), total + batch.tokens.size
  seconds = time.perf_counter() - began
  print(
    json.dumps(
      {
        "benchmark": "data",
        "real_tokens_per_second": round(real / seconds),
        "real_share": round(real / total, 4),
        "batches": _BATCHES.value,
        "threads": _THREADS.value,
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
