"""Files of dialogues in AR-Omni's chat schema.

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
from typing import Any

from absl import logging

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
