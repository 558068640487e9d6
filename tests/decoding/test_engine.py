import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aromni_jax.decoding import engine as engine_lib
from aromni_jax.decoding.engine import Engine
from aromni_jax.models.decoder import Decoder
from aromni_jax.recipes import Sampler
from tests.tiny import SPEAKER, VOCABULARY

TASKS = ["speech_to_text", "text_to_image", "text_to_speech", "dialogue"]
PROMPTS = [np.r_[VOCABULARY.bos, np.arange(20, 20 + n)].astype(np.int32) for n in (3, 40, 7, 11)]


@pytest.fixture(scope="module")
def decoder():
  return Decoder(SPEAKER, rngs=nnx.Rngs(0))


def greedy_without_cache(decoder, engine, prompt, task, budget, guidance=1.0):
  """The plain loop: the whole sequence through the decoder at every step."""
  length = len(prompt) + budget
  tokens = np.zeros((1, length), np.int32)
  tokens[0, : len(prompt)] = prompt
  states, at = engine.machine.init_states([task], prompt[-1:]), len(prompt)
  forward = nnx.jit(lambda m, t: m.logits(m(t, jnp.arange(length)[None])))
  for remaining in range(budget, 0, -1):
    logits = np.asarray(forward(decoder, tokens))[0, at - 1]
    picture = np.flatnonzero(tokens[0, :at] == VOCABULARY.boi)
    if len(picture) and not (tokens[0, :at] == VOCABULARY.eoi).any():
      alone = np.r_[VOCABULARY.bos, tokens[0, picture[0] : at]]
      padded = np.zeros_like(tokens)
      padded[0, : len(alone)] = alone
      without = np.asarray(forward(decoder, padded))[0, len(alone) - 1]
      logits = without + guidance * (logits - without)
    allowed = np.asarray(engine.machine.allowed(states, jnp.array([remaining])))[0]
    tokens[0, at] = np.where(allowed, logits, -np.inf).argmax()
    states = engine.machine.advance(states, tokens[:, at])
    at += 1
    if tokens[0, at - 1] == VOCABULARY.eos:
      break
  return tokens[0, len(prompt) : at]


