"""Dialogues from files, answered by the shipped model."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from aromni_jax.codecs import audio, batching
from aromni_jax.model import load_model
from aromni_jax.prompts import make_chat_prompt
from aromni_jax.sample import Turn
from aromni_jax.serving import dialog
from aromni_jax.serving.dialog import answer_dialogs, write_answer
from aromni_jax.serving.dialog_files import Dialog, UserTurn, read_dialogs
from aromni_jax.serving.requests import Request, choose_samplers, generate_batch, make_engine

TURN = {"wav_path": "a.wav"}


def write(path, data):
  path.write_text(data if isinstance(data, str) else json.dumps(data))
  return path


def test_every_form_of_the_file(tmp_path):
  turn = TURN | {"image_paths": ["a.png"], "user_append_text": "look", "reset": True}
  turn |= {"speaker_wav": "ref.wav"}  # CosyVoice's; the official example has it
  want = UserTurn(str(tmp_path / "a.wav"), None, (str(tmp_path / "a.png"),), "look", True)
  one = {"dialog_id": "x", "turns": [turn, {"text": "hello"}]}
  file = tmp_path / "d.json"
  assert read_dialogs(write(file, one)) == [Dialog("x", (want, UserTurn(text="hello")))]
  two = [one, {"turns": [TURN]}]
  names = [d.dialog_id for d in read_dialogs(write(file, two))]
  assert names == ["x", "dialog_1"]
  assert read_dialogs(write(file, [turn])) == [Dialog("dialog_0", (want,))]
  lines = "\n".join(json.dumps(d) for d in two)
  for name in ("d.jsonl", "d.json"):
    assert [d.dialog_id for d in read_dialogs(write(tmp_path / name, lines))] == names


def test_every_field_of_a_turn(tmp_path):
  sounds = [
    {"audio_path": "b.wav", "silence_head_sec": 0.5, "silence_tail_sec": 1},
    {"wav_path": "/c.wav", "silence_head_tokens": 3, "silence_tail_tokens": 0},
    {"wav_path": "c.wav", "text": "hello", "silence_head_sec": None},
  ]
  (read,) = read_dialogs(write(tmp_path / "d.json", sounds))
  assert read.turns == (
    UserTurn(str(tmp_path / "b.wav"), silence_head_sec=0.5, silence_tail_sec=1),
    UserTurn("/c.wav", silence_head_tokens=3, silence_tail_tokens=0),
    UserTurn(text="hello"),
  )
  names = ["x", "x", "y", None, "y", "x"]
  turns = [TURN | {"dialog_id": name} for name in names]
  (read,) = read_dialogs(write(tmp_path / "d.json", {"dialog_id": "x", "turns": turns}))
  assert [t.reset for t in read.turns] == [False, False, True, False, False, True]


@pytest.mark.parametrize(
  "data, message",
  [
    ("{", "d.json is not JSON"),
    ([], "expected a dialogue, a list of dialogues or a list of turns"),
    ([TURN, 3], "expected a dialogue, a list of dialogues or a list of turns"),
    ({"turns": []}, "dialogue 0: turns must be a list with at least one turn"),
    ({"turns": [TURN], "name": "x"}, r"dialogue 0: unknown fields \['name'\]"),
    ('{"turns": []}\n{"turns": 3', "d.json is not JSON .*nor JSON lines"),
    ([TURN, {"reset": True}], "dialogue 0, turn 1: expected wav_path or text"),
    ([TURN | {"volume": 1}], r"unknown fields \['volume'\]"),
    ([{"wav_path": 3}], "turn 0: wav_path is 3; expected a string"),
    ([TURN | {"silence_head_sec": -1}], "turn 0: silence_head_sec is -1; expected a number >= 0"),
    ([TURN | {"silence_tail_sec": "1"}], "silence_tail_sec is '1'; expected a number >= 0"),
    ([TURN | {"silence_tail_tokens": 1.5}], "silence_tail_tokens is 1.5; expected an integer >= 0"),
    ([TURN | {"image_paths": "a.png"}], "image_paths must be a list of paths"),
    ({"dialog_id": "../x", "turns": [TURN]}, "may not have slashes"),
    ([{"dialog_id": "x", "turns": [TURN]}] * 2, "2 dialogues have the dialog_id 'x'"),
  ],
)
def test_wrong_files_are_named(tmp_path, data, message):
  with pytest.raises(ValueError, match=message):
    read_dialogs(write(tmp_path / "d.json", data))


@pytest.mark.slow
def test_dialogues_are_answered_and_written(tmp_path):
  model = load_model()
  (spoken,) = generate_batch(model, [Request("text_to_speech", text="two dogs on blue")])
  audio.write_wav(tmp_path / "a.wav", spoken.speech, 16000)
  Image.new("RGB", (80, 70), "red").save(tmp_path / "a.png")
  heard = UserTurn(wav_path=str(tmp_path / "a.wav"), user_append_text="Draw it.")
  dialogs = [
    Dialog("x", (heard, dataclasses.replace(heard, image_paths=(str(tmp_path / "a.png"),)))),
    Dialog("y", (UserTurn(text="one egg on red"), dataclasses.replace(heard, reset=True))),
  ]
  greedy = choose_samplers(model.recipe, temperature=0.0)
  engine = make_engine(model, greedy)
  with pytest.raises(ValueError, match="max_new_tokens is 0; expected at least 1"):
    next(answer_dialogs(model, dialogs[:1], engine=engine, max_new_tokens=0))
  answers = list(answer_dialogs(model, dialogs, engine=engine))
  together = answer_dialogs(model, dialogs, engine=engine, batch_size=2)
  for one, other in zip(answers, together, strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
  assert [(a.dialog_id, a.turn) for a in answers] == [("x", 0), ("y", 0), ("x", 1), ("y", 1)]
  first, _, second, after_reset = answers
  np.testing.assert_array_equal(after_reset.tokens, first.tokens)
  assert after_reset.prompt_length == first.prompt_length
  turns = dialog._user_turns(model, dialogs[0].turns, engine, 0, 1)
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


@pytest.mark.slow
def test_silence_stands_around_the_speech_and_alpha_is_dropped(tmp_path):
  model = load_model()
  config = model.speech_codec.config
  wav = np.random.default_rng(0).normal(0, 0.1, 20 * config.hop).astype(np.float32)
  audio.write_wav(tmp_path / "a.wav", wav, config.sample_rate)
  upright = np.zeros((70, 80, 3), np.uint8)
  upright[:20], upright[:, :30, 2] = [200, 0, 0], 250
  Image.fromarray(upright).save(tmp_path / "plain.png")
  lying, exif = Image.fromarray(np.rot90(np.dstack([upright, upright[..., :1] * 0]))), Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  lying.save(tmp_path / "clear.png", exif=exif)
  plain = UserTurn(str(tmp_path / "a.wav"), image_paths=(str(tmp_path / "plain.png"),))
  clear = dataclasses.replace(plain, image_paths=(str(tmp_path / "clear.png"),))
  seconds = 2.5 * config.hop / config.sample_rate
  turns = [
    plain,
    dataclasses.replace(clear, silence_head_sec=seconds, silence_tail_sec=2 * seconds),
    dataclasses.replace(clear, silence_head_sec=seconds, silence_head_tokens=0),
    dataclasses.replace(clear, silence_head_tokens=4, silence_tail_tokens=1),
  ]
  said, *others = dialog._user_turns(model, turns, None, 0, 1)
  for turn, head, tail in zip(others, (3, 0, 4), (5, 0, 1), strict=True):
    ends = [
      batching.encode_speech(model.speech_codec, [np.zeros(n * config.hop, np.float32)])
      if n
      else [said.speech[:0]]
      for n in (head, tail)
    ]
    np.testing.assert_array_equal(turn.speech, np.concatenate([*ends[0], said.speech, *ends[1]]))
    np.testing.assert_array_equal(turn.images[0], said.images[0])
