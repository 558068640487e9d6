"""Jobs run as a user runs them: the console script in an empty folder, from raw data to a report.

Everything that comes out is opened: figures, pictures, sounds, and the page with a parser.
"""

import base64
import html.parser
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from PIL import Image
from tensorboardX.proto import event_pb2

from aromni_jax import model_dir
from aromni_jax.data import token_shards
from aromni_jax.pictotalk import suite, world
from tests import tiny
from tests.test_docs import ROOT, commands, filled

pytestmark = pytest.mark.slow

LIMIT = 2  # captions that are evaluated
# What makes the README's lines small; their other words stay as they are.
SMALLER = {
  "train": [
    *("--config.data.sequence_length=256", "--config.num_steps=4", "--config.log_every=1"),
    *("--config.checkpoint_every=2", "--config.sample_every=4", "--config.max_minutes=0"),
    *("--config.data.shards=data/tokens_tiny", "--config.eval_batches=1"),
    *("--config.model.embed_dim=32", "--config.model.mlp_dim=64", "--config.model.num_layers=1"),
  ],
  "evaluate": ["--config=tiny", f"--limit={LIMIT}", "--examples=1"],
  "report": [],
}


def said(job):
  """The README's first line of a job that takes no released model."""
  (line, *_) = (
    words
    for c in commands()
    if c.page == "README.md" and (words := filled(c)) and words[:2] == ["aromni", job]
    if "models/" not in str(c)
  )
  return line[1:]


class Place:
  """A folder in which jobs run, one after the other."""

  def __init__(self, installed, folder):
    self.installed, self.folder = installed, folder

  def run(self, *words):
    done = self.installed.aromni(*words, cwd=self.folder)
    assert done.returncode == 0, f"aromni {' '.join(words)}\n{done.stdout}{done.stderr}"
    return done

  def readme(self, job):
    return self.run(*said(job), *SMALLER[job])


@pytest.fixture(scope="module")
def place(installed, tmp_path_factory):
  """Has the raw tiny set and its tokens."""
  place = Place(installed, tmp_path_factory.mktemp("place"))
  place.run("build_pictotalk", "--config=tiny")
  place.run("tokenize", "--config=tiny")
  return place


@pytest.fixture(scope="module")
def run(place):
  """The README's training; its folder."""
  place.readme("train")
  (workdir,) = (w.partition("=")[2] for w in said("train") if w.startswith("--workdir="))
  return place.folder / workdir


@pytest.fixture(scope="module")
def evaluated(place, run):
  """The README's evaluation of it: what it printed, its file."""
  done = place.readme("evaluate")
  (out,) = (w.partition("=")[2] for w in said("evaluate") if w.startswith("--out="))
  return done.stdout, place.folder / out


@pytest.fixture(scope="module")
def page(place, evaluated):
  """The README's report."""
  place.readme("report")
  (out,) = (w.partition("=")[2] for w in said("report") if w.startswith("--out="))
  return place.folder / out


def test_raw_sets_are_built_once(place):
  items = suite.load_items(str(place.folder / "data"), "tiny", "test")
  assert {item.caption for item in items} == set(world.captions("tiny", "test"))
  assert items[0].image.shape == (64, 64, 3) and len(items[0].speech["f3"]) > 4000
  files = {p: p.stat().st_mtime_ns for p in (place.folder / "data/picto_talk").rglob("*.*")}
  place.run("build_pictotalk", "--config=tiny")
  assert files == {p: p.stat().st_mtime_ns for p in files}


def test_token_shards_say_what_they_were_made_with(place):
  folder = place.folder / "data/tokens_tiny"
  manifest = json.loads((folder / "manifest.json").read_text())
  info = model_dir.read_info(model_dir.SHIPPED)
  assert manifest["image_codec_fingerprint"] == info["image_codec"]["fingerprint"]
  assert manifest["recipe"] == "paper" and manifest["source"] == "tiny"
  assert manifest["splits"]["train"]["samples"] == 29 * len(world.captions("tiny", "train"))
  done = place.installed.aromni("tokenize", "--config=tiny", cwd=place.folder)
  assert done.returncode == 1 and "tokens_tiny" in done.stderr.splitlines()[-1]
  shards = token_shards.TokenShards(folder, "train", tiny.VOCABULARY)
  assert {len(s.tokens) for s in shards} == set(shards.lengths.tolist())


def test_training_writes_what_running_md_says(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4]
  assert all(np.isfinite(x["loss"]) for x in lines if "loss" in x)
  assert (run / "model/model.json").exists()


def test_samples_while_training_can_be_looked_at(run):
  """Pictures and sounds of the TensorBoard files open; what is missing is logged instead."""
  events = [e for f in (run / "tensorboard").iterdir() for e in read_events(f)]
  kinds = {v.tag: v for e in events if e.step == 4 for v in e.summary.value}
  pictures = [v.image for v in kinds.values() if v.HasField("image")]
  sounds = [v.audio for v in kinds.values() if v.HasField("audio")]
  assert pictures and sounds
  for picture in pictures:
    assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (64, 64)
  for sound in sounds:
    wave, rate = soundfile.read(io.BytesIO(sound.encoded_audio_string))
    assert len(wave) > 0 and rate == sound.sample_rate


