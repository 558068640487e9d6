import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from aromni_jax import model_dir
from aromni_jax.data import token_shards
from aromni_jax.data.loss_weights import LossWeightConfig, loss_weights
from aromni_jax.data.pipeline import DataConfig, make_train_iterator
from aromni_jax.data.token_shards import TokenShards
from aromni_jax.data_pipelines.aromni_formats import IGNORED, OFFICIAL_TASKS
from aromni_jax.data_pipelines.aromni_shards import export_split, import_files
from aromni_jax.model import load_model
from aromni_jax.vocabulary import get_vocabulary
from tests.tiny import random_samples

ROOT = pathlib.Path(__file__).parents[2]
V = get_vocabulary("aromni_7b")
ENDINGS = ([V.eom, V.eos], [V.eos], [], [V.eos, V.eos])


def records(count, seed=0):
  """Official records of all tasks; the ends differ, and some prompts hold an eos."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(count):
    prompt = [V.bos, *rng.integers(20_000, 60_000, rng.integers(3, 30)).tolist(), V.eoh]
    if i % 5 == 0:
      prompt[2] = V.eos
    response = rng.integers(20_000, 60_000, rng.integers(1, 20)).tolist()
    task, end = OFFICIAL_TASKS[i % 7], ENDINGS[i % 4]
    record = {"discrete_code": prompt + response + end, "task": task, "response": response}
    out.append(record | {"id": f"item/{i}"})
  return out


def odd_records(count, seed=1):
  """Official records whose response is missing, null, empty or ends in eos, in all tasks."""
  out = []
  for i, record in enumerate(records(count, seed)):
    record |= {"id": f"odd/{i}"}
    response = record.pop("response")
    kinds = ({}, {"response": None}, {"response": []}, {"response": [*response, V.eos]})
    out.append(record | kinds[i // 7 % 4])
  return out


def write_jsonl(path, items):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(item) + "\n" for item in items))


def write_parquet(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pa.Table.from_pylist(rows), path)


def dialogue(turns, seed=0):
  """A row of several turns, its labels on the answers."""
  rng = np.random.default_rng(seed)
  ids, labels = [V.bos], [IGNORED]
  for _ in range(turns):
    spoken, answered = rng.integers(V.speech.start, V.speech.stop, (2, 6)).tolist()
    asked = [V.boa, *spoken, V.eoa, V.eoh]
    heard, said = rng.integers(20_000, 60_000, (2, 4)).tolist()
    answer = [V.instruction, *heard, V.response, *said, V.boa, *answered, V.eoa, V.eom]
    ids += asked + answer
    labels += [IGNORED] * len(asked) + answer
  return {"input_ids": ids, "labels": labels}


def read(out, split="train", vocabulary=V):
  return list(TokenShards(out, split, vocabulary))


def files_of(directory):
  return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def official_weights(record):
  """The released pre-training rule, step by step: float[n - 1], one weight per target.

  labels are the ids; shifted by one; the last len(response) of those that are valid and not eos
  weigh 2 in two tasks.
  """
  labels = record["discrete_code"][1:]
  weights = [1.0] * len(labels)
  if record["task"] in ("image_caption", "speech_to_text"):
    left = len(record.get("response", []) or [])
    for at in reversed(range(len(labels))):
      if labels[at] != 2 and left:
        weights[at], left = 2.0, left - 1
  return weights


def official_inside(ids):
  """The released fine-tuning's segment: strictly between 12840 and the next unused 12841."""
  inside, used = [False] * len(ids), set()
  for start, opening in enumerate(ids):
    if opening == 12840:
      for stop in range(start + 1, len(ids)):
        if ids[stop] == 12841 and stop not in used:
          used.add(stop)
          inside[start + 1 : stop] = [True] * (stop - start - 1)
          break
  return inside


