"""Reading, writing and resampling of sound."""

import io
import math
import os

import numpy as np
import soundfile

_ZEROS, _ROLLOFF = 6, 0.99  # of the sinc; the values of torchaudio's default
_BLOCK = 1 << 16  # samples resampled at a time


def read_audio(source: str | os.PathLike | bytes, sample_rate: int) -> np.ndarray:
  """Returns a sound as mono float32[n] in [-1, 1] at `sample_rate`.

  Channels are averaged, then the sound is resampled. Any format, width and rate that libsndfile
  reads.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a sound, or has no samples.
  """
  name = "the given bytes" if isinstance(source, bytes) else os.fspath(source)
  if not isinstance(source, bytes) and not os.path.isfile(name):
    raise FileNotFoundError(f"sound {name} does not exist")
  try:
    stream = io.BytesIO(source) if isinstance(source, bytes) else name
    wav, rate = soundfile.read(stream, dtype="float32", always_2d=True)
  except (soundfile.LibsndfileError, TypeError) as e:
    raise ValueError(
      f"{name} is not a sound that libsndfile reads (wav, flac, ogg ...): {e}"
    ) from e
  if not len(wav):
    raise ValueError(f"sound {name} is empty")
  if not np.isfinite(wav).all():
    raise ValueError(f"sound {name} has samples that are not finite")
  return resample(wav.mean(axis=1), rate, sample_rate)


def write_wav(path: str | os.PathLike, wav: np.ndarray, sample_rate: int) -> None:
  """Writes float[n] as 16-bit mono WAV; values outside [-1, 1] are clipped."""
  soundfile.write(os.fspath(path), np.clip(wav, -1.0, 1.0), sample_rate, subtype="PCM_16")


def resample(wav: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
  """Returns float32[ceil(n * to_rate / from_rate)], the sound at another rate.

  A Hann-windowed sinc of 6 zero crossings, as torchaudio's `Resample` has it, in whose units the
  released WavTokenizer was trained.

  Args:
    wav: float[n].
    from_rate, to_rate: samples per second.
  """
  wav = np.asarray(wav, np.float32)
  if from_rate == to_rate:
    return wav
  divisor = math.gcd(from_rate, to_rate)
  old, new = from_rate // divisor, to_rate // divisor
  cutoff = min(old, new) * _ROLLOFF
  width = math.ceil(_ZEROS * old / cutoff)
  # One filter per phase, of the samples around the phase's place: those where it is not zero.
  first = np.arange(new) * old // new - width
  taps = np.arange(2 * width + 2)
  phase = np.arange(new, dtype=np.float32) / np.float32(new)  # the reference rounds it to float32
  t = (first[:, None] + taps) / old - phase[:, None].astype(np.float64)
  t = np.clip(t * cutoff, -_ZEROS, _ZEROS)
  kernels = np.sinc(t) * np.cos(t * np.pi / _ZEROS / 2) ** 2 * cutoff / old  # [new, taps]
  padded = np.pad(wav.astype(np.float64), (width, width + old + 2))
  windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps))
  out = np.empty(math.ceil(len(wav) * new / old), np.float32)
  for start in range(0, len(out), _BLOCK):
    block, which = np.divmod(np.arange(start, min(start + _BLOCK, len(out))), new)
    near = windows[block * old + first[which] + width]
    out[start : start + _BLOCK] = np.einsum("nt,nt->n", near, kernels[which])
  return out
