"""Requests of any task, text, pictures or sound in and out, answered by a model in batches."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from PIL import Image

from aromni_jax.codecs import batching
from aromni_jax.codecs.registry import CODED, kind_of
from aromni_jax.decoding.engine import Engine
from aromni_jax.model import Model
from aromni_jax.prompts import make_prompt, read_response
from aromni_jax.recipes import CONTEXT, Recipe, Sampler
from aromni_jax.sample import Parts
from aromni_jax.serving.media import encode_clips, encode_pictures
from aromni_jax.tasks import get_task


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked.

  Attributes:
    task: task name. text: input text.
    image: a path, a PIL picture or uint8[H, W, 3].
    speech: a path or float32[n] at the codec's rate.
    instruction: what to do; the task's default if None.
  """

  task: str
  text: str | None = None
  image: str | os.PathLike | Image.Image | np.ndarray | None = None
  speech: str | os.PathLike | np.ndarray | None = None
  instruction: str | None = None


@dataclasses.dataclass(frozen=True)
class Response:
  """What is answered; None where the task gives no such part.

  Attributes:
    text: reply. image: uint8[H, W, 3]. speech: float32[n] at the codec's rate.
    transcript: what the user said (dialogue). tokens: int32[n], the generated ids.
  """

  text: str | None
  image: np.ndarray | None
  speech: np.ndarray | None
  transcript: str | None
  tokens: np.ndarray


def make_prompts(model: Model, requests: Sequence[Request]) -> list[np.ndarray]:
  """Returns the ids of every request's prompt, int32[n].

  Raises:
    ValueError: for a task that does not exist, or inputs that it does not take.
    FileNotFoundError, ValueError: for pictures and sounds that cannot be read.
  """
  for request in requests:
    inputs = get_task(request.task).inputs
    given = {n for n in ("text", "image", "speech") if getattr(request, n) is not None}
    if given != set(inputs):
      raise ValueError(
        f"task {request.task} takes {' and '.join(inputs)}; "
        f"got {' and '.join(sorted(given)) or 'nothing'}"
      )
  images = _encode(requests, "image", lambda x: encode_pictures(model, x))
  speech = _encode(requests, "speech", lambda x: encode_clips(model, x))
  return [
    make_prompt(
      request.task,
      model.vocabulary,
      model.text,
      recipe=model.recipe,
      inputs=Parts(text=request.text, image=images.get(i), speech=speech.get(i)),
      instruction=request.instruction,
    )
    for i, request in enumerate(requests)
  ]


def generate_batch(
  model: Model,
  requests: Sequence[Request],
  *,
  seed: int = 0,
  batch_size: int = 16,
  samplers: Mapping[str, Sampler] | None = None,
  engine: Engine | None = None,
  max_new_tokens: int | None = None,
) -> list[Response]:
  """Returns the responses in the order of the requests.

  Args:
    model: what `model.load_model` returns, with a decoder.
    requests: of any tasks.
    seed: randomness of the samplers.
    batch_size: requests at a time.
    samplers: name -> sampler; the recipe's if None.
    engine: what `make_engine` returned, with its samplers; a new one if None.
    max_new_tokens: budget of a response; by default what its parts usually need, or what the
      released code has.
  """
  engine = engine or make_engine(model, samplers)
  for task in {r.task for r in requests}:
    check_codecs(model, task)
  prompts = make_prompts(model, requests)
  budgets = [
    response_budget(model, r.task, len(prompt), max_new_tokens)
    for r, prompt in zip(requests, prompts, strict=True)
  ]
  # Requests that run for about as long go together.
  order = sorted(range(len(requests)), key=lambda i: (budgets[i], requests[i].task, i))
  outputs: dict[int, np.ndarray] = {}
  for start in range(0, len(order), batch_size):
    chosen = order[start : start + batch_size]
    rows = chosen + chosen[:1] * (min(batch_size, len(order)) - len(chosen))  # one batch shape
    ids = engine.generate(
      [prompts[i] for i in rows],
      [requests[i].task for i in rows],
      max_new_tokens=[budgets[i] for i in rows],
      seed=seed,
      row_ids=rows,
    )
    outputs.update(zip(chosen, ids, strict=False))
    if len(order) > batch_size:
      logging.log_every_n_seconds(logging.INFO, "%d of %d responses", 10, len(outputs), len(order))
  return _decode(model, [outputs[i] for i in range(len(requests))])