def test_weights_are_those_of_the_released_code(tmp_path, caplog):
  items = records(140) + odd_records(56)
  write_jsonl(tmp_path / "in/a.jsonl", items)
  manifest = import_files(tmp_path / "in", tmp_path / "out", V, {}, validation_fraction=0)
  assert manifest["notes"] == {"response_with_eos": 14} and not manifest["rejected"]
  (warning,) = [r.getMessage() for r in caplog.records if "eos" in r.getMessage()]
  assert "14 responses include eos" in warning
  by_key = {s.key: s for s in read(tmp_path / "out")}
  assert len(by_key) == 196
  for item in items:
    sample = by_key[item["id"]]
    np.testing.assert_array_equal(sample.tokens, item["discrete_code"])
    assert sample.task == item["task"] and sample.response_spans is None
    weights = loss_weights(sample, V, LossWeightConfig())
    np.testing.assert_array_equal(weights[:-1], official_weights(item), err_msg=str(item))
    assert weights[-1] == 0


def test_round_trip_through_shards_and_a_second_import(tmp_path):
  items = records(32) + odd_records(28)
  for name, part in (("a", items[:25]), ("b", items[25:])):
    write_jsonl(tmp_path / f"in/{name}.jsonl", part)
  import_files(tmp_path / "in", tmp_path / "out", V, {}, validation_fraction=0)
  counts = export_split(tmp_path / "out", "train", tmp_path / "again", samples_per_file=16)
  assert counts["written"] == 60 and not counts["skipped"]
  files = sorted((tmp_path / "again").iterdir())
  assert [f.name for f in files] == [f"train-0000{i}.jsonl" for i in range(4)]
  lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]

  def said(items):
    return {
      x["id"]: (x["discrete_code"], x["task"], len(x.get("response", []) or [])) for x in items
    }

  assert said(lines) == said(items) and all(isinstance(x["response"], list) for x in lines)
  import_files(tmp_path / "again", tmp_path / "second", V, {}, validation_fraction=0)
  for a, b in zip(read(tmp_path / "out"), read(tmp_path / "second"), strict=True):
    assert (a.key, a.task, a.response_start) == (b.key, b.task, b.response_start)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_our_own_shards_are_exported_but_for_what_the_format_lacks(shards, tmp_path):
  with pytest.raises(ValueError, match="has task .* for which AR-Omni's JSONL has no name.*--skip"):
    export_split(shards, "train", tmp_path / "no")
  assert not (tmp_path / "no").exists()
  counts = export_split(shards, "train", tmp_path / "out", skip_others=True)
  assert counts["skipped"] == 80 and counts["written"] == 280  # two of nine tasks
  demo = get_vocabulary("demo")
  import_files(tmp_path / "out", tmp_path / "back", demo, {}, validation_fraction=0)
  theirs = {s.key: s for s in read(shards, vocabulary=demo)}
  for sample in read(tmp_path / "back", vocabulary=demo):
    assert sample.response_start == theirs[sample.key].response_start
    np.testing.assert_array_equal(sample.tokens, theirs[sample.key].tokens)
  with pytest.raises(FileExistsError, match="remove it or name another folder"):
    export_split(shards, "train", tmp_path / "out")


GOOD = records(1)[0]
BAD = {
  "not_json": ['{"discrete_code": [0, 5', "", "\udcff"],
  "wrong_type": [
    [1, 2],
    GOOD | {"discrete_code": "0 5 2"},
    GOOD | {"discrete_code": [0, 5.5, 2]},
    GOOD | {"discrete_code": [0, True, 2]},
    GOOD | {"task": 3},
    GOOD | {"response": 4},
    GOOD | {"id": ["a"]},
    GOOD | {"id": "\ud800"},
  ],
  "missing_field": [{k: v for k, v in GOOD.items() if k != f} for f in ("discrete_code", "task")],
  "unknown_task": [GOOD | {"task": "dialogue"}, GOOD | {"task": ""}],
  "empty": [GOOD | {"discrete_code": []}],
  "too_long": [GOOD | {"discrete_code": [0] + [20_000] * 1298 + [2]}],
  "out_of_vocabulary": [
    GOOD | {"discrete_code": [0, 65_536, 2], "response": [5]},
    GOOD | {"discrete_code": [0, -1, 2], "response": [5]},
    GOOD | {"discrete_code": [0, 10**30, 2], "response": [5]},
  ],
  "response_too_long": [GOOD | {"discrete_code": [0, 7, 8, 2], "response": [0, 7, 8]}],
}


