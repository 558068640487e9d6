"""Dialogues of several turns: what `dialog_files` reads in, a folder per turn out."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from PIL import Image

from aromni_jax.codecs import audio, batching, image_vq
from aromni_jax.decoding.engine import Engine
from aromni_jax.model import Model
from aromni_jax.prompts import (
  default_instruction,
  make_chat_prompt,
  parse,
  picture_codes,
  read_response,
)
from aromni_jax.sample import Turn
from aromni_jax.serving.dialog_files import Dialog, UserTurn
from aromni_jax.serving.media import encode_clips, encode_pictures
from aromni_jax.serving.requests import Request, check_codecs, generate_batch, response_budget


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model answered.

  Attributes:
    dialog_id, turn: whom and when. prompt_length: ids of the prompt. tokens: int32[n], its ids.
  """

  dialog_id: str
  turn: int
  prompt_length: int
  tokens: np.ndarray


def answer_dialogs(
  model: Model,
  dialogs: Sequence[Dialog],
  *,
  engine: Engine,
  seed: int = 0,
  batch_size: int = 1,
  max_new_tokens: int | None = None,
) -> Iterator[Answer]:
  """Yields the answers, all first turns, then all second ones and so on.

  Args:
    model, seed, max_new_tokens: as in `requests.generate_batch`.
    engine: what `requests.make_engine` returns for the model.
    dialogs: what `read_dialogs` returns.
    batch_size: dialogues at a time. Each has up to three sequences in the cache.

  Raises:
    FileNotFoundError, ValueError: for media that cannot be read, a text that the model did not
      speak, or a dialogue that has outgrown the context.
  """
  check_codecs(model, "dialogue")
  places = [(d, t) for d, dialog in enumerate(dialogs) for t in range(len(dialog.turns))]
  rounds = sorted(places, key=lambda place: place[1])
  turns = [dialogs[d].turns[t] for d, t in places]
  turns = _user_turns(model, turns, engine, seed, batch_size)
  asked = dict(zip(places, turns, strict=True))
  history: dict[int, list[Turn]] = collections.defaultdict(list)
  while rounds:
    batch = [place for place in rounds[:batch_size] if place[1] == rounds[0][1]]
    rounds = rounds[len(batch) :]
    prompts, budgets = [], []
    for d, t in batch:
      if dialogs[d].turns[t].reset:
        history[d].clear()
      turns = [*history[d], asked[d, t]]
      prompts.append(make_chat_prompt(turns, model.vocabulary, model.text, recipe=model.recipe))
      budgets.append(response_budget(model, "dialogue", len(prompts[-1]), max_new_tokens))
    outputs = engine.generate(
      prompts,
      ["dialogue"] * len(batch),
      max_new_tokens=budgets,
      seed=seed,
      row_ids=[places.index(place) for place in batch],
    )
    for (d, t), prompt, tokens in zip(batch, prompts, outputs, strict=True):
      history[d].append(dataclasses.replace(asked[d, t], reply=tokens))
      logging.info("Answered turn %d of %s.", t, dialogs[d].dialog_id)
      yield Answer(dialogs[d].dialog_id, t, len(prompt), tokens)


def _user_turns(
  model: Model, turns: Sequence[UserTurn], engine: Engine, seed: int, batch_size: int
) -> list[Turn]:
  """Returns the turns as codes; texts are spoken by the model."""
  written = [i for i, turn in enumerate(turns) if turn.text]
  heard = [i for i, turn in enumerate(turns) if turn.wav_path]
  speech = {}
  if written:
    requests = [Request("text_to_speech", text=turns[i].text) for i in written]
    responses = generate_batch(model, requests, engine=engine, seed=seed, batch_size=batch_size)
    for i, response in zip(written, responses, strict=True):
      speech[i] = read_response(response.tokens, model.vocabulary, model.text).speech
      if speech[i] is None:
        raise ValueError(f"the model did not speak {turns[i].text!r}; record it and set wav_path")
  if heard:
    clips = encode_clips(model, [turns[i].wav_path for i in heard])
    speech |= dict(zip(heard, clips, strict=True))
  out = []
  for i, turn in enumerate(turns):
    head = _silence(model, turn.silence_head_sec, turn.silence_head_tokens)
    tail = _silence(model, turn.silence_tail_sec, turn.silence_tail_tokens)
    pictures = [image_vq.read_picture(p).convert("RGB") for p in turn.image_paths]
    images = encode_pictures(model, pictures) if pictures else ()
    words = turn.user_append_text
    words = default_instruction("dialogue", model.recipe) if words is None else words
    out.append(Turn(np.concatenate([head, speech[i], tail]), tuple(images), words))
  return out


def _silence(model: Model, seconds: float, tokens: int | None) -> np.ndarray:
  """Returns the codes of silence, int32[tokens], or of so many seconds without `tokens`."""
  config = model.speech_codec.config
  samples = round(seconds * config.sample_rate) if tokens is None else tokens * config.hop
  if not samples:
    return np.zeros(0, np.int32)
  return encode_clips(model, [np.zeros(samples, np.float32)])[0]


def write_answer(model: Model, answer: Answer, out: pathlib.Path) -> None:
  """Writes `out/<dialog_id>/turn_<n>/`: text.txt, image_<n>.png, speech_<n>.wav, meta.json.

  Every run of speech is a file of its own, as loud as it can be.
  """
  folder = out / answer.dialog_id / f"turn_{answer.turn}"
  folder.mkdir(parents=True, exist_ok=True)
  v, parts = model.vocabulary, read_response(answer.tokens, model.vocabulary, model.text)
  segments = parse(answer.tokens, v)
  files: dict[str, list[str]] = {"images": [], "speech": []}
  codes = [picture_codes(s.ids, v) for s in segments if s.kind == "image"]
  if codes:
    for i, pixels in enumerate(batching.decode_images(model.image_codec, np.stack(codes))):
      files["images"].append(f"image_{i}.png")
      Image.fromarray(pixels).save(folder / files["images"][-1])
  clips = [v.speech_codes(s.ids) for s in segments if s.kind == "speech"]
  for i, wav in enumerate(batching.decode_speech(model.speech_codec, clips) if clips else ()):
    files["speech"].append(f"speech_{i}.wav")
    loud = wav / max(np.abs(wav).max(), 1e-8)
    rate = model.speech_codec.config.sample_rate
    audio.write_wav(folder / files["speech"][-1], loud.astype(np.float32), rate)
  (folder / "text.txt").write_text((parts.text or "") + "\n")
  meta = {"dialog_id": answer.dialog_id, "turn": answer.turn, "recipe": model.recipe.name}
  meta |= {"text": parts.text, "transcript": parts.transcript, **files}
  meta |= {"prompt_length": answer.prompt_length, "tokens": answer.tokens.tolist()}
  (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
