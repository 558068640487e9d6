"""From token shards to the total loss and its gradient, on the path that a training takes.

The released code's numbers first, then a loop in plain NumPy for what they do not cover.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from aromni_jax.configs import base, finetune_7b, pretrain_7b
from aromni_jax.data import token_shards
from aromni_jax.data.pipeline import make_train_iterator
from aromni_jax.models import sharding
from aromni_jax.recipes import PAPER, RELEASED
from aromni_jax.sample import Sample
from aromni_jax.tasks import TASKS
from aromni_jax.training import setup as setup_lib
from aromni_jax.training import step as step_lib
from aromni_jax.training.config import TrainConfig, to_dataclass
from aromni_jax.training.optimizer import make_optimizer
from aromni_jax.vocabulary import MODALITIES, get_vocabulary
from tests.tiny import random_samples

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/parity/aromni_losses.safetensors"
VOCABULARY_7B = get_vocabulary("aromni_7b")


class Remembered(nnx.Module):
  """A decoder with the final hidden states of the fixture, wherever packing puts its samples."""

  def __init__(self, hidden: np.ndarray, head: np.ndarray, second: tuple[int, ...]):
    self.hidden = nnx.Param(jnp.asarray(hidden))  # [samples, T, D]
    self.head = nnx.Param(jnp.asarray(head))
    self.second = second  # id at position 1, by which samples are told apart

  def __call__(self, tokens, positions, segment_ids):
    at = jnp.arange(tokens.shape[1]) - positions + 1
    second = jnp.take_along_axis(tokens, at, axis=1)
    sample = jnp.argmax(second[..., None] == jnp.array(self.second), axis=-1)
    return self.hidden[...][sample, positions]


@pytest.fixture(scope="module")
def released():
  with safe_open(FIXTURE, "np") as f:
    return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["meta"])  # noqa: SIM118


def released_samples(tensors, kind, tasks):
  """The fixture's sequences as samples; a response begins after eoh and the two ids of "GPT:"."""
  ids, seen = tensors[f"{kind}.in.input_ids"], tensors[f"{kind}.in.attention_mask"].sum(1)
  for i, (row, n, task) in enumerate(zip(ids, seen, tasks, strict=True)):
    tokens = row[:n].astype(np.int32)
    yield Sample(
      tokens, task, int(np.flatnonzero(tokens == VOCABULARY_7B.eoh)[0]) + 3, f"{kind}{i}"
    )


NO_PERC = {"loss.perceptual_weight": 0.0}
W1 = NO_PERC | {"data.loss_weights.boosted": 1.0}
SEG1 = NO_PERC | {"data.loss_weights.transcript": 1.0}