def test_every_bad_line_is_named_with_its_reason_and_counted(tmp_path):
  lines, want, name = [], [], "bad lines.jsonl"
  longest = GOOD | {"discrete_code": [0] + [20_000] * 1297 + [2], "id": "longest"}
  for reason, cases in BAD.items():
    for case in cases:
      lines.append(case if isinstance(case, str) else json.dumps(case))
      want.append((f"{name}:{len(lines)}", reason))
  lines += [json.dumps(item) for item in [*records(5), longest]]
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / name).write_bytes("\n".join(lines).encode(errors="surrogateescape"))
  with pytest.raises(ValueError, match="20 of 27 lines are wrong .*not_json 3.*max_bad_fraction"):
    import_files(tmp_path / "in", tmp_path / "out", V, {})
  assert not (tmp_path / "out").exists()
  manifest = import_files(tmp_path / "in", tmp_path / "out", V, {}, max_bad_fraction=0.9)
  report = [json.loads(x) for x in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
  assert [(r["where"], r["reason"]) for r in report] == want and all(r["message"] for r in report)
  assert manifest["rejected"] == {reason: len(cases) for reason, cases in BAD.items()}
  assert manifest["input_files"] == {name: {"lines": 27, "samples": 6}}
  keys = {s.key for split in ("train", "validation") for s in read(tmp_path / "out", split)}
  assert keys == {"longest", *(f"item/{i}" for i in range(5))}
  assert not (tmp_path / "out.parts").exists()


def test_samples_that_are_too_long_are_not_wrong(tmp_path):
  write_jsonl(tmp_path / "in/a.jsonl", records(3) + BAD["too_long"] * 3)
  manifest = import_files(tmp_path / "in", tmp_path / "out", V, {}, max_bad_fraction=0)
  assert manifest["rejected"] == {"too_long": 3}
  short = {"max_length": 5, "max_bad_fraction": 0}
  with pytest.raises(ValueError, match="none of 6 lines is a sample .too_long 6"):
    import_files(tmp_path / "in", tmp_path / "none", V, {}, **short)


@pytest.mark.parametrize(
  "change, reason",
  [
    ({"labels": [IGNORED, 5]}, "labels_length"),
    ({"labels": [IGNORED, 20_000, 20_002]}, "labels_differ"),
    ({"labels": [IGNORED] * 3}, "no_labels"),
    ({"labels": [0, IGNORED, IGNORED]}, "no_labels"),
    ({"labels": None}, "missing_field"),
    ({"input_ids": [0, None, 20_001]}, "wrong_type"),
    ({"input_ids": []}, "empty"),
    ({"input_ids": [0, 70_000, 20_001]}, "out_of_vocabulary"),
    ({"input_ids": [20_000] * 2049, "labels": [20_000] * 2049}, "too_long"),
  ],
)
def test_bad_rows_are_named(tmp_path, change, reason):
  row = {"input_ids": [0, 20_000, 20_001], "labels": [IGNORED, 20_000, 20_001]}
  limit = {"input_ids": [20_000] * 2048, "labels": [IGNORED] + [20_000] * 2047}
  write_parquet(tmp_path / "a.parquet", [row, row | change, limit])
  manifest = import_files(tmp_path / "a.parquet", tmp_path / "out", V, {}, max_bad_fraction=0.4)
  (entry,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
  assert json.loads(entry)["where"] == "a.parquet:2" and manifest["rejected"] == {reason: 1}
  assert {len(s.tokens) for split in manifest["splits"] for s in read(tmp_path / "out", split)} == {
    3,
    2048,
  }


def test_labels_of_several_turns_are_kept_and_packed(tmp_path):
  rows = [dialogue(turns, seed=turns) for turns in (1, 2, 3, 4)] * 80  # several row batches
  rows[5] = rows[5] | {"labels": rows[5]["input_ids"]}  # every id is predicted
  for n in (4, 6):  # the end is not; one turn, and three
    rows[n] = rows[n] | {"labels": rows[n]["labels"][:-2] + [IGNORED] * 2}
  write_parquet(tmp_path / "a.parquet", rows)
  import_files(tmp_path / "a.parquet", tmp_path / "out", V, {}, validation_fraction=0)
  samples = {s.key: s for s in read(tmp_path / "out")}
  assert len(samples) == len(rows)
  released = LossWeightConfig(prompt=0.0, transcript=3.0)
  for number, row in enumerate(rows, 1):
    sample = samples[f"a.parquet:{number}"]
    labels = np.full(len(sample.tokens), IGNORED)
    for start, stop in sample.spans:
      labels[start:stop] = sample.tokens[start:stop]
    np.testing.assert_array_equal(labels, row["labels"])
    np.testing.assert_array_equal(sample.tokens, row["input_ids"])
    assert sample.task == "dialogue"
    valid = np.array(row["labels"][1:]) != IGNORED
    want = np.where(official_inside(row["input_ids"])[1:], 3.0, 1.0) * valid
    np.testing.assert_array_equal(loss_weights(sample, V, released)[:-1], want)
  config = DataConfig(str(tmp_path / "out"), sequence_length=200, loss_weights=released)
  trained = {tuple(s.tokens): loss_weights(s, V, released) for s in samples.values()}
  several = {s.tokens.tobytes(): s for s in samples.values()}
  batch = next(make_train_iterator(config, V, batch_size=4))
  noisy = next(make_train_iterator(dataclasses.replace(config, code_noise=0.5), V, batch_size=4))
  np.testing.assert_array_equal(batch.loss_weights, noisy.loss_weights)
  changed, answers = batch.tokens != noisy.tokens, np.roll(batch.loss_weights, 1, axis=1) > 0
  assert changed[answers].any() and not changed[~answers].any()
  seen = 0
  for b in range(4):
    for segment in range(1, batch.segment_ids[b].max() + 1):
      at = np.flatnonzero(batch.segment_ids[b] == segment)
      tokens = batch.tokens[b, at]
      np.testing.assert_array_equal(batch.targets[b, at[:-1]], tokens[1:])
      if tuple(tokens) in trained and len(several[tokens.tobytes()].spans) > 1:
        seen += 1
        np.testing.assert_array_equal(batch.loss_weights[b, at], trained[tuple(tokens)])
  assert seen > 5
  with pytest.raises(ValueError, match="has task dialogue"):
    export_split(tmp_path / "out", "train", tmp_path / "jsonl")


def test_samples_without_a_response_are_packed(tmp_path):
  items = [x for x in odd_records(56) if not x.get("response")]
  write_jsonl(tmp_path / "a.jsonl", items)
  import_files(tmp_path / "a.jsonl", tmp_path / "out", V, {}, validation_fraction=0)
  samples = read(tmp_path / "out")
  assert len(samples) == 42 and all(s.response_start == len(s.tokens) for s in samples)
  plain = DataConfig(str(tmp_path / "out"), sequence_length=200)
  noisy = dataclasses.replace(plain, drop_prompt=0.99, code_noise=0.99)
  a, b = (next(make_train_iterator(c, V, batch_size=4)) for c in (plain, noisy))
  for field in dataclasses.fields(a):
    np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
  inside = a.segment_ids[:, 1:] == a.segment_ids[:, :-1]
  want = np.where(inside & (a.segment_ids[:, 1:] > 0), 1.0, 0.0)
  np.testing.assert_array_equal(a.loss_weights[:, :-1], want)


def test_names_of_samples_are_stable_and_unique(tmp_path):
  items = records(6)
  items[1]["id"] = items[4]["id"] = "twice"
  items[2]["id"], items[3]["id"] = 77, None
  write_jsonl(tmp_path / "in/a.jsonl", items[:3])
  write_jsonl(tmp_path / "in/b.jsonl", items[3:])
  import_files(tmp_path / "in", tmp_path / "out", V, {}, validation_fraction=0)
  keys = {s.key: s.tokens.tolist() for s in read(tmp_path / "out")}
  names = ["item/0", "a.jsonl:2", "77", "b.jsonl:1", "b.jsonl:2", "item/5"]
  assert keys == {n: i["discrete_code"] for n, i in zip(names, items, strict=True)}


def test_validation_is_a_share_by_name(tmp_path):
  write_jsonl(tmp_path / "in/a.jsonl", records(400))
  import_files(tmp_path / "in", tmp_path / "a", V, {}, validation_fraction=0.2)
  write_jsonl(tmp_path / "more/a.jsonl", [r | {"id": "new/" + r["id"]} for r in records(100)])
  write_jsonl(tmp_path / "more/b.jsonl", records(400))
  import_files(tmp_path / "more", tmp_path / "b", V, {}, validation_fraction=0.2)
  first = {s.key for s in read(tmp_path / "a", "validation")}
  assert 50 < len(first) < 110
  assert not first & {s.key for s in read(tmp_path / "a", "train")}
  assert first == {k for k in (s.key for s in read(tmp_path / "b", "validation")) if k[0] == "i"}
  write_jsonl(tmp_path / "few/a.jsonl", records(2))
  few = import_files(tmp_path / "few", tmp_path / "c", V, {}, validation_fraction=1e-9)
  assert few["splits"]["validation"]["samples"] == 1


def command(source, out, *flags):
  return [
    *(sys.executable, "-m", "data_pipelines.import_aromni"),
    *(f"--source={source}", f"--out={out}", *flags),
  ]


def wait_for(condition, process, seconds=120):
  end = time.time() + seconds
  while not condition():
    assert process.poll() is None and time.time() < end, process.stderr.read()
    time.sleep(0.005)


def run(*args):
  return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True)


def start(*args):
  return subprocess.Popen(command(*args), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill(process):
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  process.stderr.close()


@pytest.mark.slow
def test_a_killed_import_goes_on_and_gives_the_same_bytes(tmp_path):
  items, source = records(1500), tmp_path / "in"
  parts = [items[:500], items[500:1000], items[1000:]]
  for name, part in zip("abc", parts, strict=True):
    write_jsonl(source / f"{name}.jsonl", part)
  (tmp_path / "in/a.jsonl").open("a").write("{broken\n")
  assert run(source, tmp_path / "whole").returncode == 0
  # The second file is a pipe that stays open after 50 lines: the job waits in the middle of it.
  (source / "b.jsonl").unlink()
  os.mkfifo(source / "b.jsonl")
  out, work = tmp_path / "out", tmp_path / "out.parts"
  job = start(source, out)
  pipe = os.open(source / "b.jsonl", os.O_RDWR)
  os.write(pipe, "".join(json.dumps(item) + "\n" for item in parts[1][:50]).encode())
  wait_for((work / "files/b.jsonl.partial").exists, job)
  kill(job)
  os.close(pipe)
  assert not out.exists() and [p.name for p in work.glob("files/*.jsonl")] == ["a.jsonl"]
  (source / "b.jsonl").unlink()
  write_jsonl(source / "b.jsonl", parts[1])
  # Killed again, while the shards are written.
  job = start(source, out)
  wait_for((tmp_path / "out.partial/token_samples").exists, job)
  kill(job)
  assert not out.exists()
  refused = run(source, out, "--max_length=1000")
  assert refused.returncode == 1 and "give the same flags to go on" in refused.stderr
  last = run(source, out)
  assert last.returncode == 0, last.stderr
  assert all(f"{name}.jsonl was read before" in last.stderr for name in "abc")
  assert "No --model: training refuses" in last.stderr and "a.jsonl:501: not_json" in last.stderr
  assert files_of(out) == files_of(tmp_path / "whole")
  assert not work.exists() and not (tmp_path / "out.partial").exists()
  again = run(source, out)
  assert again.returncode == 1 and f"--out={out} exists" in again.stderr


def test_a_part_of_a_file_that_changed_is_read_again(tmp_path):
  write_jsonl(tmp_path / "in/a.jsonl", [*records(3), {}])
  with pytest.raises(ValueError, match="1 of 4 lines are wrong"):
    import_files(tmp_path / "in", tmp_path / "out", V, {})
  write_jsonl(tmp_path / "in/a.jsonl", records(4))
  manifest = import_files(tmp_path / "in", tmp_path / "out", V, {})
  assert manifest["input_files"]["a.jsonl"] == {"lines": 4, "samples": 4}


def test_a_job_killed_while_cleaning_up_is_done(tmp_path):
  write_jsonl(tmp_path / "in/a.jsonl", records(3))
  manifest = import_files(tmp_path / "in", tmp_path / "out", V, {})
  (tmp_path / "out.parts/files/a.jsonl").mkdir(parents=True)
  (tmp_path / "out.parts/settings.json").write_text("{}")
  assert import_files(tmp_path / "in", tmp_path / "out", V, {}) == manifest
  assert not (tmp_path / "out.parts").exists()
  # A folder of that name which is not the job's stays as it is.
  (tmp_path / "out.parts").mkdir()
  (tmp_path / "out.parts/mine").write_text("x")
  with pytest.raises(FileExistsError, match="--out=.* exists"):
    import_files(tmp_path / "in", tmp_path / "out", V, {})
  (tmp_path / "out").rename(tmp_path / "elsewhere")
  with pytest.raises(FileExistsError, match="out.parts exists and holds no import's parts"):
    import_files(tmp_path / "in", tmp_path / "out", V, {})
  assert (tmp_path / "out.parts/mine").read_text() == "x"


def test_imported_shards_train_with_the_model_that_was_named(shards, tmp_path):
  export_split(shards, "train", tmp_path / "in", skip_others=True)
  model = f"--model={model_dir.SHIPPED}"
  done = run(tmp_path / "in", tmp_path / "out", model, "--validation_fraction=0.1")
  assert done.returncode == 0, done.stderr
  demo, codecs = model_dir.read_identity(model_dir.SHIPPED)
  assert set(codecs) == {"image_codec", "speech_codec", "text"}
  assert codecs == load_model().fingerprints
  for split in ("train", "validation"):
    config = DataConfig(str(tmp_path / "out"), split=split, drop_prompt=0.1)
    batch = next(make_train_iterator(config, demo, batch_size=4, codecs=codecs))
    assert batch.tokens.shape == (4, 512) and batch.loss_weights.max() == 2
  import_files(tmp_path / "in", tmp_path / "plain", demo, {})
  config = DataConfig(str(tmp_path / "plain"))
  next(make_train_iterator(config, demo, batch_size=4))
  with pytest.raises(ValueError, match="does not say which image_codec.*again with --model"):
    make_train_iterator(config, demo, batch_size=4, codecs=codecs)


def test_wrong_sources_are_named(tmp_path, monkeypatch):
  def attempt(source, **options):
    return import_files(source, tmp_path / "out", V, {}, **options)

  with pytest.raises(FileNotFoundError, match="--source=.*nowhere does not exist"):
    attempt(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="holds no .jsonl or .parquet file"):
    attempt(tmp_path / "empty")
  write_jsonl(tmp_path / "both/a.jsonl", records(1))
  write_parquet(tmp_path / "both/b.parquet", [dialogue(1)])
  with pytest.raises(ValueError, match="holds .jsonl and .parquet files; import them one by one"):
    attempt(tmp_path / "both")
  (tmp_path / "both/torn.parquet").write_bytes(b"PAR1")
  with pytest.raises(ValueError, match="torn.parquet cannot be read as parquet"):
    attempt(tmp_path / "both/torn.parquet")
  write_parquet(tmp_path / "both/c.parquet", [{"input_ids": [0, 5, 2]}])
  with pytest.raises(ValueError, match="c.parquet: column labels is missing; expected lists of in"):
    attempt(tmp_path / "both/c.parquet")
  with pytest.raises(ValueError, match="--validation_fraction is 2"):
    attempt(tmp_path / "both/a.jsonl", validation_fraction=2)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ImportError, match=r"install it: pip install 'aromni_jax\[parquet\]'"):
    attempt(tmp_path / "both/b.parquet")


def test_exporting_other_responses_is_refused(tmp_path):
  (sample,) = random_samples(1, tasks=("image_to_text",))
  spans = np.array([[3, 5], [8, 9]], np.int32)
  sample = dataclasses.replace(sample, response_start=3, response_spans=spans)
  token_shards.write(tmp_path / "out", {"train": [sample]}, get_vocabulary("demo"), {})
  (back,) = read(tmp_path / "out", vocabulary=get_vocabulary("demo"))
  np.testing.assert_array_equal(back.response_spans, spans)
  with pytest.raises(ValueError, match=r"has responses \[\[3, 5\], \[8, 9\]\]; .* one response"):
    export_split(tmp_path / "out", "train", tmp_path / "no")
  with pytest.raises(ValueError, match="has no sample that AR-Omni's JSONL can hold"):
    export_split(tmp_path / "out", "train", tmp_path / "no", skip_others=True)
