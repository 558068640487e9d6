import dataclasses
import re

import pytest

from aromni_jax.cluster.hardware import parse_topology
from aromni_jax.configs import finetune_7b, pods, pretrain_7b
from aromni_jax.planning import estimate, report, sampling
from aromni_jax.planning.network import DCN, ICI
from aromni_jax.training.config import TrainConfig, to_dataclass

MODULES = (pretrain_7b, finetune_7b)


def config(topology="v5e:16x16", module=pretrain_7b, **changes):
  run = to_dataclass(TrainConfig, module.get_config(topology).to_dict())
  return estimate._changed(run, {name.replace("__", "."): v for name, v in changes.items()})


def estimated(topology="v5e:16x16", **changes):
  return estimate.estimate(config(topology, **changes), parse_topology(topology))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("topology", pods.PODS)
def test_every_7b_configuration_fits_its_machine(module, topology):
  run = config(topology, module)
  found = estimate.check(run, parse_topology(topology))
  assert run.batch_size <= found.largest_batch
  assert 0.3 < found.mfu < 1
  text = report.estimated(run, found)
  assert f"largest step that fits: {found.largest_batch} rows" in text


def test_parameters_are_counted_exactly():
  """Of the state, what is split is divided by 256 chips; norms and the like are whole."""
  found, run = estimated(), config()
  total = run.model.num_params() + 256 * (run.model.embed_dim + 1)  # and the projection
  small = sum(p.local_bytes for p in found.parameters if not any(p.spec))
  assert sum(4 * _size(p) for p in found.parameters) == 4 * total
  assert small < 3 * 10**6
  assert found.memory["parameters"] == pytest.approx((4 * total - small) / 256 + small)
  assert found.memory["optimiser"] == 2 * found.memory["parameters"] + 4  # and Adam's counter
  halved = estimated(optimizer__mu_dtype="bfloat16")
  assert halved.memory["optimiser"] == 1.5 * found.memory["parameters"] + 4


def _size(parameter):
  size = 1
  for n in parameter.shape:
    size *= n
  return size


def test_kept_activations_by_hand():
  """Of a token and layer, in bfloat16: with "full" the input; with "norms" q, k, v, the context and
  its float32 statistics of 32 heads, and the branches' products."""
  run = config(model__remat_policy="full")
  assert estimate.kept_bytes(run, 1, "tpu") == 2 * 4096
  run = config(model__remat_policy="norms")
  assert (
    estimate.kept_bytes(run, 1, "tpu")
    == 2 * (4096 + 3 * 4096 + 4096 + 4096 + 4096 + 2 * 11008) + 128
  )
  # Split over two chips: all but what is embed_dim wide.
  assert (
    estimate.kept_bytes(run, 2, "tpu") == 2 * (4096 + 3 * 2048 + 2048 + 4096 + 4096 + 2 * 5504) + 64
  )


def test_what_attention_keeps_depends_on_its_backend():
  """The kernels keep a float32 of each head; XLA's computes its softmax again."""
  run = config(model__remat_policy="norms")
  fused = estimate.kept_bytes(run, 1, "tpu")
  assert estimate.kept_bytes(run, 1, "gpu") == fused
  assert estimate.kept_bytes(run, 1, "cpu") == fused - 4 * 32
  assert estimate.kept_bytes(config(model__attention="xla"), 1, "tpu") == fused - 4 * 32


def test_an_attention_that_the_chips_do_not_have_is_refused():
  with pytest.raises(ValueError, match="^model.attention 'splash' needs a TPU.*platform gpu"):
    estimate.check(config("h100:8", model__attention="splash"), parse_topology("h100:8"))


def test_what_is_computed_again_by_hand():
  """Products of a layer per token: 4 of 4096^2 and 3 of 4096 * 11008, and causal attention."""
  attention, mlp = 2 * 32 * 128 * 4096.0, 2 * 4096 * 11008.0
  everything = 4 * 2 * 4096**2 + attention + 3 * mlp
  want = {"full": everything, "mlp": 2 * mlp, "up": mlp, "norms": 0, "none": 0}
  for policy, flops in want.items():
    model = config(model__remat_policy=policy).model
    assert estimate._computed_again(model, attention) == 32 * flops


def test_more_rows_take_more_memory():
  totals = [estimated(batch_size=256 * n).total_memory for n in (1, 2, 3, 4)]
  assert totals == sorted(set(totals))
  kept = "activations kept for the backward pass"
  one, two = (estimated(batch_size=256 * n).memory for n in (1, 2))
  assert two[kept] == 2 * one[kept] and two["parameters"] == one["parameters"]


def test_accumulation_halves_activations_and_holds_one_more_gradient():
  one, two = (estimated(batch_size=512, accumulate=n) for n in (1, 2))
  kept = "activations kept for the backward pass"
  assert two.memory[kept] == one.memory[kept] / 2
  assert two.memory["gradients"] == 1.5 * one.memory["gradients"]
  assert two.model_flops == one.model_flops and two.tokens == one.tokens


def test_policies_that_keep_more_take_more_memory_and_compute_less():
  found = [estimated(model__remat_policy=policy) for policy in ("full", "mlp", "up", "norms")]
  memory, compute = [f.total_memory for f in found], [f.compute for f in found]
  assert memory == sorted(set(memory)) and compute == sorted(set(compute), reverse=True)


def test_the_largest_batch_is_the_largest():
  largest = estimated().largest_batch
  assert largest % 256 == 0
  assert estimate.fits(estimated(batch_size=largest))
  assert not estimate.fits(estimated(batch_size=largest + 256))


