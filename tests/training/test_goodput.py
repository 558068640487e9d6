import json

import pytest

from aromni_jax.training import goodput


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when told; the wall clock is ahead by 1000."""
  now = [50.0]
  monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(goodput.time, "time", lambda: now[0] + 1000.0)

  def wait(seconds):
    now[0] += seconds

  return wait


def steps(run, clock, begin, end, seconds=1.0):
  with run.measure("step"):
    for step in range(begin + 1, end + 1):
      clock(seconds)
      run.record(step)


def test_time_of_one_attempt_adds_up(clock, tmp_path):
  run = goodput.Goodput(str(tmp_path), began=40.0)
  clock(5.0)
  run.begin(0)
  with run.measure("step"):
    with run.measure("compile"):
      clock(20.0)
    clock(60.0)
    run.move(4.0, "data_wait")
    with run.measure("checkpoint"):
      clock(5.0)
  totals = {name: seconds for name, seconds in run.totals().items() if seconds}
  assert totals == pytest.approx(
    {"initialisation": 15.0, "compile": 20.0, "step": 56.0, "data_wait": 4.0, "checkpoint": 5.0}
  )
  assert run.shares()["goodput"] == pytest.approx(0.56)
  assert sum(run.shares().values()) == pytest.approx(1.0)
  assert f"  {'steps that count':34s}  56.0 %      56.0 s" in run.table()
  assert "Where 1 min 40 s went (1 attempt):" in run.table()


def test_lost_steps_and_the_time_between_attempts_are_losses(clock, tmp_path):
  first = goodput.Goodput(str(tmp_path))
  first.begin(0)
  steps(first, clock, 0, 10)  # saved at 6, killed after 10
  clock(30.0)
  with (tmp_path / "attempts.jsonl").open("a") as f:
    f.write('{"attempt": 1, "torn')
  second = goodput.Goodput(str(tmp_path))
  second.begin(6)
  steps(second, clock, 6, 16, seconds=2.0)
  totals = {name: seconds for name, seconds in second.totals().items() if seconds}
  assert totals == pytest.approx({"step": 6.0 + 20.0, "redone": 4.0, "down": 30.0})
  second.record(16, "finished")
  clock(1000.0)
  third = goodput.Goodput(str(tmp_path))  # goes on further after the end: no loss
  third.begin(16)
  assert third.totals()["down"] == pytest.approx(30.0)
  assert third.totals()["step"] == pytest.approx(26.0)
  assert third.shares()["goodput"] == pytest.approx(26 / 60)


def test_an_attempt_that_saved_nothing_is_lost(clock, tmp_path):
  for _ in range(2):
    run = goodput.Goodput(str(tmp_path))
    run.begin(0)
    steps(run, clock, 0, 5)
  assert run.totals()["step"] == pytest.approx(5.0)
  assert run.totals()["redone"] == pytest.approx(5.0)
  lines = [json.loads(x) for x in (tmp_path / "attempts.jsonl").read_text().splitlines()]
  assert {x["attempt"] for x in lines} == {1, 2}


def test_other_processes_keep_no_record(clock, tmp_path):
  run = goodput.Goodput(None)
  run.begin(3)
  with run.measure("evaluation"):
    clock(2.0)
  assert run.shares() == {"goodput": 0.0, "goodput/evaluation": 1.0}
