"""Evaluates a model on PictoTalk (or another suite): every task, from raw pictures and sound.

  aromni evaluate --data_dir=data --out=evaluation.json                 the shipped model
  aromni evaluate --model=DIR --data_dir=data --out=DIR/evaluation.json  another one

The default split, test, has object-colour pairs that no training has. Beside every figure stand
chance (the same score for captions drawn at random from the set) and, for pictures and speech, what
the referee says of the originals and of the codec's reconstructions. Needs the `demo` and `eval`
extras.
"""

import json
import pathlib

from absl import flags, logging

from aromni_jax import compilation_cache, logs
from aromni_jax.evaluation.suite import SUITES, get_suite

_MODEL = flags.DEFINE_string("model", None, "Model directory; the shipped one if none.")
_SUITE = flags.DEFINE_enum("suite", "pictotalk", list(SUITES), "What it is measured on.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the raw sets.")
_CONFIG = flags.DEFINE_string("config", "base", "Which set: base, new_objects or tiny.")
_SPLIT = flags.DEFINE_string("split", "test", "Which split: train, validation or test.")
_LIMIT = flags.DEFINE_integer("limit", 0, "At most so many captions, a fixed choice; 0 is all.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samplers.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write; its folder also gets the examples.")
_EXAMPLES = flags.DEFINE_integer("examples", 8, "Captions whose responses are kept beside --out.")


def main(argv: list[str]) -> None:
  del argv
  from aromni_jax.model import load_model

  compilation_cache.enable()
  suite = get_suite(_SUITE.value, _CONFIG.value, _SPLIT.value)
  items = suite.load(_DATA_DIR.value, _CONFIG.value, _SPLIT.value, _LIMIT.value)
  model = load_model(_MODEL.value)
  figures, answered = suite.evaluate(model, items, preset=_CONFIG.value, seed=_SEED.value)
  out = pathlib.Path(_OUT.value)
  examples = suite.examples(
    out.with_name(out.stem + "_examples"), model, items, answered, _EXAMPLES.value
  )
  header = {"data": f"{_CONFIG.value}/{_SPLIT.value}", "captions": len(items), "seed": _SEED.value}
  result = header | suite.describe(model) | figures | {"examples": examples}
  out.write_text(json.dumps(result, indent=1) + "\n")
  print(suite.table(figures["rows"]))
  logging.info("Wrote %s.", out)


def run() -> None:
  logs.run(main, required=["out"])


if __name__ == "__main__":
  run()
