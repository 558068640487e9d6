"""The shipped model, used as its users do."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from flax import nnx
from PIL import Image

from aromni_jax.codecs import audio, image_vq
from aromni_jax.data_pipelines import espeak
from aromni_jax.decoding.engine import Engine
from aromni_jax.model import load_model
from aromni_jax.pictotalk import world
from aromni_jax.recipes import PAPER, RELEASED
from aromni_jax.serving.media import write_response
from aromni_jax.serving.requests import (
  Request,
  choose_samplers,
  generate_batch,
  make_prompts,
  response_budget,
)
from aromni_jax.tasks import TASKS

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "two dogs on blue"  # a training caption: this is no place to measure quality


@pytest.fixture(scope="module")
def model():
  return load_model()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  Image.fromarray(world.draw_scene(world.Caption(2, "dog", "blue"), 0)).save(folder / "dogs.png")
  (clip,) = espeak.synthesise("f5", [TEXT])
  audio.write_wav(folder / "dogs.wav", clip.astype(np.float32) / 32768, 16000)
  return {"text": TEXT, "image": folder / "dogs.png", "speech": folder / "dogs.wav"}


@pytest.fixture(scope="module")
def responses(model, files):
  requests = [Request(t, **{n: files[n] for n in task.inputs}) for t, task in TASKS.items()]
  return dict(zip(TASKS, generate_batch(model, requests), strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_its_parts(responses, task):
  response = responses[task]
  for part in ("text", "image", "speech"):
    assert (getattr(response, part) is not None) == (part in TASKS[task].outputs)
  assert (response.transcript is not None) == (task == "dialogue")
  if response.image is not None:
    assert response.image.shape == (64, 64, 3) and response.image.dtype == np.uint8
  if response.speech is not None:
    assert 0.2 < len(response.speech) / 16000 < 6 and np.abs(response.speech).max() > 0.05


def test_the_shipped_model_hears_and_says_what_it_was_trained_on(model, responses):
  assert responses["speech_to_text"].text == TEXT
  assert responses["dialogue"].transcript == TEXT
  said = responses["text_to_speech"].speech
  (heard,) = generate_batch(model, [Request("speech_to_text", speech=said)])
  assert heard.text == TEXT


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_pictures_of_any_mode_and_size(model, files, tmp_path, mode):
  path = tmp_path / "x.png"
  Image.open(files["image"]).convert(mode).resize((90, 40)).save(path)
  (prompt,) = make_prompts(model, [Request("image_caption", image=path)])
  kinds = model.vocabulary.modality_of(prompt)
  assert (kinds == 1).sum() == model.vocabulary.image_length


@pytest.mark.parametrize("subtype, channels, rate", [("PCM_U8", 2, 8000), ("FLOAT", 1, 48000)])
def test_sounds_of_any_kind(model, files, tmp_path, subtype, channels, rate):
  wav = audio.resample(soundfile.read(files["speech"])[0], 16000, rate)
  soundfile.write(tmp_path / "x.wav", np.stack([wav] * channels, 1), rate, subtype=subtype)
  (a,), (b,) = (
    make_prompts(model, [Request("speech_to_text", speech=p)])
    for p in (tmp_path / "x.wav", files["speech"])
  )
  assert len(a) == len(b)


def test_responses_are_written_to_files_and_folders(responses, tmp_path):
  write_response(responses["dialogue"], tmp_path / "folder", 16000)
  assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
    "image.png",
    "speech.wav",
    "text.txt",
  ]
  write_response(responses["text_to_speech"], tmp_path / "x.wav", 16000)
  assert soundfile.info(tmp_path / "x.wav").samplerate == 16000


@pytest.mark.parametrize(
  "request_, message",
  [
    (Request("sing", text="a"), "task 'sing' does not exist; expected one of"),
    (Request("text_to_image"), "text_to_image takes text; got nothing"),
    (Request("speech_to_text", text="a"), "speech_to_text takes speech; got text"),
    (Request("text_to_image", text=""), "needs as input text, but it is empty"),
    (Request("image_caption", image="none.png"), "none.png"),
    (Request("speech_to_text", speech="none.wav"), "sound none.wav does not exist"),
  ],
)
def test_wrong_requests_are_named(model, request_, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    generate_batch(model, [request_])


def test_unreadable_files_are_named(model, tmp_path):
  broken = tmp_path / "broken"
  for content in (b"", b"not a picture or a sound"):
    broken.write_bytes(content)
    for request in (
      Request("image_caption", image=broken),
      Request("speech_to_text", speech=broken),
    ):
      with pytest.raises(ValueError, match="broken"):
        generate_batch(model, [request])


def test_a_prompt_longer_than_the_cache_is_refused(model):
  with pytest.raises(ValueError, match="exceed the cache of 4096 positions; shorten the input"):
    generate_batch(model, [Request("text_to_image", text="dogs " * 5000)])


@pytest.fixture(scope="module")
def released(model):
  return dataclasses.replace(model, recipe=RELEASED)


def test_released_budgets(released):
  for task, prompt, given, want in (
    ("image_caption", 100, None, 128),
    ("image_caption", 4000, None, 96),
    ("text_to_speech", 30, None, 1024),
    ("text_to_speech", 30, 50, 50),
    ("speech_to_text", 300, None, 724),
    ("speech_to_text", 300, 1500, 1500),
    ("dialogue", 300, None, 3796),
    ("text_to_image", 300, None, 65),
  ):
    assert response_budget(released, task, prompt, given) == want
  with pytest.raises(
    ValueError, match="a prompt of 1024 tokens leaves none of 1024 .* set max_new"
  ):
    response_budget(released, "speech_to_text", 1024)
  with pytest.raises(ValueError, match="a prompt of 4096 tokens leaves none of 4096"):
    response_budget(released, "dialogue", 4096)


def test_every_row_has_its_own_budget(released, files, monkeypatch):
  seen = {}

  def generate(self, prompts, tasks, *, max_new_tokens, **_):
    seen.update(zip(tasks, max_new_tokens, strict=True))
    return [np.array([released.vocabulary.eom])] * len(prompts)

  monkeypatch.setattr(Engine, "generate", generate)
  requests = [Request("image_caption", image=files["image"]), Request("text_to_speech", text=TEXT)]
  responses = generate_batch(released, requests)
  assert seen == {"image_caption": 128, "text_to_speech": 1024}
  assert responses[1].speech is None and responses[1].text is None


def test_settings_replace_those_of_the_right_samplers():
  assert choose_samplers(RELEASED) == RELEASED.samplers
  chosen = choose_samplers(
    RELEASED, temperature=0.5, repetition_penalty=1.0, guidance=2.0, image_guidance=3.0
  )
  assert [s.temperature for s in chosen.values()] == [0.0, 0.5, 0.5]
  assert [s.repetition_penalty for s in chosen.values()] == [1.0, 1.0, 1.0]
  assert [(s.guidance, s.image_guidance) for s in chosen.values()][::2] == [(1, None), (2.0, 3.0)]
  cold = choose_samplers(PAPER, temperature=0.0, top_p=0.5)
  assert [(s.temperature, s.top_p) for s in cold.values()] == [(0.0, 0.5)] * 3


@pytest.mark.slow
def test_released_rules_with_a_model_that_was_trained_otherwise(released, files):
  requests = [Request(t, **{n: files[n] for n in task.inputs}) for t, task in TASKS.items()]
  responses = generate_batch(released, requests, max_new_tokens=100)
  for request, response in zip(requests, responses, strict=True):
    if TASKS[request.task].outputs == ("image",):
      assert response.image is not None and len(response.tokens) == 65
    assert 0 < len(response.tokens) <= 100
  (alone,) = generate_batch(released, requests[:1], max_new_tokens=100)
  np.testing.assert_array_equal(alone.tokens, responses[0].tokens)


def aromni(*args):
  return subprocess.run(
    [sys.executable, "-m", "aromni_jax.cli", "generate", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_command_line(files, tmp_path):
  done = aromni("--task=speech_to_text", f"--speech={files['speech']}")
  assert done.returncode == 0 and done.stdout.strip() == TEXT, done.stderr[-1000:]
  out = tmp_path / "x.png"
  done = aromni("--task=text_to_image", f"--text={TEXT}", f"--out={out}")
  assert done.returncode == 0 and Image.open(out).size == (64, 64)


@pytest.mark.slow
def test_command_line_errors():
  done = aromni("--task=text_to_image", "--text=a")
  assert done.returncode != 0 and "--out is missing: text_to_image gives a .png" in done.stderr
  done = aromni("--task=text_to_image", "--text=a", "--out=x.wav")
  assert done.returncode != 0 and "needs a .png file or a folder" in done.stderr
  done = aromni("--task=image_caption", "--image=none.png")
  assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
  assert "Traceback" not in done.stderr
  done = aromni("--task=sing")
  assert done.returncode != 0 and "image_caption" in done.stderr
  done = aromni("--out=x")
  assert done.returncode != 0 and "expected --task or --dialog" in done.stderr
  done = aromni("--dialog=x.json", "--out=x.wav")
  assert done.returncode != 0 and "--dialog needs a folder" in done.stderr


@pytest.mark.slow
def test_missing_codecs_are_named_before_anything_is_computed(model):
  mute = dataclasses.replace(model, codecs={"image_codec": model.image_codec})
  with pytest.raises(ValueError, match="has no speech_codec. Convert with --wavtokenizer"):
    generate_batch(mute, [Request("text_to_speech", text="two dogs")])
  (caption,) = generate_batch(
    mute, [Request("image_caption", image=np.zeros((64, 64, 3), np.uint8))]
  )
  assert caption.text
  config = dataclasses.replace(model.image_codec.config, has_decoder=False)
  reader = dataclasses.replace(
    model, codecs={"image_codec": image_vq.ImageVQ(config, rngs=nnx.Rngs(0))}
  )
  with pytest.raises(ValueError, match="no pixel decoder, and text_to_image draws; convert with"):
    generate_batch(reader, [Request("text_to_image", text="two dogs")])