@pytest.mark.parametrize(
  "kind, want, changed, rows, accumulate",
  [
    ("pre", "fp32", {}, 3, 1),
    ("pre", "fp32", {"loss.vocab_block": 4300, "data.max_samples": 1}, 4, 2),
    ("pre", "no_perc", NO_PERC, 3, 3),
    ("pre", "w1", W1, 3, 1),
    ("sft", "fp32", {"loss.vocab_block": 4300}, 2, 2),
    ("sft", "no_perc", NO_PERC, 2, 1),
    ("sft", "seg1_no_perc", SEG1, 2, 1),
  ],
)
def test_is_the_released_loss(released, tmp_path, kind, want, changed, rows, accumulate):
  """What `configs/` set for the released recipe, on its own sequences and hidden states."""
  tensors, meta = released
  preset, tasks = {
    "pre": (pretrain_7b, meta["tasks"]),
    "sft": (finetune_7b, ["dialogue", "dialogue"]),
  }[kind]
  samples = list(released_samples(tensors, kind, tasks))
  token_shards.write(tmp_path / "tokens", {"train": samples}, VOCABULARY_7B, {})
  config = preset.get_config("released")
  config.loss.vocab_block = 0  # the fixture's head has 12,900 ids
  if kind == "sft":
    config.data.loss_weights.transcript = 3.0  # seg_weight of the fixture
  config.data.max_samples = 0
  config.model.max_segments = 0
  config.accumulate = accumulate
  config.batch_size = rows
  config.data.shards = str(tmp_path / "tokens")
  config.data.sequence_length = 1118
  config.update_from_flattened_dict(changed)
  config = to_dataclass(TrainConfig, config.to_dict())
  batch = next(make_train_iterator(config.data, VOCABULARY_7B, batch_size=rows))
  assert (batch.segment_ids > 0).sum() == sum(len(s.tokens) for s in samples)  # all of them

  second = tuple(int(s.tokens[1]) for s in samples)
  decoder = Remembered(tensors[f"{kind}.in.hidden"], tensors["w.lm_head"].T, second)
  params = {"decoder": nnx.state(decoder)}
  if config.loss.perceptual_weight:
    kernel, bias = jnp.asarray(tensors["w.proj.weight"].T), jnp.asarray(tensors["w.proj.bias"])
    params["projection"] = {"kernel": kernel, "bias": bias}
  optimizer, trained = make_optimizer(config.optimizer), setup_lib.trained_groups(config)
  step_config = step_lib.StepConfig(
    nnx.graphdef(decoder), VOCABULARY_7B, config.loss, optimizer, trained, accumulate
  )
  opt_state = optimizer.init({name: params[name] for name in trained})
  state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, opt_state)
  batch = jax.tree.map(jnp.asarray, batch)
  table = jnp.asarray(tensors["w.table"])
  step = jax.jit(lambda *args: step_lib.train_step(*args, config=step_config))
  after, metrics = step(state, batch, table, jnp.float32(1e-3))
  np.testing.assert_allclose(metrics["loss"], tensors[f"{kind}.out.loss.{want}"], rtol=1e-6)
  if want != "fp32":
    return
  # Adam's first moment after one step is 0.1 of the gradient, which is clipped to norm 1.
  grads = after.opt_state[1].mu["decoder"]
  scale = 10.0 * max(1.0, float(metrics["grad_norm"]))
  grad = grads["hidden"][...] * scale
  reference = tensors[f"{kind}.out.grad_hidden"]
  np.testing.assert_allclose(grad, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())
  if kind == "pre":
    reference = tensors["pre.out.grad_lm_head_rows"]
    head = grads["head"][...].T * scale
    np.testing.assert_allclose(head[: len(reference)], reference, rtol=1e-4, atol=1e-9)


# Everything that a batch can have, in eight rows of 384: all tasks, a dialogue of two turns,
# pictures of prompts and of responses, padding at the ends of the rows.
VOCABULARY = get_vocabulary("demo")
LENGTH, ROWS = 384, 8
TABLE = np.random.default_rng(7).normal(size=(len(VOCABULARY.image), 8)).astype(np.float32)
RATE = 0.01


def make_samples():
  samples = list(random_samples(31))
  one, other = (s for s in samples[:18] if s.task == "dialogue")
  turns = np.concatenate([one.tokens[:-1], other.tokens[1:]])
  spans = [one.spans[0] - [0, 1], other.spans[0] + len(one.tokens) - 2]  # the first has no eos
  spans = np.array(spans, np.int32)
  return [*samples, Sample(turns, "dialogue", int(spans[0, 0]), "two turns", spans)]


def make_config(recipe, path, accumulate=1, vocab_block=0):
  """A training of a tiny decoder with all that a recipe has, and more."""
  c = base.get_config()
  base.apply(c, recipe.training)
  base.apply(c, {
    "paper": {
      "data.loss_weights.prompt": 0.5,
      "data.loss_weights.response": 1.5,
      "data.loss_weights.boosted": 3.0,
      "data.loss_weights.boosted_tasks": ("image_caption", "text_to_speech"),
      "data.loss_weights.transcript": 2.0,
      "model.norm_placement": "swin",
      "optimizer.clip_norm": 0.3,  # clips
    },
    "released": {
      "data.loss_weights.prompt": 0.0,
      "data.loss_weights.transcript": 0.5,
      "loss.perceptual_tasks": ("text_to_image", "dialogue"),
      "optimizer.clip_norm": 100.0,  # does not
    },
  }[recipe.name])  # fmt: skip
  base.apply(c, {
    "batch_size": ROWS,
    "accumulate": accumulate,
    "data.shards": str(path),
    "data.sequence_length": LENGTH,
    "loss.vocab_block": vocab_block,
    "loss.z_loss_weight": 0.02,
    "optimizer.epsilon": 1e-3,  # not far below a gradient, so that its size counts
    "optimizer.weight_decay": 0.5,
    "model.vocab_size": VOCABULARY.size,
    "model.embed_dim": 16,
    "model.mlp_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.dtype": "float32",
    "model.remat_policy": "none",
  })  # fmt: skip
  return to_dataclass(TrainConfig, c.to_dict())


