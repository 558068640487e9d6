"""A random decoder of full size in layout ar_omni on disk -> ours -> back, with time and memory.

  python -m benchmarks.convert --dir=/big/disk [--layers=32] [--verify]

Writes 14 GB of random bfloat16 weights, converts them (with the certificate), converts them back,
compares all bits, and removes everything unless --keep. Needs 45 GB of disk. Memory is that of the
converting process: anonymous memory, and all, which counts mapped files, too. The peer of a
conversion is the copying of the file: `copy_seconds`.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
from absl import app, flags, logging
from safetensors.numpy import save_file

from aromni_jax import logs
from aromni_jax.convert import decoders
from aromni_jax.convert.layouts import LAYOUTS
from aromni_jax.convert.writers import hf_config
from aromni_jax.models.config import DecoderConfig
from tests import released

_DIR = flags.DEFINE_string("dir", "runs/convert", "Folder for the files; is removed afterwards.")
_LAYERS = flags.DEFINE_integer("layers", 32, "Layers; 32 is the released size.")
_KEEP = flags.DEFINE_bool("keep", False, "Leaves the files where they are.")
_VERIFY = flags.DEFINE_bool("verify", False, "Also compares logits with transformers.")


def make_release(folder: pathlib.Path, config: DecoderConfig) -> None:
  """Writes random weights in layout ar_omni, a safetensors file per layer, and a tokenizer."""
  layout = LAYOUTS["ar_omni"]
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  place: dict[str, str] = {}

  def write(file: str, entries: dict[str, str]) -> None:
    arrays = {}
    for name, path in entries.items():
      shape = layout.shape(path, config)
      scale, offset = (0.1, "scale" in path) if len(shape) == 1 else (shape[-1] ** -0.5, 0)
      values = rng.standard_normal(shape, np.float32)
      arrays[name] = (offset + scale * values).astype(ml_dtypes.bfloat16)
    save_file(arrays, folder / file, metadata={"format": "pt"})
    place.update(dict.fromkeys(arrays, file))

  table = layout.names(config.num_layers)
  write("model-top.safetensors", {ns[0]: p for p, ns in table.items() if len(ns) == 1})
  for i in range(config.num_layers):
    entries = {ns[i]: p for p, ns in table.items() if p.startswith("layers.")}
    write(f"model-layer-{i:02d}.safetensors", entries)
  index = {"metadata": {}, "weight_map": place}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  about = {"model_type": "chameleon"} | hf_config(config)
  (folder / "config.json").write_text(json.dumps(about))
  released.write_tokenizer(folder / "tokenizer.json")


def run(*arguments: str) -> dict[str, float]:
  """Runs a conversion; returns seconds and peaks of memory in MiB."""
  start = time.monotonic()
  process = subprocess.Popen([sys.executable, "-m", "aromni_jax.convert", *arguments])
  peaks = {"RssAnon": 0, "VmHWM": 0}
  while process.poll() is None:
    try:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
      break
    for line in status.splitlines():
      if (key := line.split(":")[0]) in peaks:
        peaks[key] = max(peaks[key], int(line.split()[1]) // 1024)
    time.sleep(0.05)
  if process.wait():
    raise SystemExit(f"convert {' '.join(arguments)} failed")
  return {
    "seconds": round(time.monotonic() - start, 1),
    "peak_anonymous_mib": peaks["RssAnon"],
    "peak_resident_mib": peaks["VmHWM"],
  }


def same(first: pathlib.Path, second: pathlib.Path) -> bool:
  """Whether two folders hold the same bits under the same names."""
  a, b = decoders.find_decoder(first).tensors, decoders.find_decoder(second).tensors
  return a.keys() == b.keys() and all(
    a[n].dtype == b[n].dtype and a[n].read().tobytes() == b[n].read().tobytes() for n in a
  )


def main(argv: list[str]) -> None:
  del argv
  folder = pathlib.Path(_DIR.value)
  config = DecoderConfig(num_layers=_LAYERS.value)
  start = time.monotonic()
  shutil.rmtree(folder, ignore_errors=True)
  try:
    make_release(folder / "source", config)
    made = time.monotonic() - start
    logging.info("Wrote random weights in %.0f s.", made)
    start = time.monotonic()
    shutil.copytree(folder / "source", folder / "copy")
    copied = time.monotonic() - start
    shutil.rmtree(folder / "copy")
    source, model, back = (str(folder / name) for name in ("source", "model", "back"))
    result = {"benchmark": "convert", "parameters": config.num_params()}
    result["largest_tensor_mib"] = 2 * config.vocab_size * config.embed_dim // 2**20
    result["copy_seconds"] = round(copied, 1)
    result["convert"] = run(f"--source={source}", f"--out={model}")
    if _VERIFY.value:
      result["verify"] = run(f"--model={model}", f"--verify_against={source}")
    result["export"] = run(f"--model={model}", "--format=ar_omni", f"--out={back}")
    result["equal"] = same(folder / "source", folder / "back")
    print(json.dumps(result))
  finally:
    if not _KEEP.value:
      shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
  logs.setup()
  app.run(main)