@pytest.mark.parametrize(
  "topology, changes",
  [
    ("v5e:16x16", {"model.remat_policy": "none"}),  # recompute more
    ("v5e:16x16", {"batch_size": 4096}),  # fewer rows, or micro-batches
    ("v5e:16x16", {"mesh.data": 64, "model.remat_policy": "full"}),  # too many copies
    ("2xv5e:16x16", {"mesh.data": 128, "model.remat_policy": "full"}),
    ("h100:8", {"accumulate": 1, "model.remat_policy": "none"}),
  ],
)
def test_what_a_refusal_proposes_fits(topology, changes):
  run, where = estimate._changed(config(topology), changes), parse_topology(topology)
  with pytest.raises(ValueError, match="the run needs .* GiB on each chip of ") as e:
    estimate.check(run, where)
  assert "This fits: " in str(e.value), e.value
  options = dict(re.findall(r"--config\.([\w.]+)=(\w+)", str(e.value)))
  options = {name: int(v) if v.isdigit() else v for name, v in options.items()}
  assert options
  fixed = estimate._changed(run, options)
  assert estimate.fits(estimate.check(fixed, where))


def test_where_nothing_fits_it_says_so():
  """Four chips have 64 GiB; the state alone is 7 billion times 12 bytes."""
  run, where = dataclasses.replace(config(), batch_size=4), parse_topology("v5e:2x2")
  with pytest.raises(ValueError, match="v5e:2x2, which has 15.7 .*No batch fits; take more chips"):
    estimate.check(run, where)
  assert estimate.estimate(run, where).largest_batch == 0


@pytest.mark.parametrize(
  "topology, changes, message",
  [
    ("v5e:16x16", {"batch_size": 300}, r"batch_size 300 is no multiple of 256.*take 256 or 512"),
    ("v5e:16x16", {"batch_size": 8}, r"batch_size 8 is no multiple of 256.*take 256$"),
    ("v5e:16x16", {"accumulate": 2}, "256 is no multiple of 512: .* config.accumulate 2 on"),
    ("2xv5e:16x16", {"mesh.data": 1}, "2 slices .*--config.mesh.data=2"),
    ("4xv5e:16x16", {}, "config.mesh.data is 2, no multiple of the 4 slices"),
    ("v5e:16x16", {"mesh.fsdp": 100}, "fsdp=100 tensor=1 does not cover 256 devices"),
    ("v5e:16x16", {"mesh.data": 3}, "does not cover 256 devices"),
  ],
)
def test_meshes_and_batches_that_do_not_divide(topology, changes, message):
  base = "2xv5e:16x16" if "x" in topology.split(":")[0] else topology
  run = estimate._changed(config(base), changes)
  with pytest.raises(ValueError, match=message):
    estimate.check(run, parse_topology(topology))


def test_only_gradients_of_copies_cross_slices():
  one, two = estimated(), estimated("2xv5e:16x16")
  assert {t.network for t in one.traffic} == {ICI}
  (crossing,) = (t for t in two.traffic if t.network == DCN)
  assert (crossing.what, crossing.opcode) == ("gradients of copies", "all-reduce")
  # Half of a chip's 1/256 of the bfloat16 gradients, out and in.
  params = config().model.num_params()
  assert crossing.seconds == pytest.approx(2 * 0.5 * 2 * params / 256 / 3.125e9, rel=0.01)
  assert two.seconds > one.seconds and two.tokens == 2 * one.tokens


def test_tensor_parallelism_sums_activations():
  assert "activations" not in {t.what for t in estimated().traffic}
  run = config("v5e:16x16", finetune_7b)
  found = estimate.estimate(run, parse_topology("v5e:16x16"))
  (sums,) = (t for t in found.traffic if t.what == "activations")
  assert sums.count == 4 * 32 and sums.nbytes == 3456 * 4096 * 2


def test_model_operations_and_utilisation():
  run, found = config(), estimated()
  assert found.model_flops == 256 * 4096 * run.model.flops_per_token(4096)
  assert found.mfu == pytest.approx(found.model_flops / (256 * 197e12) / found.seconds)
  assert found.mfu_of(2 * found.seconds) == pytest.approx(found.mfu / 2)


def test_keys_and_values_of_generation():
  assert sampling.kv_cache_bytes(config().model) == 2 * 32 * 32 * 128 * 2


def test_samples_while_training_are_counted():
  plain = estimate.estimate(config(), parse_topology("v5e:16x16"))
  run = dataclasses.replace(config(), sample_every=100)
  found = estimate.estimate(run, parse_topology("v5e:16x16"))
  codecs = found.total_memory - plain.total_memory
  assert plain.sampling == {} and codecs == found.sampling["codecs, for samples while training"]
  assert 0.3e9 < codecs < 1e9  # 66 and 82 million parameters, and the decoders of both
  copy = found.sampling["the engine's copy of the decoder"]
  assert copy == pytest.approx(2 * (7_013_158_912 - 65536 * 4096) / 256)
  assert estimate.fits(found)
  assert "while samples are made" in report.estimated(run, found)
  assert "while samples are made" not in report.estimated(config(), plain)
  short = dataclasses.replace(found, usable=found.total_memory + 1, sampling={"all": 1e12})
  with pytest.raises(ValueError, match=r"sampling needs 931.3 GiB .*--config.sample_every=0"):
    estimate.require_fit(run, short)


def test_without_the_perceptual_loss_no_table_is_counted():
  run = config()
  run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, perceptual_weight=0.0))
  found = estimate.estimate(run, parse_topology("v5e:16x16"))
  assert found.memory["image codec's embeddings, split and gathered"] == 0
  assert not any("projection" in p.name for p in found.parameters)