def weight_of(sample, at, weights):
  """Weight of the id at a position, as a target."""
  ids = sample.tokens.tolist()
  weight = weights.prompt
  for start, stop in sample.spans:
    if start <= at < stop:
      boosted = sample.task in weights.boosted_tasks and ids[at] != VOCABULARY.eos
      weight = weights.boosted if boosted else weights.response
  if VOCABULARY.instruction in ids[:at]:
    opened = at - 1 - ids[:at][::-1].index(VOCABULARY.instruction)
    if VOCABULARY.response not in ids[opened : at + 1]:
      weight *= weights.transcript
  return weight


def listed(samples, config):
  """(sample, position, target, weight) of every target, and (sample, position, code) of every
  state that is compared with a picture."""
  targets, pictures = [], []
  for i, sample in enumerate(samples):
    for t in range(len(sample.tokens) - 1):
      target = int(sample.tokens[t + 1])
      weight = weight_of(sample, t + 1, config.data.loss_weights)
      targets.append((i, t, target, weight))
      tasks = config.loss.perceptual_tasks
      if weight and target in VOCABULARY.image and (not tasks or sample.task in tasks):
        at = t + (config.loss.perceptual_pairing == "own_position")
        pictures.append((i, at, target - VOCABULARY.image.start))
  return targets, pictures


def naive_losses(samples, hidden, head, projection, config):
  """Everything that a step reports but for the gradient, in a loop over the targets, float64."""
  sums, counts = {}, {}

  def add(name, value, count):
    sums[name] = sums.get(name, 0.0) + value
    counts[name] = counts.get(name, 0.0) + count

  targets, pictures = listed(samples, config)
  for i, t, target, weight in targets:
    logits = hidden[i, t].astype(np.float64) @ head
    log_z = np.log(np.exp(logits).sum())
    count = weight if config.loss.normaliser == "weights" else float(weight > 0)
    add("loss/next_token", weight * (log_z - logits[target]), count)
    add("loss/z_loss", weight * log_z**2, count)
    kind = MODALITIES[VOCABULARY.modality_of(np.array([target]))[0]]
    add(f"modality/{kind}", weight * (log_z - logits[target]), weight)
    add(f"task/{samples[i].task}", weight * (log_z - logits[target]), weight)
  for i, t, code in pictures:
    error = (hidden[i, t] @ projection["kernel"] + projection["bias"] - TABLE[code]) ** 2
    squared = config.loss.perceptual_distance == "squared_l2"
    add("loss/perceptual", error.sum() if squared else error.mean(), 1.0)
  means = {name: sums[name] / counts[name] for name in sums if counts[name]}
  loss = means["loss/next_token"] + 0.02 * means["loss/z_loss"]
  means["loss"] = loss + config.loss.perceptual_weight * means["loss/perceptual"]
  means["tokens"] = sum(len(s.tokens) for s in samples)
  return means


def alone(samples):
  """The samples side by side: none shares a row, the ends are zeros."""
  tokens = np.zeros((len(samples), LENGTH), np.int32)
  for row, sample in zip(tokens, samples, strict=True):
    row[: len(sample.tokens)] = sample.tokens
  return tokens, np.broadcast_to(np.arange(LENGTH), tokens.shape)


