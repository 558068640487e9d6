"""Dialogues from files, answered by the shipped model."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from aromni_jax import dialog, model_dir
from aromni_jax.codecs import audio
from aromni_jax.dialog import Dialog, UserTurn, answer_dialogs, read_dialogs, write_answer
from aromni_jax.inference import Request, choose_samplers, generate_batch, make_engine
from aromni_jax.prompts import Turn, make_chat_prompt

TURN = {"wav_path": "a.wav"}


def write(path, data):
  path.write_text(data if isinstance(data, str) else json.dumps(data))
  return path


def test_every_form_of_the_file(tmp_path):
  turn = TURN | {"image_paths": ["a.png"], "user_append_text": "look", "reset": True}
  turn |= {"speaker_wav": "ref.wav"}  # CosyVoice's; the official example has it
  want = UserTurn("a.wav", None, ("a.png",), "look", True)
  one = {"dialog_id": "x", "turns": [turn, {"text": "hello"}]}
  file = tmp_path / "d.json"
  assert read_dialogs(write(file, one)) == [Dialog("x", (want, UserTurn(text="hello")))]
  two = [one, {"turns": [TURN]}]
  names = [d.dialog_id for d in read_dialogs(write(file, two))]
  assert names == ["x", "dialog_1"]
  assert read_dialogs(write(file, [turn])) == [Dialog("dialog_0", (want,))]
  lines = "\n".join(json.dumps(d) for d in two)
  assert [d.dialog_id for d in read_dialogs(write(tmp_path / "d.jsonl", lines))] == names


@pytest.mark.parametrize(
  "data, message",
  [
    ("{", "d.json is not JSON"),
    ([], "expected a dialogue, a list of dialogues or a list of turns"),
    ([TURN, 3], "expected a dialogue, a list of dialogues or a list of turns"),
    ({"turns": []}, "dialogue 0: turns must be a list with at least one turn"),
    ({"turns": [TURN], "name": "x"}, r"dialogue 0: unknown fields \['name'\]"),
    ([TURN, {"reset": True}], "dialogue 0, turn 1: expected either wav_path or text"),
    ([TURN | {"text": "a"}], "turn 0: expected either wav_path or text"),
    ([TURN | {"silence_head_sec": 1}], r"unknown fields \['silence_head_sec'\]"),
    ([TURN | {"image_paths": "a.png"}], "image_paths must be a list of paths"),
    ({"dialog_id": "../x", "turns": [TURN]}, "may not have slashes"),
    ([{"dialog_id": "x", "turns": [TURN]}] * 2, "2 dialogues have the dialog_id 'x'"),
  ],
)
def test_wrong_files_are_named(tmp_path, data, message):
  with pytest.raises(ValueError, match=message):
    read_dialogs(write(tmp_path / "d.json", data))


def test_dialogues_are_answered_and_written(tmp_path):
  model = model_dir.load_model()
  (spoken,) = generate_batch(model, [Request("text_to_speech", text="two dogs on blue")])
  audio.write_wav(tmp_path / "a.wav", spoken.speech, 16000)
  Image.new("RGB", (80, 70), "red").save(tmp_path / "a.png")
  heard = UserTurn(wav_path=str(tmp_path / "a.wav"), user_append_text="Draw it.")
  dialogs = [
    Dialog("x", (heard, dataclasses.replace(heard, image_paths=(str(tmp_path / "a.png"),)))),
    Dialog("y", (UserTurn(text="one egg on red"), dataclasses.replace(heard, reset=True))),
  ]
  greedy = choose_samplers(model.recipe, temperature=0.0)
  answers = list(answer_dialogs(model, dialogs, engine=make_engine(model, greedy)))
  assert [(a.dialog_id, a.turn) for a in answers] == [("x", 0), ("y", 0), ("x", 1), ("y", 1)]
  first, _, second, after_reset = answers
  np.testing.assert_array_equal(after_reset.tokens, first.tokens)
  assert after_reset.prompt_length == first.prompt_length
  turns = dialog._user_turns(model, dialogs[0].turns, 0)
  turns[0] = dataclasses.replace(turns[0], reply=first.tokens)
  assert isinstance(turns[1], Turn) and len(turns[1].images) == 1
  prompt = make_chat_prompt(turns, model.vocabulary, model.text, recipe=model.recipe)
  assert second.prompt_length == len(prompt) > first.prompt_length + len(first.tokens)
  for answer in answers:
    write_answer(model, answer, tmp_path / "out")
  folder = tmp_path / "out/x/turn_0"
  names = ["image_0.png", "meta.json", "speech_0.wav", "text.txt"]
  assert sorted(p.name for p in folder.iterdir()) == names
  meta = json.loads((folder / "meta.json").read_text())
  assert meta["tokens"] == first.tokens.tolist() and meta["transcript"]
  assert meta["images"] == ["image_0.png"] and meta["speech"] == ["speech_0.wav"]
  assert (folder / "text.txt").read_text().strip() == meta["text"]
  assert Image.open(folder / "image_0.png").size == (64, 64)
  assert np.abs(soundfile.read(folder / "speech_0.wav")[0]).max() > 0.99