def read_events(path):
  """Yields the events of a TensorBoard file: length, its checksum, bytes, their checksum."""
  data = path.read_bytes()
  while data:
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event()
    event.ParseFromString(data[12 : 12 + size])
    yield event
    data = data[16 + size :]


def test_evaluation_has_every_row_and_its_examples(evaluated):
  printed, file = evaluated
  found = json.loads(file.read_text())
  cases = suite.make_cases(suite.load_items(str(file.parents[2] / "data"), "tiny", "test"), 16000)
  rows = {c.row for c in cases if len(c.expected) == 1}
  rows |= {f"{c.row}/{part}" for c in cases if len(c.expected) > 1 for part in c.expected}
  assert set(found["rows"]) == rows and found["captions"] == LIMIT
  for name, row in found["rows"].items():
    assert row["n"] == LIMIT and row["chance"].keys() < row.keys()
    assert name in printed
    assert all(v >= 0 for k, v in row.items() if k != "chance")
  assert found["ceilings"]["image/original"]["all"] == 1
  (example,) = found["examples"]
  assert example["caption"] in {c.text for c in world.captions("tiny", "test")}
  media = [v for v in example.values() if v.endswith((".png", ".wav"))]
  assert len(media) == 10
  for name in media:
    if name.endswith(".png"):
      assert Image.open(file.parent / name).size == (64, 64)
    else:
      assert len(soundfile.read(file.parent / name)[0])


class Page(html.parser.HTMLParser):
  """Reads a page: tags must close, and what is embedded is kept.

  Attributes:
    media: type and bytes of everything that is inside the page.
    rows: cells of every table row.
  """

  VOID = ("meta", "img", "br", "input", "hr", "link")

  def __init__(self, text):
    super().__init__()
    self.open, self.media, self.rows, self.elsewhere = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"not closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    for name, value in attrs:
      if name not in ("src", "href", "xlink:href") or value.startswith("#"):
        continue
      if found := re.fullmatch(r"data:([a-z/]+);base64,(.*)", value, re.S):
        self.media.append((found[1], base64.b64decode(found[2], validate=True)))
      else:
        self.elsewhere.append(value)

  def handle_startendtag(self, tag, attrs):
    if tag not in self.VOID:
      self.handle_starttag(tag, attrs)
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

  def handle_data(self, data):
    if self.rows and self.open[-1:] in (["td"], ["th"], ["b"]):
      self.rows[-1][-1] += data


def test_report_is_one_page_with_all_inside(page, evaluated):
  text = page.read_text()
  seen, figures = Page(text), json.loads(evaluated[1].read_text())["rows"]
  assert not seen.elsewhere
  kinds = [kind for kind, _ in seen.media]
  assert kinds.count("image/png") == kinds.count("audio/wav") == 5
  for kind, data in seen.media:
    if kind == "image/png":
      Image.open(io.BytesIO(data)).load()
    else:
      assert len(soundfile.read(io.BytesIO(data))[0])
  shown = {row[0]: row for row in seen.rows}
  assert set(figures) <= set(shown)
  first = next(row for row in seen.rows if row[0] == "text_to_image")
  assert f"{figures['text_to_image']['count']:.3f}" in first
  (plots,) = re.findall(r"<svg.*?</svg>", text, re.S)
  ElementTree.fromstring(plots)


def test_the_readmes_figures_come_from_a_command(place, evaluated):
  """Its table is what the command writes, but for the numbers, which are the shipped model's."""
  place.run("report", f"--evaluations=shipped={evaluated[1]}", "--out=shipped.md")
  ours, readme = (
    re.sub(r"\d+\.\d+", "0.000", path.read_text())
    for path in (place.folder / "shipped.md", ROOT / "README.md")
  )
  assert ours in readme


@pytest.mark.parametrize("codec", ["image", "speech"])
def test_codecs_are_trained_and_go_on(place, codec):
  words = ["train_codec", f"--codec={codec}", f"--workdir=runs/{codec}", f"--out=codecs/{codec}"]
  words += ["--sets=tiny", "--num_steps=2", "--batch_size=2"]
  done = place.run(*words)
  assert "step 2/2" in done.stderr
  out = place.folder / "codecs" / codec
  trained = model_dir.load_codec(out, f"{codec}_codec")
  assert trained.config == model_dir.load_codec(model_dir.SHIPPED, f"{codec}_codec").config
  first = model_dir.read_info(out)[f"{codec}_codec"]["fingerprint"]
  again = place.run(*words)  # nothing is left to do: the same codec comes out of the checkpoint
  assert "Going on from step 2" in again.stderr and "step 2/2" not in again.stderr
  assert model_dir.read_info(out)[f"{codec}_codec"]["fingerprint"] == first
