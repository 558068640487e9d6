import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals
from safetensors import safe_open

from aromni_jax.configs import base
from aromni_jax.models import attention as attention_lib
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import remat, sharding
from aromni_jax.models.config import DecoderConfig
from aromni_jax.planning import estimate
from aromni_jax.training.config import TrainConfig, to_dataclass
from tests import released, tiny

PARITY = pathlib.Path(__file__).parents[1] / "fixtures/parity"
TINY = dataclasses.replace(tiny.DECODER, vocab_size=64, init_std=0.2)
POLICIES = [name for name, entry in remat.REMAT.items() if entry.keeps is not None]


@functools.cache
def load(name):
  with safe_open(PARITY / f"chameleon_dec_{name}.safetensors", "np") as f:
    tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    hf = json.loads(f.metadata()["meta"])["config"]
  config = DecoderConfig(
    vocab_size=hf["vocab_size"],
    embed_dim=hf["hidden_size"],
    mlp_dim=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=hf["num_attention_heads"],
    num_kv_heads=hf["num_key_value_heads"],
    head_dim=hf["hidden_size"] // hf["num_attention_heads"],
    norm_placement="swin" if hf["swin_norm"] else "pre",
    dtype="float32",
    per_head_norm=True,
  )
  weights = {key[2:]: t for key, t in tensors.items() if key.startswith("w.")}
  params = released.stacked(weights, "hf", config)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0))))
  nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
  return tensors, config, nnx.merge(graphdef, state)


@nnx.jit
def forward(decoder, tokens, positions, segment_ids=None):
  hidden = decoder(tokens, positions, segment_ids)
  return hidden, decoder.logits(hidden)


def make(config, seed=0):
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0))))
  params = jax.jit(lambda key: decoder_lib.init_params(config, key)[1])(jax.random.key(seed))
  return graphdef, params


def inputs(batch=2, length=12, seed=0):
  tokens = jax.random.randint(jax.random.key(seed), (batch, length), 0, TINY.vocab_size)
  return tokens, jnp.broadcast_to(jnp.arange(length), (batch, length))


@pytest.mark.parametrize("name", ["std", "swin", "gqa"])
def test_equals_the_reference(name):
  ref, _, decoder = load(name)
  mask = ref["in.attention_mask"].astype(bool)
  positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
  hidden, logits = forward(decoder, ref["in.input_ids"], positions, mask.astype(np.int32))
  np.testing.assert_allclose(hidden[mask], ref["out.last_hidden"][mask], atol=1e-4)
  np.testing.assert_allclose(logits[mask], ref["out.logits"][mask], atol=1e-4)
  left = ref["in.left_attention_mask"].astype(bool)
  _, logits = forward(
    decoder, ref["in.left_input_ids"], ref["in.left_position_ids"], left.astype(np.int32)
  )
  np.testing.assert_allclose(logits[left], ref["out.left_logits"][left], atol=1e-4)


@pytest.mark.parametrize("name", ["std", "swin", "gqa"])
def test_every_layer_equals_the_reference(name):
  ref, config, decoder = load(name)
  mask = ref["in.attention_mask"].astype(bool)
  positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
  hidden = decoder.embedding[...][ref["in.input_ids"]]
  np.testing.assert_allclose(hidden[mask], ref["out.hidden.0"][mask], atol=1e-5)
  rotary = decoder_lib.rotary_angles(positions, config, jnp.float32)
  graphdef, stacked = nnx.split(decoder.layers)
  for i in range(config.num_layers):
    layer = nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))
    hidden, _ = layer(hidden, rotary, positions, mask.astype(np.int32), None)
    last = i == config.num_layers - 1  # the reference gives the last one after the final norm
    out = decoder.norm(hidden) if last else hidden
    np.testing.assert_allclose(out[mask], ref[f"out.hidden.{i + 1}"][mask], atol=1e-4)