def test_cached_batch_of_mixed_tasks_equals_the_plain_loop(decoder):
  engine = Engine(decoder, VOCABULARY)
  budget = 90
  outputs = engine.generate(PROMPTS, TASKS, max_new_tokens=budget)
  for prompt, task, ids in zip(PROMPTS, TASKS, outputs, strict=True):
    want = greedy_without_cache(decoder, engine, prompt, task, budget)
    np.testing.assert_array_equal(ids, want, err_msg=task)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_cache_that_grows_changes_nothing(decoder, monkeypatch, guidance):
  engine = Engine(decoder, VOCABULARY, samplers={"image": Sampler(guidance=guidance)})
  whole = list(engine.stream(PROMPTS, TASKS, max_new_tokens=90, chunk=20))
  monkeypatch.setattr(engine_lib, "_FIRST_ROOM", 16)
  grow, lengthen, alive, old = engine_lib._grow, engine_lib._lengthen, [], []

  def watched_grow(progress, cache_length):
    old[:] = jax.tree.leaves(progress.cache)
    return grow(progress, cache_length)

  def watched_lengthen(array, cache_length):
    alive.append(sum(not x.is_deleted() for x in old))
    return lengthen(array, cache_length)

  monkeypatch.setattr(engine_lib, "_grow", watched_grow)
  monkeypatch.setattr(engine_lib, "_lengthen", watched_lengthen)
  grown = list(engine.stream(PROMPTS, TASKS, max_new_tokens=90, chunk=20))
  arrays = 2 * decoder.config.num_layers  # the old ones go one by one, so two caches never exist
  assert alive and alive == list(range(arrays, 0, -1)) * (len(alive) // arrays)
  assert all(x.is_deleted() for x in old)
  assert len(whole) == len(grown) == 5
  for a, b in zip(sum(whole, []), sum(grown, []), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_guided_pictures_equal_the_plain_loop(decoder):
  engine = Engine(decoder, VOCABULARY, samplers={"image": Sampler(guidance=3.0)})
  plain = Engine(decoder, VOCABULARY).generate(PROMPTS, TASKS, max_new_tokens=90)
  outputs = engine.generate(PROMPTS, TASKS, max_new_tokens=90)
  for prompt, task, ids in zip(PROMPTS, TASKS, outputs, strict=True):
    want = greedy_without_cache(decoder, engine, prompt, task, 90, guidance=3.0)
    np.testing.assert_array_equal(ids, want, err_msg=task)
  same = [np.array_equal(a, b) for a, b in zip(plain, outputs, strict=True)]
  assert same == [True, False, True, False]  # the two that draw differ
  with pytest.raises(ValueError, match="guidance is for pictures"):
    Engine(decoder, VOCABULARY, samplers={"text": Sampler(guidance=2.0)})


@pytest.mark.slow
def test_streamed_parts_are_prefixes(decoder):
  samplers = {"text": Sampler(1.0), "speech": Sampler(0.7, 0.9), "image": Sampler(1.0)}
  engine = Engine(decoder, VOCABULARY, samplers=samplers)
  whole = engine.generate(PROMPTS, TASKS, max_new_tokens=100, seed=3)
  seen = list(engine.stream(PROMPTS, TASKS, max_new_tokens=100, seed=3, chunk=16))
  assert len(seen) > 2
  for part in seen:
    for ids, want in zip(part, whole, strict=True):
      np.testing.assert_array_equal(ids, want[: len(ids)])
  for ids, want in zip(seen[-1], whole, strict=True):
    np.testing.assert_array_equal(ids, want)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(decoder):
  engine = Engine(decoder, VOCABULARY, samplers={"speech": Sampler(1.0), "text": Sampler(1.0, 0.9)})
  together = engine.generate(PROMPTS, TASKS, max_new_tokens=100, seed=1)
  alone = engine.generate(PROMPTS[2:3], TASKS[2:3], max_new_tokens=100, seed=1, row_ids=[2])
  np.testing.assert_array_equal(together[2], alone[0])
  other = engine.generate(PROMPTS, TASKS, max_new_tokens=100, seed=2)
  assert any(len(a) != len(b) or (a != b).any() for a, b in zip(together, other, strict=True))


@pytest.mark.slow
def test_a_short_prompt_goes_on_when_the_longest_ones_budget_has_ended(decoder):
  """The cache ends with the last row, before the longest prompt and the largest budget together."""
  engine = Engine(decoder, VOCABULARY)
  prompts = [np.r_[PROMPTS[1], PROMPTS[1]], PROMPTS[0]]  # 82 and 4 ids
  tasks, budgets = ["text_to_image", "text_to_speech"], [70, 148]
  picture, speech = engine.generate(prompts, tasks, max_new_tokens=budgets)
  (alone,) = engine.generate(prompts[1:], tasks[1:], max_new_tokens=budgets[1:])
  np.testing.assert_array_equal(speech, alone)
  assert len(speech) > 160 - 82 and len(picture) < 70


@pytest.mark.slow
def test_repetition_penalty_changes_what_is_said(decoder):
  plain = Engine(decoder, VOCABULARY)
  penalised = Engine(decoder, VOCABULARY, samplers={"text": Sampler(repetition_penalty=50.0)})
  (a,), (b,) = (e.generate(PROMPTS[:1], TASKS[:1], max_new_tokens=40) for e in (plain, penalised))
  words = b[:-2]
  assert len(set(words.tolist())) == len(words)  # with so strong a penalty nothing is said twice
  assert len(set(a[:-2].tolist())) < len(a[:-2])


def test_wrong_requests_are_named(decoder):
  engine = Engine(decoder, VOCABULARY, max_length=64)
  with pytest.raises(ValueError, match="shortest response of text_to_image has 68 tokens"):
    engine.generate(PROMPTS[1:2], ["text_to_image"], max_new_tokens=20)
  with pytest.raises(ValueError, match="a prompt of 41 tokens and max_new_tokens 30 exceed"):
    engine.generate(PROMPTS[1:2], ["speech_to_text"], max_new_tokens=30)
  with pytest.raises(ValueError, match="got 1 prompts and 2 tasks"):
    engine.generate(PROMPTS[:1], TASKS[:2], max_new_tokens=30)
  with pytest.raises(ValueError, match="no sampler is called"):
    Engine(decoder, VOCABULARY, samplers={"video": Sampler()})
  with pytest.raises(ValueError, match="task 'sing' does not exist"):
    engine.generate(PROMPTS[:1], ["sing"], max_new_tokens=30)
