"""Requests of any task, text, pictures or sound in and out, answered by a model in batches."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from PIL import Image

from aromni_jax import model_dir
from aromni_jax.codecs import audio, image_vq
from aromni_jax.decoding.engine import Engine
from aromni_jax.decoding.sampling import Sampler
from aromni_jax.model_dir import Model
from aromni_jax.prompts import INPUTS, OUTPUTS, Parts, make_prompt, read_response

# How ids are drawn by default. The likeliest picture is an empty background: they are sampled.
SAMPLERS = {
  "text": Sampler(),
  "speech": Sampler(),
  "image": Sampler(temperature=0.2, top_p=0.9, guidance=2.5),
}

# Budget of a response in ids, by what it consists of; a picture's is exact.
_BUDGET = {"text": 64, "speech": 200}


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
    if request.task not in INPUTS:
      raise ValueError(f"task {request.task!r} does not exist; expected one of {', '.join(INPUTS)}")
    given = {n for n in ("text", "image", "speech") if getattr(request, n) is not None}
    if given != set(INPUTS[request.task]):
      raise ValueError(
        f"task {request.task} takes {' and '.join(INPUTS[request.task])}; "
        f"got {' and '.join(sorted(given)) or 'nothing'}"
      )
  images = _encode(requests, "image", lambda x: _encode_images(model, x))
  speech = _encode(requests, "speech", lambda x: _encode_speech(model, x))
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
  samplers: Mapping[str, Sampler] = SAMPLERS,
  max_new_tokens: int | None = None,
) -> list[Response]:
  """Returns the responses in the order of the requests.

  Args:
    model: what `model_dir.load_model` returns, with a decoder.
    requests: of any tasks.
    seed: randomness of the samplers.
    batch_size: requests at a time.
    samplers: "text", "speech", "image" -> sampler.
    max_new_tokens: budget of a response; by default what its parts usually need.
  """
  if model.decoder is None:
    raise ValueError(f"{model.path} has no decoder; train one with aromni train")
  prompts = make_prompts(model, requests)
  engine = Engine(model.decoder, model.vocabulary, samplers=samplers)
  budgets = [max_new_tokens or _budget(model, r.task) for r in requests]
  # Requests that run for about as long go together.
  order = sorted(range(len(requests)), key=lambda i: (budgets[i], requests[i].task, i))
  outputs: dict[int, np.ndarray] = {}
  for start in range(0, len(order), batch_size):
    chosen = order[start : start + batch_size]
    rows = chosen + chosen[:1] * (min(batch_size, len(order)) - len(chosen))  # one batch shape
    ids = engine.generate(
      [prompts[i] for i in rows],
      [requests[i].task for i in rows],
      max_new_tokens=max(budgets[i] for i in rows),
      seed=seed,
      row_ids=rows,
    )
    outputs.update(zip(chosen, ids, strict=False))
    if len(order) > batch_size:
      logging.log_every_n_seconds(logging.INFO, "%d of %d responses", 10, len(outputs), len(order))
  return _decode(model, [outputs[i] for i in range(len(requests))])


def _budget(model: Model, task: str) -> int:
  picture = model.vocabulary.image_length + 2
  parts = OUTPUTS[task] + (("text",) if task == "dialogue" else ())
  return 4 + sum(picture if part == "image" else _BUDGET[part] for part in parts)


def _decode(model: Model, outputs: list[np.ndarray]) -> list[Response]:
  parts = [read_response(ids, model.vocabulary, model.text) for ids in outputs]
  with_image = [i for i, p in enumerate(parts) if p.image is not None]
  with_speech = [i for i, p in enumerate(parts) if p.speech is not None]
  images, speech = {}, {}
  if with_image:
    codes = np.stack([parts[i].image for i in with_image])
    images = dict(zip(with_image, model_dir.decode_images(model.image_codec, codes), strict=True))
  if with_speech:
    clips = model_dir.decode_speech(model.speech_codec, [parts[i].speech for i in with_speech])
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


def _encode_images(model: Model, images: list) -> np.ndarray:
  pictures = [Image.fromarray(x) if isinstance(x, np.ndarray) else x for x in images]
  resolution = model.image_codec.config.resolution
  pixels = np.stack([image_vq.preprocess(p, resolution) for p in pictures])
  return model_dir.encode_images(model.image_codec, pixels, batch_size=min(32, len(pixels)))


def _encode_speech(model: Model, clips: list) -> list[np.ndarray]:
  rate = model.speech_codec.config.sample_rate
  wavs = [x if isinstance(x, np.ndarray) else audio.read_audio(x, rate) for x in clips]
  return model_dir.encode_speech(model.speech_codec, wavs, batch_size=min(16, len(wavs)))


def write_response(response: Response, out: pathlib.Path, sample_rate: int) -> None:
  """Writes the parts of a response to a file of the right suffix, or all into a folder."""
  folder = not out.suffix
  (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
  if response.text is not None and (folder or out.suffix == ".txt"):
    (out / "text.txt" if folder else out).write_text(response.text + "\n")
  if response.image is not None:
    Image.fromarray(response.image).save(out / "image.png" if folder else out)
  if response.speech is not None:
    audio.write_wav(out / "speech.wav" if folder else out, response.speech, sample_rate)