@pytest.mark.parametrize("name", ["std", "swin", "gqa"])
def test_greedy_decoding_with_the_cache_equals_the_reference(name):
  ref, config, decoder = load(name)
  prompt = jnp.asarray(ref["in.prompt"])

  @nnx.jit
  def greedy(decoder):
    cache = decoder_lib.init_cache(config, 1, 40)
    hidden, cache = decoder(prompt, jnp.arange(8)[None], cache=cache)

    def step(carry, position):
      hidden, cache = carry
      logits = decoder.logits(hidden[:, -1])
      token = logits.argmax(-1)
      out = decoder(token[:, None], position[None, None], cache=cache)
      return out, (token[0], logits[0])

    _, out = jax.lax.scan(step, (hidden[:, -1:], cache), jnp.arange(8, 40))
    return out

  tokens, logits = greedy(decoder)
  np.testing.assert_array_equal(tokens, ref["out.greedy"][0, 8:])
  np.testing.assert_allclose(logits, ref["out.greedy_step_logits"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("consume", [False, True])
def test_the_decoder_for_steps_is_the_same_function(consume):
  decoder = decoder_lib.Decoder(TINY, rngs=nnx.Rngs(0))
  tokens, positions = inputs()
  hidden = decoder(tokens, positions)
  stacked = decoder.layers.mlp.up.kernel[...]
  steps = decoder_lib.unroll(decoder, consume=consume)
  np.testing.assert_allclose(steps(tokens, positions), hidden, atol=1e-5)
  assert stacked.is_deleted() == consume


def test_released_size():
  config = DecoderConfig()
  decoder = nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0)))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(decoder))) == 7_013_158_912
  assert config.num_params() == 7_013_158_912


@pytest.mark.slow
def test_packed_samples_do_not_see_each_other():
  graphdef, params = make(TINY)
  tokens, _ = inputs(1, 12)
  positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
  segments = jnp.array([[1] * 5 + [2] * 7])
  packed, _ = forward(nnx.merge(graphdef, params), tokens, positions, segments)
  alone = [
    forward(nnx.merge(graphdef, params), tokens[:, a:b], jnp.arange(b - a)[None])[0]
    for a, b in ((0, 5), (5, 12))
  ]
  np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=1e-5)


def gradient(config, params, graphdef):
  tokens, positions = inputs(8)

  def loss(params):
    decoder = nnx.merge(graphdef, params)
    return jnp.mean(decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens))) ** 2)

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def tiny_gradient():
  graphdef, params = make(TINY)
  return gradient(TINY, params, graphdef)


@pytest.mark.slow
@pytest.mark.parametrize(
  "change", [*({"remat_policy": p} for p in POLICIES), {"scan_layers": False}]
)
def test_how_it_is_computed_changes_nothing(tiny_gradient, change):
  graphdef, params = make(TINY)
  other, _ = make(dataclasses.replace(TINY, **change))
  assert graphdef != other
  got = gradient(TINY, params, other)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tiny_gradient, got)


