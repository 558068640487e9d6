import concurrent.futures
import dataclasses
import hashlib
import json
import shutil
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from aromni_jax.data import packing, token_shards
from aromni_jax.data.loss_weights import LossWeightConfig, loss_weights
from aromni_jax.data.pipeline import DataConfig, PackedRows, RowPlan, make_train_iterator
from aromni_jax.sample import Sample
from aromni_jax.tasks import TASKS, task_name
from aromni_jax.vocabulary import IMAGE, SPEECH, get_vocabulary
from tests.tiny import random_samples, text_model

VOCABULARY = get_vocabulary("demo")


def batches(config, count=4, batch_size=4, **options):
  iterator = make_train_iterator(config, VOCABULARY, batch_size=batch_size, **options)
  return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
  for field in dataclasses.fields(a):
    np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_targets_are_the_next_ids_of_the_same_sample(shards):
  (batch,) = batches(DataConfig(str(shards)), count=1)
  for b in range(4):
    for segment in range(1, batch.segment_ids[b].max() + 1):
      at = np.flatnonzero(batch.segment_ids[b] == segment)
      tokens = batch.tokens[b, at]
      assert tokens[0] == VOCABULARY.bos and tokens[-1] == VOCABULARY.eos
      np.testing.assert_array_equal(batch.targets[b, at[:-1]], tokens[1:])
      np.testing.assert_array_equal(batch.positions[b, at], np.arange(len(at)))
      assert batch.loss_weights[b, at[-1]] == 0 and len(set(batch.task_ids[b, at])) == 1
    padding = batch.segment_ids[b] == 0
    assert not batch.loss_weights[b, padding].any()


def test_loss_weights_follow_the_response():
  ids = np.array([VOCABULARY.bos, 2100, 2101, VOCABULARY.eoh, 2102, 2103, 2104, VOCABULARY.eos])
  heard = Sample(ids, "speech_to_text", 4, "k")
  weights = loss_weights(heard, VOCABULARY, LossWeightConfig(prompt=0.5, boosted=3.0))
  # Targets of positions 3..5 are the response's ids 4..6; id 7 is the closing eos.
  np.testing.assert_array_equal(weights, [0.5, 0.5, 0.5, 3, 3, 3, 1, 0])
  plain = loss_weights(
    dataclasses.replace(heard, task="text_to_image"), VOCABULARY, LossWeightConfig()
  )
  np.testing.assert_array_equal(plain, [1, 1, 1, 1, 1, 1, 1, 0])


def test_the_transcript_is_weighted_up_to_the_next_unused_response_id():
  opening, closing = VOCABULARY.instruction, VOCABULARY.response
  for ids, inside in {
    (2100, opening, 2101, 2102, closing, 2103): [2, 3],
    (opening, 2100, opening, 2101, closing, 2102, closing, 2103): [1, 2, 3, 4, 5],
    (closing, opening, 2100, opening, 2101, closing, 2102): [2, 3, 4],
    (opening, closing, opening, 2100): [],
    (opening, 2100, closing, closing, opening, 2101, closing): [1, 5],
  }.items():
    sample = Sample(np.array([VOCABULARY.bos, *ids]), "dialogue", 1, "k")
    weights = loss_weights(sample, VOCABULARY, LossWeightConfig(transcript=4.0))
    want = np.ones(len(ids) + 1)
    want[inside], want[-1] = 4.0, 0.0
    np.testing.assert_array_equal(weights, want, err_msg=str(ids))


def test_every_sample_once_per_epoch_and_well_packed(shards):
  table = token_shards.TokenShards(shards, "train", VOCABULARY)
  plan = RowPlan(table.lengths, table.tasks, DataConfig(str(shards)))
  rows_of = []
  for epoch in range(2):
    rows = [row.tolist() for row in plan.epoch(epoch)]
    rows_of.append(rows)
    assert sorted(n for row in rows for n in row) == list(range(len(table)))
    real = sum(table.lengths) / (len(rows) * 512)
    assert real > 0.94  # the last row of this little set is half empty
  assert rows_of[0] != rows_of[1]


