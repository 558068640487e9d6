"""Token shards -> JSONL as AR-Omni's pre-training reads it:

  python -m data_pipelines.export_aromni --shards=data/tokens_base --out=data/jsonl_base

AR-Omni's JSONL has seven tasks and one response, at the end of the sequence. Other samples end the
job, or are left out and counted with --skip_others.
"""

from absl import app, flags, logging
from aromni_jax.data_pipelines.aromni_formats import MAX_LENGTH
from aromni_jax.data_pipelines.aromni_shards import export_split

from aromni_jax import logs

_SHARDS = flags.DEFINE_string("shards", None, "Folder of token shards.")
_SPLIT = flags.DEFINE_string("split", "train", "Split to write.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
_PER_FILE = flags.DEFINE_integer("samples_per_file", 10_000, "Lines of a file.")
_SKIP = flags.DEFINE_bool("skip_others", False, "Leaves out what the JSONL cannot hold.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  with logs.clear_errors():
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
  logs.setup()
  flags.mark_flags_as_required(["shards", "out"])
  app.run(main)