def kept(config, length=12):
  """(name or "", bytes) of what a layer's backward pass keeps of [2, length] tokens, beside the
  parameters and what all layers share."""
  graphdef, stacked = nnx.split(
    nnx.eval_shape(lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0))).layers
  )
  params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stacked)
  positions = jnp.broadcast_to(jnp.arange(length), (2, length))
  rotary = decoder_lib.rotary_angles(positions, config, config.compute_dtype)

  def body(x, params):
    return nnx.merge(graphdef, params)(x, rotary, positions, jnp.ones_like(positions), None)

  x = jnp.zeros((2, length, config.embed_dim), config.compute_dtype)
  out = []
  for value, source in saved_residuals(remat.checkpoint(body, config.remat_policy), x, params):
    name = re.match(r"named '(\w+)'", source)
    if source.startswith("output of shard_map"):  # the kernel, whose names are inside
      out.append((attention_lib.CONTEXT, value.size * value.dtype.itemsize))
    elif name or source == "from the argument x" or source.startswith("output of"):
      out.append((name[1] if name else "", value.size * value.dtype.itemsize))
  return out


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("placement", ["swin", "pre"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_keeps_what_its_remat_policy_names(monkeypatch, policy, placement, backend):
  """By name and by bytes; those are what plans reckon with."""
  platform = {"xla": "cpu", "splash": "tpu"}[backend]
  monkeypatch.setattr(attention_lib, "platform_of_mesh", lambda: platform)
  length, head_dim = (128, 128) if backend == "splash" else (12, 8)
  config = dataclasses.replace(
    TINY,
    remat_policy=policy,
    norm_placement=placement,
    attention=backend,
    head_dim=head_dim,
    num_kv_heads=4,
    mlp_dim=96,
    dtype="bfloat16",
  )
  found = kept(config, length)
  names = {name for name, _ in found}
  unused = {"mlp_out"} if placement == "pre" else set()  # nothing after it needs it
  assert names == {"", *remat.REMAT[policy].keeps} - unused
  run = to_dataclass(TrainConfig, base.get_config().to_dict())
  data = dataclasses.replace(run.data, sequence_length=length)
  run = dataclasses.replace(run, model=config, data=data)
  assert sum(size for _, size in found) == estimate.kept_bytes(run, 1, platform) * 2 * length


def test_without_remat_all_is_kept():
  swin = dataclasses.replace(TINY, norm_placement="swin")
  sizes = [
    sum(size for _, size in kept(dataclasses.replace(swin, remat_policy=policy)))
    for policy in remat.REMAT
  ]
  assert sizes == sorted(set(sizes))  # each policy keeps more than the one before


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_every_mesh_gives_the_same_gradient(tiny_gradient, mesh):
  graphdef, params = make(TINY)
  mesh = sharding.make_mesh(*mesh)
  shardings = sharding.state_shardings(params, mesh)
  with jax.set_mesh(mesh):
    init = jax.jit(lambda key: decoder_lib.init_params(TINY, key)[1], out_shardings=shardings)
    born = init(jax.random.key(0))  # sharded from birth, and the same numbers
    # To the last bit but one: jax 0.12 compiles the normal distribution of a shard otherwise.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), params, born)
    got = gradient(TINY, born, graphdef)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tiny_gradient, got)
  kernel = born["layers"]["mlp"]["up"]["kernel"][...]
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // fsdp, 64 // tensor)


def test_gradients_of_unstacked_layers_are_concatenated():
  """A sum of padded stacks, the gradient of slices, costs as much again as the layers."""
  stacked = {"kernel": jnp.arange(24.0).reshape(3, 2, 4)}

  def total(stacked):
    layers = decoder_lib._unstack(stacked, 3)
    return sum((i + 1) * layer["kernel"].sum() for i, layer in enumerate(layers))

  got = jax.grad(total)(stacked)["kernel"]
  np.testing.assert_array_equal(got, np.broadcast_to([[[1.0]], [[2.0]], [[3.0]]], (3, 2, 4)))
  assert "pad" not in str(jax.make_jaxpr(jax.grad(total))(stacked))


@pytest.mark.slow
def test_splash_equals_xla():
  """The TPU kernel in interpret mode."""
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 256, heads, 128)) for i, heads in enumerate((2, 1, 1))
  )
  segments = jnp.array([[1] * 100 + [2] * 156])
  want = attention_lib.attention(q, k, v, segment_ids=segments, backend="xla")
  heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
  got = attention_lib.splash(*heads_first, segments, interpret=True).swapaxes(1, 2)
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.slow
def test_wrong_configs_are_named():
  with pytest.raises(ValueError, match="model.norm_placement 'post'"):
    dataclasses.replace(TINY, norm_placement="post")
  with pytest.raises(ValueError, match="num_heads 4 is not a multiple"):
    dataclasses.replace(TINY, num_kv_heads=3)
  with pytest.raises(ValueError, match="does not cover 8 devices"):
    sharding.make_mesh(3, 1, 1)
  graphdef, params = make(dataclasses.replace(TINY, vocab_size=63))
  with pytest.raises(ValueError, match="embedding"):
    sharding.state_shardings(params, sharding.make_mesh(1, 4, 2))
