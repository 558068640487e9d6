"""The raw PictoTalk sets on disk."""

import os
from typing import Any


def open_set(data_dir: str, name: str) -> Any:
  """Returns the TFDS builder of a raw set, whose `as_data_source(split)` has the records.

  Args:
    data_dir: folder of the sets.
    name: "base", "new_objects" or "tiny".

  Raises:
    FileNotFoundError: if the set is not there, saying how it is made.
  """
  import tensorflow_datasets as tfds

  folder = os.path.join(data_dir, "picto_talk", name, "1.0.0")
  if not os.path.isdir(folder):
    raise FileNotFoundError(
      f"{folder} does not exist; make it with aromni build_pictotalk --data_dir={data_dir} "
      f"--config={name}"
    )
  return tfds.builder_from_directory(folder)
