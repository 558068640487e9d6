"""The released rules: ids of the reference, a plain loop written from the fact sheet, budgets.

The fixture holds the embedding's rows of the ids that occur in it; the others are zero here.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from aromni_jax.decoding import sampling
from aromni_jax.decoding.engine import Engine
from aromni_jax.decoding.released import compile_released
from aromni_jax.models.config import DecoderConfig
from aromni_jax.models.decoder import Decoder
from aromni_jax.recipes import RELEASED, Sampler
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import Vocabulary, get_vocabulary
from tests import released, tiny

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/parity/generation_semantics.safetensors"
OFFICIAL = get_vocabulary("aromni_7b").to_dict()
LAYOUT = Vocabulary.from_dict(
  OFFICIAL | {"name": "fixture", "size": 13000, "text": [12842, 13000], "image_length": 48}
)

# Many ids are special here, so that random weights open pictures and switch modes often.
SMALL = Vocabulary(
  name="small",
  size=40,
  text=range(4, 9),
  image=range(10, 18),
  speech=range(18, 24),
  bos=0,
  pad=1,
  eos=2,
  boi=24,
  eoi=25,
  boa=26,
  eoa=27,
  eoh=28,
  eom=29,
  instruction=30,
  response=31,
  image_length=6,
  speech_rate=40,
)
CONFIG = dataclasses.replace(tiny.SPEAKER, vocab_size=SMALL.size)
PICTURE = [SMALL.boi, 11, 17, 10, 13, 13, 12, SMALL.eoi]
PROMPTS = [
  np.array(ids, np.int32)
  for ids in ([0, 4, 18, 5, 28, 6], [0, 7, 28], [0, *PICTURE, 6, 28, 5], [0, 4, 5, 26], [0, 8, 27])
]
PROMPT_TASKS = ["speech_to_text", "text_to_image", "dialogue", "dialogue", "text_to_speech"]
IMAGE = Sampler(guidance=3.07, image_guidance=1.32)


@pytest.fixture(scope="module")
def reference():
  with safe_open(FIXTURE, "np") as file:
    meta = json.loads(file.metadata()["meta"])["config"]
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
  native = {key[7:]: t for key, t in tensors.items() if key.startswith("native.")}
  table = np.zeros((meta["vocab"], meta["dim"]), np.float32)
  table[native.pop("tok_embeddings.ids")] = native.pop("tok_embeddings.rows")
  native["tok_embeddings.weight"] = table
  config = DecoderConfig(
    vocab_size=meta["vocab"],
    embed_dim=meta["dim"],
    mlp_dim=meta["ffn"],
    num_layers=meta["n_layers"],
    num_heads=meta["n_heads"],
    num_kv_heads=meta["n_heads"],
    head_dim=meta["dim"] // meta["n_heads"],
    norm_placement="pre",
    dtype="float32",
  )
  params = released.stacked(native, "native", config)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
  return tensors, nnx.merge(graphdef, state)


@pytest.fixture(scope="module")
def decoder():
  """Random weights that draw and switch modes often and end seldom."""
  decoder = Decoder(CONFIG, rngs=nnx.Rngs(5))
  scale = jnp.ones(SMALL.size).at[jnp.array([SMALL.boi, SMALL.boa, SMALL.eoa])].set(1.7)
  scale = scale.at[jnp.array([SMALL.eos, SMALL.eom])].set(0.2)
  decoder.head[...] = decoder.head[...] * scale
  return decoder


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_is_the_reference_s(reference, penalty):
  tensors, decoder = reference
  samplers = {"greedy": Sampler(repetition_penalty=penalty), "image": IMAGE}
  engine = Engine(decoder, LAYOUT, recipe=RELEASED, samplers=samplers)
  (ids,) = engine.generate(list(tensors["text.in.prompt"]), ["speech_to_text"], max_new_tokens=64)
  np.testing.assert_array_equal(ids, tensors[f"text.out.greedy_rep{penalty}"][0])


@pytest.mark.parametrize("names", [["cfg_txt"], ["cfg_img"], ["cfg_txt", "cfg_img"]])
def test_guided_pictures_are_the_reference_s(reference, names):
  tensors, decoder = reference
  engine = Engine(decoder, LAYOUT, recipe=RELEASED, samplers={"image": IMAGE})
  prompts = [tensors[f"{name}.in.prompt"][0] for name in names]
  outputs = engine.generate(prompts, ["text_to_image"] * len(names), max_new_tokens=49)
  for name, ids in zip(names, outputs, strict=True):
    np.testing.assert_array_equal(ids, [LAYOUT.boi, *tensors[f"{name}.out.argmax"][0]])


@pytest.mark.slow
def test_without_a_picture_before_it_image_guidance_has_no_effect(reference):
  tensors, decoder = reference
  for name, same in (("cfg_txt", True), ("cfg_img", False)):
    ids = [
      Engine(
        decoder,
        LAYOUT,
        recipe=RELEASED,
        samplers={"image": Sampler(guidance=3.07, image_guidance=scale)},
      ).generate(list(tensors[f"{name}.in.prompt"]), ["text_to_image"], max_new_tokens=49)[0]
      for scale in (1.32, 6.0, None)
    ]
    assert np.array_equal(ids[0], ids[1]) == np.array_equal(ids[0], ids[2]) == same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cfg_txt", "cfg_img"])
def test_first_guided_logits_are_the_reference_s(reference, name):
  tensors, decoder = reference
  prompt = tensors[f"{name}.in.prompt"][0]
  pictures = prompt[np.isin(prompt, [0, 8196, 8197, *range(4, 8196)])]

  def last(ids):
    ids = np.array([[*ids, LAYOUT.boi]])
    return decoder.logits(decoder(ids, jnp.arange(ids.shape[1])[None])[:, -1])

  logits = jnp.stack([last(prompt), last([LAYOUT.bos]), last(pictures)])
  guided = sampling.guide(logits, jnp.array([3.07]), jnp.array([1.32]))
  allowed = (jnp.arange(LAYOUT.size) >= 4) & (jnp.arange(LAYOUT.size) <= 8195)
  setting = {"temperature": jnp.array([1.0]), "top_p": jnp.array([0.96])}
  got = np.array(sampling.warp(guided, allowed[None], None, setting, stochastic=True))[0, 4:8196]
  want = tensors[f"{name}.out.first_logits"][0]
  np.testing.assert_array_equal(got > -1e29, np.isfinite(want))
  np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], atol=1e-4)


def test_processors_are_the_reference_s(reference):
  tensors, _ = reference
  machine = compile_released(LAYOUT)
  ids, rows = tensors["chain.in.input_ids"], len(tensors["chain.in.logits"])
  seen = np.zeros((rows, LAYOUT.size), bool)
  seen[np.arange(rows)[:, None], ids] = True
  allowed = machine.allowed(
    machine.init_states(["dialogue"] * rows, [LAYOUT.bos] * rows), jnp.full(rows, 4000)
  )
  values = {"repetition_penalty": 1.2, "temperature": 1.2, "top_p": 0.96}
  setting = {key: jnp.full(rows, value, jnp.float32) for key, value in values.items()}
  got = sampling.warp(tensors["chain.in.logits"], allowed, seen, setting, stochastic=True)
  want = tensors["chain.out.final"]
  kept = np.isfinite(want)
  np.testing.assert_array_equal(np.asarray(got) > -1e29, kept)
  np.testing.assert_allclose(np.asarray(got)[kept], want[kept], rtol=1e-6)


@pytest.mark.parametrize(
  "task, name", [("text_to_speech", "default_greedy"), ("dialogue", "default_sample")]
)
def test_selector_is_the_reference_s(reference, task, name):
  tensors, _ = reference
  machine = compile_released(LAYOUT)
  stream = tensors["fsm.in.stream"]
  states = [machine.init_states([task], stream[:1])]
  for i in range(1, len(stream)):
    states.append(machine.advance(states[-1], stream[i : i + 1]))
  greedy = [machine.samplers[machine.sampler[int(s[0])]] == "greedy" for s in states]
  np.testing.assert_array_equal(greedy, tensors[f"fsm.out.{name}"])


def plain_loop(decoder, prompt, task, budget, samplers, image):
  """One row by the rules of the sheet's section 1.5: no table, no cache, no batch.

  Every choice is an argmax; the modes differ by their repetition penalty.
  """
  v, codes = SMALL, set(SMALL.image)

  @nnx.jit
  def forward(decoder, ids, length):
    hidden = decoder(ids[None], jnp.arange(len(ids))[None])
    return decoder.logits(hidden[0, length - 1])

  def logits_after(ids):
    padded = np.zeros(128, np.int32)
    padded[: len(ids)] = ids
    return np.array(forward(decoder, padded, len(ids)))

  def draw(ids):
    start = len(ids) - 1
    for _ in range(v.image_length):
      c = logits_after(ids)
      i = logits_after([x for x in ids if x in codes | {v.bos, v.boi, v.eoi}])
      u = logits_after([v.bos, *ids[start:]])
      guided = u + image.image_guidance * (i - u) + image.guidance * (c - i)
      ids.append(max(codes, key=lambda x: guided[x]))

  ids, limit = list(prompt), len(prompt) + budget
  if task == "text_to_image":
    ids.append(v.boi)
    draw(ids)
    return ids[len(prompt) :]
  first = mode = "sampled" if task == "dialogue" else "greedy"
  while len(ids) < limit:
    switch = {v.instruction: "greedy", v.boa: "greedy", v.response: "sampled", v.eoa: "sampled"}
    mode = switch.get(ids[-1], mode)
    logits = logits_after(ids)
    logits[list(codes)] = -np.inf
    if task != "dialogue" or len(ids) >= limit - (v.image_length + 2):
      logits[v.boi] = -np.inf
    penalty = samplers[mode].repetition_penalty
    for x in set(ids):
      logits[x] = logits[x] / penalty if logits[x] > 0 else logits[x] * penalty
    ids.append(int(logits.argmax()))
    if ids[-1] in (v.eos, v.eom):
      break
    if ids[-1] == v.boi:
      draw(ids)
      ids.append(v.eoi)
      mode = first
  return ids[len(prompt) :]


SAMPLERS = {
  "greedy": Sampler(repetition_penalty=1.3),
  "sampled": Sampler(repetition_penalty=2.5),
  "image": IMAGE,
}


@pytest.mark.slow
def test_mixed_batch_equals_the_plain_loop(decoder):
  engine = Engine(decoder, SMALL, recipe=RELEASED, samplers=SAMPLERS)
  budgets = [40, 20, 90, 90, 25]
  outputs = engine.generate(PROMPTS, PROMPT_TASKS, max_new_tokens=budgets)
  for prompt, task, budget, ids in zip(PROMPTS, PROMPT_TASKS, budgets, outputs, strict=True):
    want = plain_loop(decoder, prompt, task, budget, SAMPLERS, IMAGE)
    np.testing.assert_array_equal(ids, want, err_msg=task)
  drawn = [np.sum(ids == SMALL.boi) for ids in outputs]
  assert drawn[1] == 1 and drawn[2] > 3 and drawn[3] > 3 and drawn[0] == drawn[4] == 0


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(decoder):
  samplers = {
    "greedy": Sampler(repetition_penalty=1.2),
    "sampled": Sampler(1.2, 0.96, 1.2),
    "image": Sampler(1.0, 0.96, guidance=3.07, image_guidance=1.15),
  }
  engine = Engine(decoder, SMALL, recipe=RELEASED, samplers=samplers)
  budgets = [40, 7, 60, 90, 25]
  together = engine.generate(PROMPTS, PROMPT_TASKS, max_new_tokens=budgets, seed=1)
  for i in (0, 2):
    (alone,) = engine.generate(
      PROMPTS[i : i + 1], PROMPT_TASKS[i : i + 1], max_new_tokens=budgets[i], seed=1, row_ids=[i]
    )
    np.testing.assert_array_equal(together[i], alone)
  parts = list(engine.stream(PROMPTS, PROMPT_TASKS, max_new_tokens=budgets, seed=1, chunk=16))
  assert len(parts) > 2
  for part in parts:
    for ids, want in zip(part, together, strict=True):
      np.testing.assert_array_equal(ids, want[: len(ids)])
  assert [len(ids) for ids in parts[-1]] == [len(ids) for ids in together]


def test_a_picture_begins_only_where_it_fits():
  machine, size = compile_released(SMALL), SMALL.image_length + 2
  states = machine.init_states(["dialogue", "speech_to_text"], [SMALL.eoh] * 2)
  for remaining, fits in ((size, False), (size + 1, True)):
    allowed = np.array(machine.allowed(states, jnp.full(2, remaining)))
    np.testing.assert_array_equal(allowed[:, SMALL.boi], [fits, False])
    assert not allowed[:, SMALL.image].any()
    allowed[:, [SMALL.boi, *SMALL.image]] = True
    assert allowed.all()  # nothing else is ever banned, ids without a meaning among them


def check(task, ids, budget):
  """A response of the released rules, read again without the table."""
  v, ids = SMALL, list(ids)
  assert 0 < len(ids) <= budget
  if task in ("text_to_image", "speech_to_image"):
    assert ids[0] == v.boi and len(ids) == v.image_length + 1 and set(ids[1:]) <= set(v.image)
    return
  ended = ids[-1] in (v.eos, v.eom)
  assert ended or len(ids) == budget
  i = 0
  while i < len(ids):
    assert ids[i] not in v.image
    assert ids[i] not in (v.eos, v.eom) or i == len(ids) - 1
    if ids[i] == v.boi:
      assert task == "dialogue"
      codes = ids[i + 1 : i + 1 + v.image_length]
      i += v.image_length + 1
      assert set(codes) <= set(v.image) and ids[i] == v.eoi
    i += 1


MACHINE = compile_released(SMALL)


@jax.jit
def run(key, states, budget, favourite):
  """Greedy decoding of 96 steps on random logits that prefer one id."""

  def step(carry, key):
    states, remaining = carry
    logits = jax.random.normal(key, (len(states), SMALL.size))
    logits = logits.at[:, favourite].add(2.0)
    token = sampling.sample(
      logits, MACHINE.allowed(states, remaining), None, {}, None, stochastic=False
    )
    token = jnp.where(states == MACHINE.done, -1, token)
    after = jnp.where(remaining == 1, MACHINE.done, MACHINE.advance(states, token))
    return (after, jnp.maximum(remaining - 1, 0)), token

  init = (states, jnp.full(len(states), budget))
  return jax.lax.scan(step, init, jax.random.split(key, 96))[1].T


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1),
  budget=st.integers(SMALL.image_length + 1, 96),
  favourite=st.integers(0, SMALL.size - 1),
  last=st.integers(0, SMALL.size - 1),
)
def test_any_logits_follow_the_rules(seed, budget, favourite, last):
  states = MACHINE.init_states(list(TASKS), [last] * len(TASKS))
  out = run(jax.random.key(seed), states, budget, favourite)
  for task, ids in zip(TASKS, np.asarray(out), strict=True):
    check(task, ids[ids >= 0], budget)


def test_wrong_settings_are_named(decoder):
  with pytest.raises(ValueError, match="no sampler is called \\['text'\\]; expected \\('greedy'"):
    Engine(decoder, SMALL, recipe=RELEASED, samplers={"text": Sampler()})
  with pytest.raises(ValueError, match="guidance is for pictures"):
    Engine(decoder, SMALL, recipe=RELEASED, samplers={"greedy": Sampler(image_guidance=2.0)})
  with pytest.raises(ValueError, match="image_guidance is -1.0; it must be >= 0"):
    Sampler(image_guidance=-1.0)
  engine = Engine(decoder, SMALL, recipe=RELEASED)
  with pytest.raises(ValueError, match="shortest response of text_to_image has 7 tokens"):
    engine.generate(PROMPTS[:2], PROMPT_TASKS[:2], max_new_tokens=[6, 6])
