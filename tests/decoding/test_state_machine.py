import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.decoding import sampling
from aromni_jax.decoding.state_machine import compile_machine
from aromni_jax.prompts import parse
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import get_vocabulary

VOCABULARY = get_vocabulary("demo")
MACHINE = compile_machine(VOCABULARY)


@jax.jit
def run(logits_keys, states, budget, favourite):
  """Greedy decoding of 256 steps on random logits that much prefer one id."""

  def step(carry, key):
    states, remaining = carry
    logits = jax.random.normal(key, (len(states), VOCABULARY.size))
    logits = logits.at[:, favourite].add(100.0)
    allowed = MACHINE.allowed(states, remaining)
    token = sampling.sample(logits, allowed, None, {}, None, stochastic=False)
    done = states == MACHINE.done
    return (MACHINE.advance(states, token), remaining - 1), jnp.where(done, -1, token)

  init = (states, jnp.full(len(states), budget))
  return jax.lax.scan(step, init, jax.random.split(logits_keys, 256))[1].T


def check(task, ids, budget):
  assert len(ids) <= budget and ids[-1] == VOCABULARY.eos and ids[-2] == VOCABULARY.eom
  kinds = [(s.kind, s.ids) for s in parse(ids, VOCABULARY)]
  spans = [(k, len(x)) for k, x in kinds if k != "special"]
  wanted = (["text"] if task == "dialogue" else []) + list(TASKS[task].outputs)
  assert [k for k, _ in spans] == wanted
  assert all(n == VOCABULARY.image_length for k, n in spans if k == "image")
  specials = [int(x[0]) for k, x in kinds if k == "special"]
  v = VOCABULARY
  want = [v.instruction, v.response] if task == "dialogue" else []
  for part in TASKS[task].outputs:
    want += {"image": [v.boi, v.eoi], "speech": [v.boa, v.eoa], "text": []}[part]
  assert specials == [*want, v.eom, v.eos]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1),
  budget=st.integers(150, 256),
  favourite=st.integers(0, VOCABULARY.size - 1),
)
def test_any_logits_give_output_that_parses(seed, budget, favourite):
  out = run(
    jax.random.key(seed), MACHINE.init_states(list(TASKS), [0] * len(TASKS)), budget, favourite
  )
  for task, ids in zip(TASKS, np.asarray(out), strict=True):
    check(task, ids[ids >= 0], budget)


@pytest.mark.parametrize("task", TASKS)
def test_the_shortest_budget_is_enough(task):
  budget = MACHINE.shortest(task)
  out = run(jax.random.key(0), MACHINE.init_states([task], [0]), budget, VOCABULARY.text.start)
  ids = np.asarray(out)[0]
  check(task, ids[ids >= 0], budget)


def test_every_shortest_budget():
  picture = VOCABULARY.image_length + 2
  assert MACHINE.shortest("speech_to_text") == 1 + 2
  assert MACHINE.shortest("text_to_speech") == 3 + 2
  assert MACHINE.shortest("text_to_image") == picture + 2
  assert MACHINE.shortest("dialogue") == (3 + 1) + 3 + picture + 2