def made_up_plan(count=3000, **config):
  rng = np.random.default_rng(count)
  lengths = rng.integers(5, 500, count).astype(np.int32)
  tasks = rng.integers(0, len(TASKS), count).astype(np.int8)
  return RowPlan(lengths, tasks, DataConfig("made up", **config))


@pytest.mark.parametrize(
  "config, want",
  [
    ({}, "787d2f659fdb"),
    ({"mixture": {"text_to_image": 3.0, "speech_to_text": 1.0, "dialogue": 0.5}}, "50fe0fa5ff1b"),
    ({"window": 7, "seed": 3, "long_samples": "drop", "sequence_length": 300}, "1b4c5d0ad523"),
  ],
)
def test_the_order_of_a_seed_is_that_of_earlier_versions(config, want):
  """A run that was begun with an earlier version goes on with the samples it has not seen."""
  plan = made_up_plan(**config)
  rows = [[row.tolist() for row in plan.epoch(epoch)] for epoch in range(3)]
  digest = hashlib.sha256("".join(json.dumps(epoch) for epoch in rows).encode())
  assert digest.hexdigest()[:12] == want


def test_rows_are_the_same_from_any_thread_and_from_the_middle(monkeypatch):
  config = {"sequence_length": 500, "window": 50}
  plan = made_up_plan(200, **config)
  want = [plan.row(n).tolist() for n in range(300)]  # several epochs
  assert len(plan.epoch(0)) < 150
  assert made_up_plan(200, **config).row(250).tolist() == want[250]
  # Threads that take turns inside `row` would pack a window twice or count an epoch twice.
  best_fit = packing._best_fit
  monkeypatch.setattr(packing, "_best_fit", lambda *args: time.sleep(1e-3) or best_fit(*args))
  shared = made_up_plan(200, **config)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda n: shared.row(n).tolist(), range(300)))
  assert found == want


def test_only_the_windows_that_are_needed_are_packed(monkeypatch):
  packed = []
  best_fit = packing._best_fit
  monkeypatch.setattr(packing, "_best_fit", lambda n, *r: packed.append(len(n)) or best_fit(n, *r))
  made_up_plan(30_000, window=100).row(3)
  assert packed == [100]


def test_rows_have_no_more_samples_than_allowed():
  lengths = np.random.default_rng(0).integers(1, 60, 500)
  rng = np.random.default_rng(1)
  rows = list(packing.PackedOrder(np.arange(500), lengths, 200, 100, rng, most=3))
  assert max(map(len, rows)) == 3
  assert sorted(np.concatenate(rows)) == list(range(500))
  assert max(lengths[row].sum() for row in rows) <= 200


def test_dropped_prompts_leave_bos_and_the_picture(shards):
  config = DataConfig(str(shards), mixture={"text_to_image": 1, "speech_to_text": 1})
  dropped = {"text_to_image": [], "speech_to_text": []}
  for batch in batches(dataclasses.replace(config, drop_prompt=0.5), count=8):
    for b in range(4):
      for segment in range(1, batch.segment_ids[b].max() + 1):
        at = np.flatnonzero(batch.segment_ids[b] == segment)
        without = batch.tokens[b, at[1]] == VOCABULARY.boi
        dropped[TASKS[batch.task_ids[b, at[0]]]].append(without)
        if without:
          assert len(at) == VOCABULARY.image_length + 5 and batch.loss_weights[b, at[0]] == 1
  assert not any(dropped["speech_to_text"]) and 0.3 < np.mean(dropped["text_to_image"]) < 0.7
  with pytest.raises(ValueError, match="data.drop_prompt is 1.5"):
    DataConfig(str(shards), drop_prompt=1.5)


def test_order_is_a_function_of_seed_and_step(shards):
  config = DataConfig(str(shards))
  for a, b in zip(batches(config), batches(config), strict=True):
    assert_equal(a, b)
  other = batches(dataclasses.replace(config, seed=1))
  assert (batches(config)[0].tokens != other[0].tokens).any()


