"""An independent speech recogniser for PictoTalk: pocketsphinx with a grammar of the captions.

Needs the `eval` extra. It is a referee, not a part of the model: the same grammar scores original,
reconstructed and generated speech.
"""

import functools

import numpy as np

from aromni_jax.pictotalk import world

SAMPLE_RATE = 16_000
_PADDING = SAMPLE_RATE // 4  # the recogniser needs some silence around a phrase


@functools.cache
def _decoder(preset: str):
  try:
    import pocketsphinx
  except ImportError as e:
    raise ImportError(
      "recognising speech needs pocketsphinx: pip install 'aromni_jax[eval]'"
    ) from e
  decoder = pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
  decoder.add_jsgf_string("captions", grammar(preset))
  decoder.activate_search("captions")
  return decoder


def grammar(preset: str) -> str:
  """Returns the JSGF grammar of a PictoTalk preset: count, object in the right number, colour."""
  items = world.captions(preset)
  one = sorted({c.text.split()[1] for c in items if c.count == 1})
  many = sorted({c.text.split()[1] for c in items if c.count > 1})
  colours = sorted({c.colour for c in items})
  return (
    "#JSGF V1.0;\ngrammar captions;\n"
    f"<one> = {' | '.join(one)};\n<many> = {' | '.join(many)};\n"
    f"<count> = {' | '.join(world.COUNTS[1:])};\n<colour> = {' | '.join(colours)};\n"
    f"public <caption> = ({world.COUNTS[0]} <one> | <count> <many>) on <colour>;\n"
  )


def recognise(wav: np.ndarray, preset: str = "base") -> str:
  """Returns the caption that the recogniser hears, or "" if it hears none.

  Args:
    wav: float32[n] in [-1, 1] at 16 kHz.
    preset: PictoTalk preset whose captions the grammar allows.

  Raises:
    ImportError: if pocketsphinx is not installed.
  """
  samples = np.clip(np.asarray(wav, np.float32), -1, 1) * 32767
  samples = np.pad(samples, _PADDING).astype(np.int16)
  decoder = _decoder(preset)
  decoder.start_utt()
  decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
  decoder.end_utt()
  hypothesis = decoder.hyp()
  return hypothesis.hypstr if hypothesis else ""
