"""Token shards -> JSONL as AR-Omni's pre-training reads it:

  aromni export_aromni --shards=data/tokens_base --out=data/jsonl_base

AR-Omni's JSONL has seven tasks and one response, at the end of the sequence. Other samples end the
job, or are left out and counted with --skip_others.
"""

from absl import flags, logging

from aromni_jax import logs
from aromni_jax.data_pipelines.aromni_formats import MAX_LENGTH
from aromni_jax.data_pipelines.aromni_shards import export_split

_SHARDS = flags.DEFINE_string("shards", None, "Folder of token shards.")
_SPLIT = flags.DEFINE_string("split", "train", "Split to write.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
_PER_FILE = flags.DEFINE_integer("samples_per_file", 10_000, "Lines of a file.")
_SKIP = flags.DEFINE_bool("skip_others", False, "Leaves out what the JSONL cannot hold.")


def main(argv: list[str]) -> None:
  del argv
  counts = export_split(
    _SHARDS.value,
    _SPLIT.value,
    _OUT.value,
    samples_per_file=_PER_FILE.value,
    skip_others=_SKIP.value,
  )
  logging.info("%d samples written, %d left out", counts["written"], counts["skipped"])
  if counts["too_long"]:
    logging.warning(
      "%d samples have %d ids or more: AR-Omni's loader leaves them out",
      *(counts["too_long"], MAX_LENGTH[".jsonl"]),
    )


if __name__ == "__main__":
  logs.run(main, required=["shards", "out"])
