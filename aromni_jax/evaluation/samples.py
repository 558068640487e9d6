"""Samples at fixed prompts while a model trains: pictures, sound and text for TensorBoard."""

import dataclasses
import os

from absl import logging
from flax import nnx

from aromni_jax.model import load_model
from aromni_jax.pictotalk import world
from aromni_jax.serving.requests import Request, check_codecs, generate_batch, make_engine
from aromni_jax.tasks import get_task
from aromni_jax.training.writer import Writer

_CAPTIONS = 2
# What is asked, and how the answer is read back.
_ECHOES = {"text_to_image": "image_caption", "text_to_speech": "speech_to_text"}


class Samples:
  """What the model draws and says for unseen captions, and how it reads that back.

  One engine serves a whole run. It takes the parameters as they are split over the mesh, so no chip
  holds the whole decoder, and gives them back after each look. All processes generate alike, and
  the first one writes.

  Args:
    base: model directory with the codecs.

  Raises:
    ValueError: if a codec is missing.
  """

  def __init__(self, base: str | os.PathLike):
    self._model = load_model(base, decoder=False)
    self._engine = None
    for task in _ECHOES:
      check_codecs(self._model, task)

  def __call__(self, step: int, decoder: nnx.Module, writer: Writer) -> None:
    """Writes samples of a decoder after a step."""
    model = dataclasses.replace(self._model, decoder=decoder)
    if self._engine is None:
      self._engine = make_engine(model)
    else:
      self._engine.load(decoder)
    captions = world.captions("base", "test")
    texts = [captions[i * len(captions) // _CAPTIONS].text for i in range(_CAPTIONS)]
    asked = [Request(task, text=text) for text in texts for task in _ECHOES]
    said = generate_batch(model, asked, engine=self._engine)
    back: dict[int, Request] = {}
    for i, request in enumerate(asked):
      (part,) = get_task(request.task).outputs
      value = getattr(said[i], part)
      if value is None:
        logging.warning("Step %d: %s gave no %s for %r.", step, request.task, part, request.text)
      else:
        back[i] = Request(_ECHOES[request.task], **{part: value})
    echoes = generate_batch(model, list(back.values()), engine=self._engine) if back else []
    self._engine.release()
    rate = model.speech_codec.config.sample_rate
    names = [f"{request.task}/{request.text.replace(' ', '_')}" for request in asked]
    for name, response in zip(names, said, strict=True):
      writer.write_sample(step, name, response, rate)
    for i, echo in zip(back, echoes, strict=True):
      writer.write_sample(step, f"{names[i]}/read_back", echo, rate)
