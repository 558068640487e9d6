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

from aromni_jax.configs import base
from aromni_jax.data import packing, token_shards
from aromni_jax.data.loss_weights import LossWeightConfig
from aromni_jax.data.pipeline import (
  DataConfig,
  PackedRows,
  RowPlan,
  add_code_noise,
  make_train_iterator,
)
from aromni_jax.fields import to_dataclass
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


def test_dropped_prompts_leave_bos_and_the_picture(shards):
  config = DataConfig(str(shards), mixture={"text_to_image": 1, "speech_to_text": 1})
  dropped = {"text_to_image": [], "speech_to_text": []}
  for batch in batches(dataclasses.replace(config, drop_prompt=0.5), count=8):
    for b in range(4):
      for segment in range(1, batch.segment_ids[b].max() + 1):
        at = np.flatnonzero(batch.segment_ids[b] == segment)
        without = VOCABULARY.eoh not in batch.tokens[b, at]  # which ends every prompt
        dropped[task_name(batch.task_ids[b, at[0]])].append(without)
        if without:
          assert batch.tokens[b, at[1]] == VOCABULARY.boi
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


def counts_of(plan, tasks, epochs):
  """Samples of each task in each epoch, and the numbers in the order of their epochs."""
  taken = [np.concatenate(list(plan.epoch(e))) for e in range(epochs)]
  return [np.bincount(tasks[numbers], minlength=len(TASKS)).tolist() for numbers in taken], taken


@pytest.mark.parametrize("unit, want", [("samples", [0, 20, 60]), ("tokens", [0, 60, 60])])
def test_an_epoch_ends_when_the_first_task_is_used_up(unit, want):
  tasks = np.repeat([1, 2], [90, 60]).astype(np.int8)
  lengths = np.where(tasks == 1, 10, 30).astype(np.int32)
  # No sample has the fourth task, and nobody asked for the fifth.
  mixture = {"text_to_image": 3.0, "speech_to_text": 1.0, "text_to_speech": 2.0, "dialogue": 0.0}
  plan = RowPlan(lengths, tasks, DataConfig("x", mixture=mixture, mixture_unit=unit))
  counts, taken = counts_of(plan, tasks, epochs=3)
  assert [c[:3] for c in counts] == [want] * 3 and all(sum(c) == sum(want) for c in counts)
  whole = np.concatenate(taken)
  of_two = whole[tasks[whole] == 2]
  assert [len(set(part)) for part in np.split(of_two, 3)] == [60] * 3  # every pass has them all
  assert not (np.sort(of_two[:60]) == of_two[:60]).all()
  of_one = whole[tasks[whole] == 1][: 90 // want[1] * want[1]]  # of whole epochs
  assert len(set(of_one)) == len(of_one)  # goes on where the last epoch stopped


def test_a_small_share_is_one_sample_at_least():
  tasks = np.repeat([1, 2], [50, 50]).astype(np.int8)
  mixture = {"text_to_image": 1.0, "speech_to_text": 1e-6}
  plan = RowPlan(np.full(100, 10, np.int32), tasks, DataConfig("x", mixture=mixture))
  assert counts_of(plan, tasks, 1)[0][0][:3] == [0, 1, 50]


def test_samples_as_long_as_a_row_are_taken():
  lengths = np.array([300, 301, 299], np.int32)
  config = DataConfig("x", sequence_length=300, long_samples="drop")
  taken = np.concatenate(list(RowPlan(lengths, np.zeros(3, np.int8), config).epoch(0)))
  assert sorted(taken) == [0, 2]
  with pytest.raises(ValueError, match="1 samples of x .* record 1 has 301 tokens"):
    RowPlan(lengths, np.zeros(3, np.int8), dataclasses.replace(config, long_samples="error"))
  with pytest.raises(ValueError, match="no sample for data.mixture"):
    RowPlan(lengths, np.zeros(3, np.int8), dataclasses.replace(config, mixture={"dialogue": 1.0}))


def test_the_defaults_are_those_of_config_files():
  fields = base.get_config().data.to_dict()
  length = fields["sequence_length"]
  assert to_dataclass(DataConfig, fields) == DataConfig("data/tokens", sequence_length=length)


def test_shares_are_below_one_and_may_be_nothing(shards):
  for field in ("drop_prompt", "code_noise"):
    DataConfig(str(shards), **{field: 0.0})
    for share in (-0.1, 1.0):
      with pytest.raises(ValueError, match=f"data.{field} is {share}; it must be a share"):
        DataConfig(str(shards), **{field: share})


def test_noise_is_any_code_of_the_same_kind_and_the_same_in_every_run():
  v = VOCABULARY
  ids = np.concatenate([np.repeat([v.image.start, v.image.stop - 1], 4000), [v.boi, v.eoi, v.eos]])
  ids = np.concatenate([ids, np.repeat([v.speech.start, v.speech.stop - 1], 4000)]).astype(np.int32)
  noisy, again = ids.copy(), ids.copy()
  for out in (noisy, again):
    add_code_noise(out, 0.9, v, np.random.default_rng(0))
  np.testing.assert_array_equal(noisy, again)
  np.testing.assert_array_equal(v.modality_of(noisy), v.modality_of(ids))
  changed = noisy[noisy != ids]
  assert len(changed) / 16000 == pytest.approx(0.9, abs=0.02)
  assert set(changed) >= {v.image.start, v.image.stop - 1, v.speech.start, v.speech.stop - 1}


def test_padding_is_eos_and_nothing_else_is_there(shards):
  (batch,) = batches(DataConfig(str(shards), max_samples=1), count=1)
  padding = batch.segment_ids == 0
  assert padding.any(axis=1).all()
  assert (batch.tokens[padding] == VOCABULARY.eos).all()
  assert (batch.targets[padding] == VOCABULARY.eos).all()
  assert not batch.positions[padding].any() and not batch.task_ids[padding].any()
  assert {str(getattr(batch, f.name).dtype) for f in dataclasses.fields(batch)} == {
    "int32",
    "float32",
  }
  assert batch.loss_weights.dtype == np.float32


def test_noise_falls_on_codes_of_responses_and_spares_targets(shards):
  config = DataConfig(str(shards), loss_weights=LossWeightConfig(prompt=0.0))
  noise = {IMAGE: [], SPEECH: []}  # whether each code of a response was changed
  for clean, noisy in zip(
    batches(config), batches(dataclasses.replace(config, code_noise=0.3)), strict=True
  ):
    assert_equal(clean, dataclasses.replace(noisy, tokens=clean.tokens))
    changed = clean.tokens != noisy.tokens
    kinds = VOCABULARY.modality_of(clean.tokens)
    np.testing.assert_array_equal(kinds, VOCABULARY.modality_of(noisy.tokens))
    for kind, seen in noise.items():
      # What is predicted with the weight of a response stands in one.
      response = (kinds == kind) & (np.roll(clean.loss_weights, 1, axis=1) >= 1)
      seen.extend(changed[response])
      assert not changed[(kinds == kind) & ~response].any()
    assert not changed[(kinds != IMAGE) & (kinds != SPEECH)].any()
  for seen in noise.values():
    assert np.mean(seen) == pytest.approx(0.3, abs=0.05)


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
  with pytest.raises(FileNotFoundError, match="no token shards.*aromni tokenize"):
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
