"""Pictures and sounds of requests and responses: files and arrays <-> codes."""

import pathlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from aromni_jax.codecs import audio, batching, image_vq
from aromni_jax.codecs.registry import kind_of
from aromni_jax.model import Model

if TYPE_CHECKING:
  from aromni_jax.serving.requests import Response


def encode_pictures(model: Model, images: list) -> np.ndarray:
  """Returns int32[n, image_length] codes of paths, PIL pictures or uint8[H, W, 3]."""
  pictures = [Image.fromarray(x) if isinstance(x, np.ndarray) else x for x in images]
  codec = model.needed(kind_of("image", model.codecs).name)
  pixels = np.stack([image_vq.preprocess(p, codec.config.resolution) for p in pictures])
  return batching.encode_images(codec, pixels, batch_size=min(32, len(pixels)))


def encode_clips(model: Model, clips: list) -> list[np.ndarray]:
  """Returns the codes, int32[m] each, of paths or of float32[n] at the codec's rate."""
  codec = model.needed(kind_of("speech", model.codecs).name)
  rate = codec.config.sample_rate
  wavs = [x if isinstance(x, np.ndarray) else audio.read_audio(x, rate) for x in clips]
  return batching.encode_speech(codec, wavs, batch_size=min(16, len(wavs)))


def write_response(response: "Response", out: pathlib.Path, sample_rate: int) -> None:
  """Writes the parts of a response to a file of the right suffix, or all into a folder."""
  folder = not out.suffix
  (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
  if response.text is not None and (folder or out.suffix == ".txt"):
    (out / "text.txt" if folder else out).write_text(response.text + "\n")
  if response.image is not None:
    Image.fromarray(response.image).save(out / "image.png" if folder else out)
  if response.speech is not None:
    audio.write_wav(out / "speech.wav" if folder else out, response.speech, sample_rate)
