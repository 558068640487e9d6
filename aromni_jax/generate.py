"""Answers one request with text, a picture or speech.

  aromni generate --task=text_to_speech --text="three lemons on gray" --out=x.wav
  aromni generate --task=text_to_image --text="two dogs on blue" --out=x.png
  aromni generate --task=speech_to_text --speech=x.wav
  aromni generate --task=dialogue --speech=x.wav --out=folder

--task is one of: image_caption, speech_to_text, text_to_image, text_to_speech, image_to_text,
speech_to_image, text_to_text, dialogue, image_to_speech. Text goes to the screen; a picture or
speech to --out (.png or .wav; a folder takes everything).
"""

import dataclasses
import pathlib
import sys

from absl import app, flags

from aromni_jax import logs, model_dir
from aromni_jax.inference import SAMPLERS, Request, generate_batch, write_response
from aromni_jax.prompts import INPUTS, OUTPUTS

_TASK = flags.DEFINE_enum("task", None, list(INPUTS), "What to do.")
_TEXT = flags.DEFINE_string("text", None, "Input text.")
_IMAGE = flags.DEFINE_string("image", None, "Input picture, any format that Pillow reads.")
_SPEECH = flags.DEFINE_string("speech", None, "Input sound, any format that libsndfile reads.")
_INSTRUCTION = flags.DEFINE_string("instruction", None, "What to do, in words; optional.")
_OUT = flags.DEFINE_string("out", None, "File (.png, .wav, .txt) or folder for the response.")
_MODEL = flags.DEFINE_string("model", None, "Model directory; the shipped one if none.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samplers.")
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  None,
  "0 takes the likeliest ids; by default only pictures are sampled.",
)
_TOP_P = flags.DEFINE_float("top_p", None, "Share of the probability mass that is sampled from.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "How far a picture moves to its prompt; 1 is off.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Budget of the response in ids.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  _check_out(_TASK.value, _OUT.value)
  request = Request(_TASK.value, _TEXT.value, _IMAGE.value, _SPEECH.value, _INSTRUCTION.value)
  chosen = {"temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
  chosen = {k: v for k, v in chosen.items() if v is not None}
  with logs.clear_errors():
    samplers = {name: dataclasses.replace(s, **chosen) for name, s in SAMPLERS.items()}
    if _GUIDANCE.value is not None:
      samplers["image"] = dataclasses.replace(samplers["image"], guidance=_GUIDANCE.value)
    model = model_dir.load_model(_MODEL.value)
    (response,) = generate_batch(
      model,
      [request],
      seed=_SEED.value,
      samplers=samplers,
      max_new_tokens=_MAX_NEW_TOKENS.value,
    )
  for label, text in (("heard: ", response.transcript), ("", response.text)):
    if text is not None:
      print(label + text)
  if _OUT.value:
    write_response(response, pathlib.Path(_OUT.value), model.speech_codec.config.sample_rate)


def _check_out(task: str, out: str | None) -> None:
  """Fails before anything is computed if the response could not be kept."""
  media = {"image": ".png", "speech": ".wav"}
  needed = [media[part] for part in OUTPUTS[task] if part in media]
  suffix = pathlib.Path(out).suffix if out else None
  if needed and out is None:
    sys.exit(f"error: --out is missing: {task} gives a {' and a '.join(needed)} file")
  if suffix and (len(needed) > 1 or (needed and suffix != needed[0])):
    wanted = "a folder" if len(needed) > 1 else f"a {needed[0]} file or a folder"
    sys.exit(f"error: --out={out}: {task} needs {wanted}")


def run() -> None:
  logs.setup()
  flags.mark_flag_as_required("task")
  app.run(main)


if __name__ == "__main__":
  run()