def check_codecs(model: Model, task: str) -> None:
  """Raises ValueError if the model lacks a codec that a task needs, before anything is computed."""
  entry = get_task(task)
  for modality in CODED:
    if modality in entry.inputs + entry.outputs:
      codec = model.needed(kind_of(modality, model.codecs).name)
      if modality in entry.outputs and not getattr(codec.config, "has_decoder", True):
        raise ValueError(
          f"{model.path} has no pixel decoder, and {task} draws; convert with --vqgan=vqgan.ckpt"
        )


def make_engine(
  model: Model, samplers: Mapping[str, Sampler] | None = None, *, consume: bool = False
) -> Engine:
  """Returns the model's engine.

  Args:
    model: with a decoder.
    samplers: name -> sampler; the recipe's if None.
    consume: gives the decoder's memory to the engine; `model.decoder` cannot be used afterwards.

  Raises:
    ValueError: if the model has no decoder.
  """
  if model.decoder is None:
    raise ValueError(f"{model.path} has no decoder; train one with aromni train")
  return Engine(
    model.decoder,
    model.vocabulary,
    recipe=model.recipe,
    samplers=model.recipe.samplers if samplers is None else samplers,
    max_length=CONTEXT,
    consume=consume,
  )


def choose_samplers(
  recipe: Recipe,
  *,
  temperature: float | None = None,
  top_p: float | None = None,
  repetition_penalty: float | None = None,
  guidance: float | None = None,
  image_guidance: float | None = None,
) -> dict[str, Sampler]:
  """Returns a recipe's samplers with settings in place of theirs; None leaves the default.

  Temperature and top_p are of all samplers but the one that is greedy by rule, the repetition
  penalty of all but the pictures', guidance of pictures alone.
  """
  out = {}
  for name, sampler in recipe.samplers.items():
    changes = {} if name == "greedy" else {"temperature": temperature, "top_p": top_p}
    if name == "image":
      changes |= {"guidance": guidance, "image_guidance": image_guidance}
    else:
      changes["repetition_penalty"] = repetition_penalty
    chosen = {k: v for k, v in changes.items() if v is not None}
    out[name] = dataclasses.replace(sampler, **chosen)
  return out


def response_budget(
  model: Model, task: str, prompt_length: int, max_new_tokens: int | None = None
) -> int:
  """Returns the most ids of a response, see `Recipe.budget`.

  Raises:
    ValueError: if `max_new_tokens` is not positive, or the prompt leaves no room (released; the
      engine checks the paper's).
  """
  if max_new_tokens is not None and max_new_tokens <= 0:
    raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1, or none")
  picture = model.vocabulary.image_length + 2
  return model.recipe.budget(get_task(task), picture, prompt_length, max_new_tokens)


def _decode(model: Model, outputs: list[np.ndarray]) -> list[Response]:
  parts = [read_response(ids, model.vocabulary, model.text) for ids in outputs]
  with_image = [i for i, p in enumerate(parts) if p.image is not None]
  with_speech = [i for i, p in enumerate(parts) if p.speech is not None]
  images, speech = {}, {}
  if with_image:
    codes = np.stack([parts[i].image for i in with_image])
    images = dict(zip(with_image, batching.decode_images(model.image_codec, codes), strict=True))
  if with_speech:
    clips = batching.decode_speech(model.speech_codec, [parts[i].speech for i in with_speech])
    speech = dict(zip(with_speech, clips, strict=True))
  return [
    Response(p.text, images.get(i), speech.get(i), p.transcript, ids)
    for i, (p, ids) in enumerate(zip(parts, outputs, strict=True))
  ]


def _encode(requests, name: str, run) -> dict[int, np.ndarray]:
  members = [i for i, r in enumerate(requests) if getattr(r, name) is not None]
  if not members:
    return {}
  return dict(zip(members, run([getattr(requests[i], name) for i in members]), strict=True))