def test_processes_read_the_parts_of_one_batch(shards):
  config = DataConfig(str(shards))
  whole = batches(config)
  parts = [batches(config, process_index=i, process_count=2) for i in range(2)]
  for step in range(4):
    both = np.concatenate([parts[0][step].tokens, parts[1][step].tokens])
    np.testing.assert_array_equal(whole[step].tokens, both)
  with pytest.raises(ValueError, match="batch_size 4 is not a multiple of 3 processes"):
    batches(config, process_count=3)


def test_each_process_reads_its_own_records_only(shards, monkeypatch):
  """Every record of a step is read by one process, once."""
  read, getitem = [], token_shards.TokenShards.__getitem__
  monkeypatch.setattr(
    token_shards.TokenShards, "__getitem__", lambda s, i: read.append(int(i)) or getitem(s, i)
  )
  table = token_shards.TokenShards(shards, "train", VOCABULARY)
  config, steps, of_process = DataConfig(str(shards)), 3, []
  for process in range(4):
    rows = PackedRows(table, config, VOCABULARY, 8, process, 4)
    read.clear()
    segments = [rows[i]["segment_ids"].max() for i in range(steps * 2)]
    assert len(read) == sum(segments)
    of_process.append(list(read))
  plan = RowPlan(table.lengths, table.tasks, config)
  want = [n for row in range(steps * 8) for n in plan.row(row).tolist()]
  assert sorted(sum(of_process, [])) == sorted(want) and len(set(want)) == len(want)
  assert all(of_process)


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_exact(shards, processes):
  config = DataConfig(str(shards))
  whole = batches(config, count=6)
  first = make_train_iterator(config, VOCABULARY, batch_size=4)
  for _ in range(3):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  rest = [
    make_train_iterator(config, VOCABULARY, batch_size=4, process_index=i, process_count=processes)
    for i in range(processes)
  ]
  for iterator in rest:
    iterator.set_state(state)
  for want in whole[3:]:
    parts = [next(iterator) for iterator in rest]
    assert_equal(want, jax.tree.map(lambda *x: np.concatenate(x), *parts))


@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_mixture_weights(shards, unit):
  mixture = {"text_to_image": 3.0, "speech_to_text": 1.0}
  table = token_shards.TokenShards(shards, "train", VOCABULARY)
  plan = RowPlan(
    table.lengths, table.tasks, DataConfig(str(shards), mixture=mixture, mixture_unit=unit)
  )
  numbers = [n for epoch in range(4) for row in plan.epoch(epoch) for n in row]
  sizes = table.lengths if unit == "tokens" else np.ones_like(table.lengths)
  total = {t: sizes[[n for n in numbers if task_name(table.tasks[n]) == t]].sum() for t in mixture}
  assert total["text_to_image"] / total["speech_to_text"] == pytest.approx(3.0, rel=0.15)
  assert {task_name(table.tasks[n]) for n in numbers} == set(mixture)


def test_noise_falls_on_codes_of_responses_and_spares_targets(shards):
  config = DataConfig(str(shards), loss_weights=LossWeightConfig(prompt=0.0))
  for clean, noisy in zip(
    batches(config), batches(dataclasses.replace(config, code_noise=0.3)), strict=True
  ):
    assert_equal(clean, dataclasses.replace(noisy, tokens=clean.tokens))
    changed = clean.tokens != noisy.tokens
    kinds = VOCABULARY.modality_of(clean.tokens)
    np.testing.assert_array_equal(kinds, VOCABULARY.modality_of(noisy.tokens))
    for kind in (IMAGE, SPEECH):
      # What is predicted with the weight of a response stands in one.
      response = (kinds == kind) & (np.roll(clean.loss_weights, 1, axis=1) >= 1)
      assert changed[response].mean() == pytest.approx(0.3, abs=0.05)
      assert not changed[(kinds == kind) & ~response].any()
    assert not changed[(kinds != IMAGE) & (kinds != SPEECH)].any()


