"""Dialogues of several turns: a file of AR-Omni's chat schema in, a folder per turn out.

The file holds one dialogue `{"dialog_id": ..., "turns": [...]}`, a list of them, a list of turns,
or (.jsonl) one dialogue a line. A turn has `wav_path` or `text`, and may have `image_paths`,
`user_append_text` (what to do, in words) and `reset` (true forgets the turns before it). A `text`
is spoken by the model itself, by its text_to_speech; AR-Omni's script uses CosyVoice there, so
`speaker_wav` and `prompt_text` have no effect here.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from aromni_jax import model_dir
from aromni_jax.codecs import audio
from aromni_jax.decoding.engine import Engine
from aromni_jax.inference import (
  Request,
  check_codecs,
  encode_clips,
  encode_pictures,
  generate_batch,
  response_budget,
)
from aromni_jax.model_dir import Model
from aromni_jax.prompts import (
  Turn,
  default_instruction,
  make_chat_prompt,
  parse,
  picture_codes,
  read_response,
)

_COSYVOICE = {"speaker_wav", "prompt_text"}


@dataclasses.dataclass(frozen=True)
class UserTurn:
  """What the user says in one turn; fields as in the file, exactly one of the first two."""

  wav_path: str | None = None
  text: str | None = None
  image_paths: tuple[str, ...] = ()
  user_append_text: str | None = None
  reset: bool = False


@dataclasses.dataclass(frozen=True)
class Dialog:
  """One dialogue: its name, which becomes a folder, and its turns."""

  dialog_id: str
  turns: tuple[UserTurn, ...]


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


def read_dialogs(path: str | pathlib.Path) -> list[Dialog]:
  """Returns the dialogues of a file.

  Raises:
    FileNotFoundError: if it does not exist.
    ValueError: if it is not of the schema; the message names the dialogue, turn and field.
  """
  path = pathlib.Path(path)
  text = path.read_text()
  try:
    lines = [line for line in text.splitlines() if line.strip()]
    data = [json.loads(x) for x in lines] if path.suffix == ".jsonl" else json.loads(text)
  except json.JSONDecodeError as e:
    raise ValueError(f"{path} is not JSON: {e}") from e
  data = [data] if isinstance(data, dict) else data
  if not isinstance(data, list) or not data or not all(isinstance(x, dict) for x in data):
    raise ValueError(f"{path}: expected a dialogue, a list of dialogues or a list of turns")
  if not any("turns" in x for x in data):
    data = [{"turns": data}]
  dialogs = [_dialog(x, f"{path}: dialogue {i}", f"dialog_{i}") for i, x in enumerate(data)]
  repeated = collections.Counter(d.dialog_id for d in dialogs).most_common(1)[0]
  if repeated[1] > 1:
    raise ValueError(f"{path}: {repeated[1]} dialogues have the dialog_id {repeated[0]!r}")
  return dialogs


def _dialog(data: dict[str, Any], where: str, name: str) -> Dialog:
  _check_keys(data, {"dialog_id", "turns"}, where)
  name = str(data.get("dialog_id", name))
  if pathlib.Path(name).name != name:
    raise ValueError(f"{where}: dialog_id {name!r} names a folder; it may not have slashes")
  turns = data.get("turns")
  if not isinstance(turns, list) or not turns:
    raise ValueError(f"{where}: turns must be a list with at least one turn")
  return Dialog(name, tuple(_turn(t, f"{where}, turn {i}") for i, t in enumerate(turns)))


def _turn(data: Any, where: str) -> UserTurn:
  if not isinstance(data, dict):
    raise ValueError(f"{where}: expected an object with wav_path or text")
  _check_keys(data, {f.name for f in dataclasses.fields(UserTurn)}, where)
  if bool(data.get("wav_path")) == bool(data.get("text")):
    raise ValueError(f"{where}: expected either wav_path or text")
  images = data.get("image_paths") or ()
  if isinstance(images, str) or not all(isinstance(x, str) for x in images):
    raise ValueError(f"{where}: image_paths must be a list of paths")
  return UserTurn(
    data.get("wav_path"),
    data.get("text"),
    tuple(images),
    data.get("user_append_text"),
    bool(data.get("reset", False)),
  )


def _check_keys(data: dict[str, Any], known: set[str], where: str) -> None:
  if unknown := sorted(set(data) - known - _COSYVOICE):
    raise ValueError(f"{where}: unknown fields {unknown}; expected some of {sorted(known)}")
  if ignored := sorted(set(data) & _COSYVOICE):
    logging.warning("%s: %s are for CosyVoice and have no effect here.", where, ignored)


def answer_dialogs(
  model: Model,
  dialogs: Sequence[Dialog],
  *,
  engine: Engine,
  seed: int = 0,
  batch_size: int = 8,
  max_new_tokens: int | None = None,
) -> Iterator[Answer]:
  """Yields the answers, all first turns, then all second ones and so on.

  Args:
    model, seed, max_new_tokens: as in `inference.generate_batch`.
    engine: what `inference.make_engine` returns for the model.
    dialogs: what `read_dialogs` returns.
    batch_size: dialogues at a time.

  Raises:
    FileNotFoundError, ValueError: for media that cannot be read, a text that the model did not
      speak, or a dialogue that has outgrown the context.
  """
  check_codecs(model, "dialogue")
  places = [(d, t) for d, dialog in enumerate(dialogs) for t in range(len(dialog.turns))]
  rounds = sorted(places, key=lambda place: place[1])
  turns = _user_turns(model, [dialogs[d].turns[t] for d, t in places], engine, seed)
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


def _user_turns(model: Model, turns: Sequence[UserTurn], engine: Engine, seed: int) -> list[Turn]:
  """Returns the turns as codes; texts are spoken by the model."""
  written = [i for i, turn in enumerate(turns) if turn.text]
  heard = [i for i, turn in enumerate(turns) if turn.wav_path]
  speech = {}
  if written:
    requests = [Request("text_to_speech", text=turns[i].text) for i in written]
    responses = generate_batch(model, requests, engine=engine, seed=seed)
    for i, response in zip(written, responses, strict=True):
      speech[i] = read_response(response.tokens, model.vocabulary, model.text).speech
      if speech[i] is None:
        raise ValueError(f"the model did not speak {turns[i].text!r}; record it and set wav_path")
  if heard:
    clips = encode_clips(model, [turns[i].wav_path for i in heard])
    speech |= dict(zip(heard, clips, strict=True))
  out = []
  for i, turn in enumerate(turns):
    images = encode_pictures(model, list(turn.image_paths)) if turn.image_paths else ()
    words = turn.user_append_text
    words = default_instruction("dialogue", model.recipe) if words is None else words
    out.append(Turn(speech[i], tuple(images), words))
  return out


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
    for i, pixels in enumerate(model_dir.decode_images(model.image_codec, np.stack(codes))):
      files["images"].append(f"image_{i}.png")
      Image.fromarray(pixels).save(folder / files["images"][-1])
  clips = [v.speech_codes(s.ids) for s in segments if s.kind == "speech"]
  for i, wav in enumerate(model_dir.decode_speech(model.speech_codec, clips) if clips else ()):
    files["speech"].append(f"speech_{i}.wav")
    loud = wav / max(np.abs(wav).max(), 1e-8)
    rate = model.speech_codec.config.sample_rate
    audio.write_wav(folder / files["speech"][-1], loud.astype(np.float32), rate)
  (folder / "text.txt").write_text((parts.text or "") + "\n")
  meta = {"dialog_id": answer.dialog_id, "turn": answer.turn, "recipe": model.recipe}
  meta |= {"text": parts.text, "transcript": parts.transcript, **files}
  meta |= {"prompt_length": answer.prompt_length, "tokens": answer.tokens.tolist()}
  (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
