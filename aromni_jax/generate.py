"""Answers one request, or the turns of dialogues, with text, pictures and speech.

  aromni generate --task=text_to_speech --text="three lemons on gray" --out=x.wav
  aromni generate --task=text_to_image --text="two dogs on blue" --out=x.png
  aromni generate --task=speech_to_text --speech=x.wav
  aromni generate --task=dialogue --speech=x.wav --out=folder
  aromni generate --dialog=dialogs.json --out=folder

--task is one of: image_caption, speech_to_text, text_to_image, text_to_speech, image_to_text,
speech_to_image, text_to_text, dialogue, image_to_speech. Text goes to the screen; a picture or
speech to --out (.png or .wav; a folder takes everything). --dialog reads AR-Omni's chat schema
(aromni_jax/serving/dialog_files.py).
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags, logging

from aromni_jax import compilation_cache, logs
from aromni_jax.recipes import RECIPES, get_recipe
from aromni_jax.tasks import TASKS

if TYPE_CHECKING:
  from aromni_jax.model import Model
  from aromni_jax.serving.requests import Response

_TASK = flags.DEFINE_enum("task", None, list(TASKS), "What to do.")
_DIALOG = flags.DEFINE_string("dialog", None, "File of dialogues (.json or .jsonl), not a task.")
_TEXT = flags.DEFINE_string("text", None, "Input text.")
_IMAGE = flags.DEFINE_string("image", None, "Input picture, any format that Pillow reads.")
_SPEECH = flags.DEFINE_string("speech", None, "Input sound, any format that libsndfile reads.")
_INSTRUCTION = flags.DEFINE_string("instruction", None, "What to do, in words; optional.")
_OUT = flags.DEFINE_string("out", None, "File (.png, .wav, .txt) or folder for the response.")
_MODEL = flags.DEFINE_string("model", None, "Model directory; the shipped one if none.")
_RECIPE = flags.DEFINE_enum(
  "recipe", None, list(RECIPES), "Prompts and decoding rules; the model's if none."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samplers.")
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  None,
  "0 takes the likeliest ids. By default pictures are sampled, and what the released rules sample.",
)
_TOP_P = flags.DEFINE_float("top_p", None, "Share of the probability mass that is sampled from.")
_REPETITION_PENALTY = flags.DEFINE_float(
  "repetition_penalty", None, "Makes ids less likely that came before; 1 is off."
)
_GUIDANCE = flags.DEFINE_float("guidance", None, "How far a picture moves to its prompt; 1 is off.")
_IMAGE_GUIDANCE = flags.DEFINE_float(
  "image_guidance", None, "How far a picture moves to the pictures before it."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Budget of the response in ids.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Dialogues answered at a time.", lower_bound=1)


def main(argv: list[str]) -> None:
  del argv
  if (_TASK.value is None) == (_DIALOG.value is None):
    sys.exit("error: expected --task or --dialog, and not both")
  if _TASK.value:
    _check_out(_TASK.value, _OUT.value)
  elif not _OUT.value or pathlib.Path(_OUT.value).suffix:
    sys.exit(f"error: --out={_OUT.value or ''}: --dialog needs a folder")
  _answer()


def _answer() -> None:
  """Answers what the flags ask; what takes seconds to import or to load is for sound flags only."""
  from aromni_jax.model import load_model
  from aromni_jax.serving import dialog, dialog_files
  from aromni_jax.serving.requests import (
    Request,
    check_codecs,
    choose_samplers,
    generate_batch,
    make_engine,
  )

  compilation_cache.enable()
  task = _TASK.value
  dialogs = dialog_files.read_dialogs(_DIALOG.value) if _DIALOG.value else None
  model = load_model(_MODEL.value)
  if _RECIPE.value:
    model = dataclasses.replace(model, recipe=get_recipe(_RECIPE.value))
  samplers = choose_samplers(
    model.recipe,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    repetition_penalty=_REPETITION_PENALTY.value,
    guidance=_GUIDANCE.value,
    image_guidance=_IMAGE_GUIDANCE.value,
  )
  check_codecs(model, task or "dialogue")
  options = {
    "seed": _SEED.value,
    "max_new_tokens": _MAX_NEW_TOKENS.value,
    "engine": make_engine(model, samplers, consume=True),
  }
  if dialogs is None:
    request = Request(task, _TEXT.value, _IMAGE.value, _SPEECH.value, _INSTRUCTION.value)
    (response,) = generate_batch(model, [request], **options)
    _show(model, response)
    return
  for answer in dialog.answer_dialogs(model, dialogs, batch_size=_BATCH_SIZE.value, **options):
    dialog.write_answer(model, answer, pathlib.Path(_OUT.value))


def _show(model: "Model", response: "Response") -> None:
  from aromni_jax.serving.media import write_response

  for label, text in (("heard: ", response.transcript), ("", response.text)):
    if text is not None:
      print(label + text)
  if missing := [part for part in TASKS[_TASK.value].outputs if getattr(response, part) is None]:
    logging.warning("The response of %d ids has no %s.", len(response.tokens), ", ".join(missing))
  if _OUT.value:
    rate = 0 if response.speech is None else model.speech_codec.config.sample_rate
    write_response(response, pathlib.Path(_OUT.value), rate)


def _check_out(task: str, out: str | None) -> None:
  """Fails before anything is computed if the response could not be kept."""
  media = {"image": ".png", "speech": ".wav"}
  needed = [media[part] for part in TASKS[task].outputs if part in media]
  suffix = pathlib.Path(out).suffix if out else None
  if needed and out is None:
    sys.exit(f"error: --out is missing: {task} gives a {' and a '.join(needed)} file")
  if suffix and (len(needed) > 1 or (needed and suffix != needed[0])):
    wanted = "a folder" if len(needed) > 1 else f"a {needed[0]} file or a folder"
    sys.exit(f"error: --out={out}: {task} needs {wanted}")


def run() -> None:
  logs.run(main)


if __name__ == "__main__":
  run()
