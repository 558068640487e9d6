"""Speech synthesis with espeak-ng, called through ctypes: the voices of PictoTalk.

espeak-ng is reproducible only in a fresh process with a fixed seed and a fixed order of calls, so
every list of texts is spoken by a process of its own.
"""

import ctypes
import multiprocessing
from collections.abc import Sequence

import numpy as np

SAMPLE_RATE = 16_000

# Our name -> espeak-ng voice. The first three are for training, f3 is held out.
VOICES = {"f2": "en-us+f2", "f5": "en-us+f5", "m2": "en-us+m2", "f3": "en-us+f3"}

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, with no thread to wait for
_UTF8 = 1
_SILENCE, _MARGIN = 200, SAMPLE_RATE // 20  # amplitude of int16 samples; samples that stay
_CALLBACK = ctypes.CFUNCTYPE(
  ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def synthesise(voice: str, texts: Sequence[str]) -> list[np.ndarray]:
  """Returns each text as speech, int16[n] at 16 kHz; equal arguments give equal samples.

  The silence around the phrase is cut to 50 ms.

  Args:
    voice: a key of `VOICES`.
    texts: what to say.

  Raises:
    ValueError: for a voice that does not exist.
    ImportError: if the `demo` extra is not installed.
    RuntimeError: if espeak-ng fails, or a text has nothing that can be spoken.
  """
  if voice not in VOICES:
    raise ValueError(f"voice {voice!r} does not exist; expected one of {', '.join(VOICES)}")
  try:
    import espeakng_loader  # noqa: F401
    import scipy.signal  # noqa: F401
  except ImportError as e:
    raise ImportError(f"speaking PictoTalk needs {e.name}: pip install 'aromni_jax[demo]'") from e
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(_speak, (VOICES[voice], list(texts)))


def _speak(voice: str, texts: list[str]) -> list[np.ndarray]:
  """Runs in a fresh process: speaks all texts in order."""
  import espeakng_loader
  import scipy.signal

  library = ctypes.CDLL(espeakng_loader.get_library_path())
  data = espeakng_loader.get_data_path().encode()
  rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
  if rate <= 0:
    raise RuntimeError(f"espeak_Initialize failed ({rate}) with the data of espeakng-loader")
  library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # only now: Initialize draws a seed of its own
  if status := library.espeak_SetVoiceByName(voice.encode()):
    raise RuntimeError(f"espeak-ng has no voice {voice!r} (status {status})")
  pieces: list[np.ndarray] = []

  @_CALLBACK
  def collect(samples, count, _):
    if count > 0:
      pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0

  library.espeak_SetSynthCallback(collect)
  out = []
  for text in texts:
    pieces.clear()
    encoded = text.encode()
    status = library.espeak_Synth(
      encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None
    )
    if status or not pieces:
      raise RuntimeError(f"espeak-ng could not say {text!r} (status {status})")
    wav = np.concatenate(pieces).astype(np.float64)
    wav = scipy.signal.resample_poly(wav, SAMPLE_RATE, rate)
    loud = np.flatnonzero(np.abs(wav) > _SILENCE)
    if not len(loud):
      raise RuntimeError(f"espeak-ng said nothing for {text!r}; expected words")
    wav = wav[max(loud[0] - _MARGIN, 0) : loud[-1] + _MARGIN]
    out.append(np.clip(np.round(wav), -32768, 32767).astype(np.int16))
  return out
