"""Files of version 1 are read for ever: fixtures/v1 has what the first code wrote and gave."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from aromni_jax import model_dir
from aromni_jax.configs import demo
from aromni_jax.convert.layouts import get_layout
from aromni_jax.data.pipeline import DataConfig, make_train_iterator
from aromni_jax.data.token_shards import TokenShards, read_manifest
from aromni_jax.evaluation import report_page, report_table
from aromni_jax.model import load_model
from aromni_jax.serving.requests import Request, generate_batch
from aromni_jax.training import loop
from aromni_jax.training.config import TrainConfig, to_dataclass
from aromni_jax.vocabulary import get_vocabulary

V1 = pathlib.Path(__file__).parent / "fixtures/v1"
GOLDEN = json.loads((V1 / "golden.json").read_text())
DEMO = get_vocabulary("demo")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The run's model directory, with the shipped codecs that it was trained with."""
  path = tmp_path_factory.mktemp("v1") / "model"
  ignored = shutil.ignore_patterns("decoder", "model.json")
  shutil.copytree(model_dir.SHIPPED, path, ignore=ignored)
  shutil.copytree(V1 / "run/model", path, dirs_exist_ok=True)
  return load_model(path)


def digest(*arrays):
  h = hashlib.sha256()
  for array in arrays:
    h.update(np.ascontiguousarray(array).tobytes())
  return h.hexdigest()[:16]


def digest_of_samples(shards):
  h = hashlib.sha256()
  for s in shards:
    spans = None if s.response_spans is None else s.response_spans.tolist()
    h.update(f"{s.task}/{s.key}/{s.response_start}/{spans}".encode())
    h.update(s.tokens.astype(np.int32).tobytes())
  return h.hexdigest()[:16]


def test_nothing_here_says_a_version():
  """Else the fixtures were made anew, and test nothing."""
  assert "version" not in json.loads((V1 / "run/model/model.json").read_text())
  assert "version" not in read_manifest(V1 / "tokens")
  assert "version" not in read_manifest(V1 / "tokens")["vocabulary"]


def test_the_decoder_is_the_same(model):
  leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model.decoder)))
  found = {
    jax.tree_util.keystr(path, simple=True, separator="."): digest(np.asarray(leaf, np.float32))
    for path, leaf in leaves
  }
  assert found == GOLDEN["decoder"]


def test_fingerprints_are_the_same(model):
  assert model.fingerprints == GOLDEN["fingerprints"]
  assert model.vocabulary.fingerprint() == GOLDEN["vocabulary_fingerprint"]


@pytest.mark.slow
def test_the_model_answers_the_same(model):
  request = Request("text_to_text", text="two dogs on blue")
  (response,) = generate_batch(model, [request], max_new_tokens=12)
  assert response.tokens.tolist() == GOLDEN["text_to_text"]


@pytest.mark.parametrize("split", ["train", "validation", "test", "test_voice"])
def test_samples_are_the_same(model, split):
  shards = TokenShards(V1 / "tokens", split, DEMO, model.fingerprints)
  assert digest_of_samples(shards) == GOLDEN["samples"][split]


def test_samples_of_version_1_0_0_are_the_same():
  assert (V1 / "tokens_1_0_0/token_samples/1.0.0").is_dir()
  shards = TokenShards(V1 / "tokens_1_0_0", "test", DEMO)
  assert len(shards) == 20 and digest_of_samples(shards) == GOLDEN["samples"]["1.0.0"]


@pytest.mark.parametrize("case", GOLDEN["batches"])
def test_batches_are_the_same_in_the_same_order(case):
  """A run that goes on must not see other data than it would have."""
  golden = GOLDEN["batches"][case]
  config = DataConfig(str(V1 / "tokens"), sequence_length=336, seed=0, **golden["config"])
  batches = make_train_iterator(config, DEMO, batch_size=4)
  for wanted in golden["sha256"]:
    batch = next(batches)
    fields = dataclasses.fields(batch)
    assert digest(*(getattr(batch, field.name) for field in fields)) == wanted


@pytest.mark.slow
def test_a_run_goes_on(tmp_path):
  shutil.copytree(V1 / "run", tmp_path / "run")
  c = demo.get_config("tiny")
  c.data.shards = str(V1 / "tokens")
  c.num_steps, c.log_every, c.checkpoint_every = 22, 1, 100
  config = to_dataclass(TrainConfig, c.to_dict())
  loop.train(config, str(tmp_path / "run"), model_dir.open_base(config.base))
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  lines = [line for line in map(json.loads, lines) if "loss" in line and line["step"] > 20]
  assert [line["step"] for line in lines] == [21, 22]
  for line, wanted in zip(lines, GOLDEN["next_steps"], strict=True):
    for name, value in wanted.items():
      np.testing.assert_allclose(line[name], value, rtol=1e-5, err_msg=name)


def test_certificates_name_a_layout():
  certificate = json.loads((V1 / "certificate.json").read_text())
  assert certificate["layout"] == "A" and get_layout(certificate["layout"]).name == "native"


def test_the_report_reads_evaluations_and_metrics(tmp_path):
  data = json.loads((V1 / "run/evaluation.json").read_text())
  files = {value for entry in data["examples"] for value in entry.values() if "examples/" in value}
  for file in files:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"example")
  page = report_page.page({"old": data}, {"old": tmp_path}, {"old": V1 / "run"})
  assert page.count(";base64,") == len(files) > 10 and "<svg" in page
  table = report_table.table({"old": data})
  rows = [line for line in table.splitlines() if line.startswith("| speech to text, f2 |")]
  assert rows == ["| speech to text, f2 | WER 9.375, exact 0.000 | 0.625, 0.000 |  |"]