def naive_step(samples, setup, params, config):
  """Gradient of the loss written down at once, and the parameters that Adam makes of it."""
  targets, pictures = listed(samples, config)
  i, t, target, weight = (np.array(x) for x in zip(*targets, strict=True))
  at = tuple(np.array(x) for x in zip(*pictures, strict=True))
  tokens, positions = alone(samples)
  loss = config.loss

  def total(trained):
    groups = params | trained
    decoder = setup.decoder(groups)
    hidden = decoder(tokens, positions)
    logits = hidden[i, t] @ decoder.head[...]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - logits[np.arange(len(i)), target]
    norm = weight.sum() if loss.normaliser == "weights" else (weight > 0).sum()
    kernel, bias = (groups["projection"][k][...] for k in ("kernel", "bias"))
    error = (hidden[at[0], at[1]] @ kernel + bias - TABLE[at[2]]) ** 2
    error = error.sum(-1) if loss.perceptual_distance == "squared_l2" else error.mean(-1)
    next_token = (weight * (nll + 0.02 * log_z**2)).sum() / norm
    return next_token + loss.perceptual_weight * error.mean()

  names = ("decoder", "projection") if loss.train_projection else ("decoder",)
  trained = {name: params[name] for name in names}
  value, grads = jax.jit(jax.value_and_grad(total))(trained)
  norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
  optimizer = config.optimizer
  assert (norm > optimizer.clip_norm) == (loss.normaliser == "tokens"), norm
  scale = min(1.0, optimizer.clip_norm / norm)

  def after(path, p, g):
    g = np.asarray(g, np.float64) * scale
    update = g / (np.abs(g) + optimizer.epsilon)  # both moments are corrected in the first step
    decays = "kernel" in jax.tree_util.keystr(path)
    return p - RATE * (update + optimizer.weight_decay * decays * np.asarray(p, np.float64))

  new = jax.tree_util.tree_map_with_path(after, trained, grads)
  return float(value), norm, params | new


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a step of a recipe gives, from samples that were never packed."""

  path: pathlib.Path
  params: dict
  means: dict
  norm: float
  after: dict


@pytest.fixture(scope="module", params=[PAPER, RELEASED], ids=lambda r: r.name)
def expected(request, tmp_path_factory):
  path, samples = tmp_path_factory.mktemp("all") / "tokens", make_samples()
  token_shards.write(path, {"train": samples}, VOCABULARY, {})
  config = make_config(request.param, path)
  setup = setup_lib.build(config, VOCABULARY, TABLE.shape, one_mesh((1, 1, 1)))
  rng = np.random.default_rng(0)  # so large that no two ids are equally likely
  params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), setup.state.params)
  hidden = np.asarray(jax.jit(lambda params: setup.decoder(params)(*alone(samples)))(params))
  head = np.asarray(params["decoder"]["head"][...], np.float64)
  projection = {k: np.asarray(v[...], np.float64) for k, v in params["projection"].items()}
  means = naive_losses(samples, hidden, head, projection, config)
  value, norm, after = naive_step(samples, setup, params, config)
  assert value == pytest.approx(means["loss"], rel=1e-5)
  assert {f"task/{task}" for task in TASKS} < means.keys()
  return request.param, Expected(path, params, means, norm, after)


def one_mesh(sizes):
  return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, options",  # micro-batches and ids per block of logits, of each recipe
  [
    ((1, 1, 1), {"paper": (1, 0), "released": (4, 368)}),
    ((2, 2, 2), {"paper": (2, 368), "released": (1, 0)}),
    ((1, 8, 1), {"paper": (1, 0), "released": (1, 368)}),
  ],
)
def test_is_a_loop_over_the_targets(expected, mesh, options):
  recipe, want = expected
  accumulate, vocab_block = options[recipe.name]
  config = make_config(recipe, want.path, accumulate, vocab_block)
  setup = setup_lib.build(config, VOCABULARY, TABLE.shape, one_mesh(mesh))
  batch = next(make_train_iterator(config.data, VOCABULARY, batch_size=ROWS))
  tokens = (batch.segment_ids > 0).sum(axis=1)
  assert tokens.sum() == want.means["tokens"] and len(set(tokens)) > 3  # rows are not alike
  moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), setup.state.opt_state)
  state = step_lib.TrainState(np.zeros((), np.int32), want.params, moments)
  state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, setup.state)
  batch = jax.device_put(batch, setup.batch.tokens.sharding)
  table = jax.device_put(TABLE, setup.table.sharding)

  evaluated = {}
  if mesh == (1, 1, 1):
    evaluated = step_lib.summarise(*setup.evaluate(state.params, batch, table), config.loss)
  after, metrics = setup.step(state, batch, table, jnp.float32(RATE))
  for name, value in want.means.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert not evaluated or float(evaluated[name]) == pytest.approx(value, rel=1e-5), name
  others = set(metrics) - set(want.means) - {"grad_norm", "learning_rate"}
  assert not any(float(metrics[name]) for name in others)  # nothing of the batch is of these
  assert float(metrics["grad_norm"]) == pytest.approx(want.norm, rel=1e-4)
  assert int(after.step) == 1

  def same(path, got, wanted, before):
    got, wanted = ((np.asarray(x, np.float64) - before) / RATE for x in (got, wanted))
    np.testing.assert_allclose(got, wanted, atol=2e-4, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(same, jax.device_get(after.params), want.after, want.params)
