"""AR-Omni's own training data -> token shards:

  aromni import_aromni --source=DIR --out=data/tokens_aromni --model=MODEL_DIR

--source is a folder of JSONL (pre-training) or parquet files (instruction data), or one such file.
A line that is no sample is left out, counted in manifest.json and named with the reason in
OUT/rejected.jsonl; with too many of them nothing is written. A job that was killed goes on with the
same command: finished input files are kept in OUT.parts until OUT is whole.
"""

from absl import flags, logging

from aromni_jax import logs, model_dir
from aromni_jax.data_pipelines.aromni_shards import import_files
from aromni_jax.vocabulary import get_vocabulary

_SOURCE = flags.DEFINE_string("source", None, "Folder of .jsonl or .parquet files, or one file.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
_MODEL = flags.DEFINE_string(
  "model", None, "Model directory that the ids are of; training checks its fingerprints."
)
_VOCABULARY = flags.DEFINE_string(
  "vocabulary", "aromni_7b", "Vocabulary without a model: shards to look at and to export only."
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "JSONL samples are shorter (1300), parquet samples not longer (2048)."
)
_VALIDATION = flags.DEFINE_float("validation_fraction", 0.01, "Share of samples to validate on.")
_MAX_BAD = flags.DEFINE_float("max_bad_fraction", 0.01, "Share of the lines that may be wrong.")


def main(argv: list[str]) -> None:
  del argv
  if _MODEL.value:
    vocabulary, fingerprints = model_dir.read_identity(_MODEL.value)
    metadata = {f"{name}_fingerprint": value for name, value in fingerprints.items()}
  else:
    vocabulary, metadata = get_vocabulary(_VOCABULARY.value), {}
    logging.warning("No --model: training refuses these shards, as it cannot check their codecs.")
  manifest = import_files(
    _SOURCE.value,
    _OUT.value,
    vocabulary,
    metadata,
    max_length=_MAX_LENGTH.value,
    validation_fraction=_VALIDATION.value,
    max_bad_fraction=_MAX_BAD.value,
  )
  for split, counts in manifest["splits"].items():
    logging.info("%s: %d samples, %d tokens", split, counts["samples"], counts["tokens"])
  for reason, count in manifest["rejected"].items():
    logging.info("rejected: %s, %d lines", reason, count)


if __name__ == "__main__":
  logs.run(main, required=["source", "out"])