def test_long_samples_are_named_or_dropped(shards):
  config = DataConfig(str(shards), sequence_length=150)
  with pytest.raises(ValueError, match="longer than data.sequence_length 150.*long_samples=drop"):
    batches(config)
  batches(dataclasses.replace(config, long_samples="drop"))


def test_wrong_configs_are_named(shards):
  with pytest.raises(ValueError, match="task 'sing' does not exist"):
    DataConfig(str(shards), mixture={"sing": 1.0})
  with pytest.raises(ValueError, match="data.mixture.dialogue is -1"):
    DataConfig(str(shards), mixture={"dialogue": -1.0})
  with pytest.raises(ValueError, match="data.code_noise is 1.5; it must be a share"):
    DataConfig(str(shards), code_noise=1.5)
  with pytest.raises(ValueError, match="data.long_samples 'cut'"):
    DataConfig(str(shards), long_samples="cut")
  with pytest.raises(FileNotFoundError, match="no token shards.*data_pipelines.tokenize"):
    batches(DataConfig(str(shards / "nowhere")))
  with pytest.raises(FileNotFoundError, match="no split 'test'; it has train, validation"):
    batches(DataConfig(str(shards), split="test"))


def test_shards_of_another_codec_are_refused(shards):
  with pytest.raises(ValueError, match="made with image_codec .* but the model has 0123"):
    batches(DataConfig(str(shards)), codecs={"image_codec": "0123"})


def test_damaged_files_are_named(shards, tmp_path):
  copy = tmp_path / "tokens"
  shutil.copytree(shards, copy)
  (file,) = copy.glob("token_samples/*/*train*array_record*")
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match="damaged|cannot be opened"):
    batches(DataConfig(str(copy)), count=30)


def test_empty_splits_and_existing_folders_are_refused(shards, tmp_path):
  with pytest.raises(FileExistsError, match="remove it or name another folder"):
    token_shards.write(shards, {"train": random_samples(2)}, VOCABULARY, {})
  with pytest.raises(ValueError, match="'train'.* is empty; no token shards"):
    token_shards.write(tmp_path / "new", {"train": []}, VOCABULARY, {})
  assert not (tmp_path / "new").exists()


def test_shards_of_the_version_before_are_read(tmp_path, monkeypatch):
  class TokenSamples(token_shards.TokenSamples, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      info = super()._info()
      features = {k: v for k, v in info.features.items() if k != "response_spans"}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, split, samples):
      for key, record in super()._generate_examples(split, samples):
        yield key, {k: v for k, v in record.items() if k != "response_spans"}

  for name in ("new", "old"):
    token_shards.write(tmp_path / name, {"train": random_samples(40)}, VOCABULARY, {})
    monkeypatch.setattr(token_shards, "TokenSamples", TokenSamples)
  new, old = (token_shards.TokenShards(tmp_path / n, "train", VOCABULARY) for n in ("new", "old"))
  assert (tmp_path / "old/token_samples/1.0.0").is_dir()
  for a, b in zip(new, old, strict=True):
    assert (a.key, a.response_start, b.response_spans) == (b.key, b.response_start, None)
    np.testing.assert_array_equal(a.tokens, b.tokens)
  (tmp_path / "old/token_samples/1.0.0").rename(tmp_path / "old/token_samples/2.0.0")
  with pytest.raises(ValueError, match="has none of the versions 1.1.0, 1.0.0"):
    token_shards.TokenShards(tmp_path / "old", "train", VOCABULARY)


def test_two_writes_are_identical(tmp_path):
  for name in ("a", "b"):
    token_shards.write(tmp_path / name, {"train": random_samples(40)}, VOCABULARY, {})
  files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
  for a, b in zip(*files, strict=True):
    if a.name not in ("dataset_info.json",):  # holds nothing that training reads but a date
      assert a.read_bytes() == b.read_bytes(), a.name


def test_text_codec_of_the_fixture_is_the_shipped_one():
  text = text_model()
  assert text.decode(text.encode("two dogs on blue")) == "two dogs on blue"
