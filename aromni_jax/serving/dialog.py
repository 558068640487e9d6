"""Dialogues of several turns: a file of AR-Omni's chat schema in, a folder per turn out.

The file holds one dialogue `{"dialog_id": ..., "turns": [...]}`, a list of them, a list of turns,
or one of these objects a line. A turn has `wav_path` (or `audio_path`) or `text`, which wins, and
may have `image_paths`, `user_append_text` (what to do, in words), silence around the speech
(`silence_head_sec`, `silence_tail_sec`, or ids, `silence_head_tokens`, `silence_tail_tokens`),
`reset` (true forgets the turns before it) and a `dialog_id`, of which a new one is a reset.
Relative paths begin at the folder of the file. A `text` is spoken by the model itself, by its
text_to_speech; AR-Omni's script uses CosyVoice there, so `speaker_wav` and `prompt_text` have no
effect here. As in that script, pictures lose their alpha instead of being laid on white.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from aromni_jax import model_dir
from aromni_jax.codecs import audio, image_vq
from aromni_jax.decoding.engine import Engine
from aromni_jax.model_dir import Model
from aromni_jax.prompts import (
  Turn,
  default_instruction,
  make_chat_prompt,
  parse,
  picture_codes,
  read_response,
)
from aromni_jax.serving.requests import (
  Request,
  check_codecs,
  encode_clips,
  encode_pictures,
  generate_batch,
  response_budget,
)

_COSYVOICE = {"speaker_wav", "prompt_text"}
_SILENCE = {f"silence_{at}_{unit}" for at in ("head", "tail") for unit in ("sec", "tokens")}
_TURN = _SILENCE | {
  *("wav_path", "audio_path", "text", "image_paths", "user_append_text", "reset", "dialog_id")
}


@dataclasses.dataclass(frozen=True)
class UserTurn:
  """What the user says in one turn; fields as in the file, exactly one of the first two.

  Silence is put before and after the speech, in seconds, or in ids if these are given.
  """

  wav_path: str | None = None
  text: str | None = None
  image_paths: tuple[str, ...] = ()
  user_append_text: str | None = None
  reset: bool = False
  silence_head_sec: float = 0.0
  silence_tail_sec: float = 0.0
  silence_head_tokens: int | None = None
  silence_tail_tokens: int | None = None


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
  data = _read_json(path)
  data = [data] if isinstance(data, dict) else data
  if not isinstance(data, list) or not data or not all(isinstance(x, dict) for x in data):
    raise ValueError(f"{path}: expected a dialogue, a list of dialogues or a list of turns")
  if not any("turns" in x for x in data):
    data = [{"turns": data}]
  dialogs = [
    _dialog(x, f"{path}: dialogue {i}", f"dialog_{i}", path.parent) for i, x in enumerate(data)
  ]
  repeated = collections.Counter(d.dialog_id for d in dialogs).most_common(1)[0]
  if repeated[1] > 1:
    raise ValueError(f"{path}: {repeated[1]} dialogues have the dialog_id {repeated[0]!r}")
  return dialogs


def _read_json(path: pathlib.Path) -> Any:
  """Returns what the file holds: one value, or a list of one value a line."""
  text = path.read_text()
  try:
    return json.loads(text)
  except json.JSONDecodeError as whole:
    try:
      return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as e:
      raise ValueError(f"{path} is not JSON ({whole}), nor JSON lines ({e.doc[:40]!r}: {e})") from e


def _dialog(data: dict[str, Any], where: str, name: str, folder: pathlib.Path) -> Dialog:
  _check_keys(data, {"dialog_id", "turns"}, where)
  name = str(data.get("dialog_id", name))
  if pathlib.Path(name).name != name:
    raise ValueError(f"{where}: dialog_id {name!r} names a folder; it may not have slashes")
  turns = data.get("turns")
  if not isinstance(turns, list) or not turns:
    raise ValueError(f"{where}: turns must be a list with at least one turn")
  out, current = [], data.get("dialog_id")
  for i, turn in enumerate(turns):
    out.append(_turn(turn, f"{where}, turn {i}", folder))
    if turn.get("dialog_id") not in (None, current):
      current = turn["dialog_id"]
      out[-1] = dataclasses.replace(out[-1], reset=True)
  return Dialog(name, tuple(out))


def _turn(data: Any, where: str, folder: pathlib.Path) -> UserTurn:
  if not isinstance(data, dict):
    raise ValueError(f"{where}: expected an object with wav_path or text")
  _check_keys(data, _TURN, where)
  for name in ("wav_path", "audio_path", "text", "user_append_text"):
    if not isinstance(data.get(name), str | None):
      raise ValueError(f"{where}: {name} is {data[name]!r}; expected a string")
  text, wav = data.get("text") or None, data.get("wav_path") or data.get("audio_path")
  if not text and not wav:
    raise ValueError(f"{where}: expected wav_path or text")
  images = data.get("image_paths") or ()
  if isinstance(images, str) or not all(isinstance(x, str) for x in images):
    raise ValueError(f"{where}: image_paths must be a list of paths")
  silence = {name: data[name] for name in sorted(_SILENCE) if data.get(name) is not None}
  for name, value in silence.items():
    kind, words = (int, "an integer") if name.endswith("tokens") else (int | float, "a number")
    if not isinstance(value, kind) or not 0 <= value < math.inf:
      raise ValueError(f"{where}: {name} is {value!r}; expected {words} >= 0")
  return UserTurn(
    None if text else str(folder / wav),
    text,
    tuple(str(folder / x) for x in images),
    data.get("user_append_text"),
    bool(data.get("reset", False)),
    **silence,
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
  batch_size: int = 1,
  max_new_tokens: int | None = None,
) -> Iterator[Answer]:
  """Yields the answers, all first turns, then all second ones and so on.

  Args:
    model, seed, max_new_tokens: as in `inference.generate_batch`.
    engine: what `inference.make_engine` returns for the model.
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
