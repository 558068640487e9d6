"""Real tokens per second of a training step on the CPU, ours and the peer's.

  python -m benchmarks.train_step

Both train the same shapes on the same samples, whose lengths are log-uniform from 64 to 512. We
pack samples into rows; the peer pads every batch to its longest sample, as AR-Omni's code does. A
step is forward, backward, clipping and Adam. Steps alternate between the two, so that both see the
same machine; the figures are sums over all of them.
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from aromni_jax.configs import base
from aromni_jax.data.batch import Batch
from aromni_jax.data.packing import PackedOrder
from aromni_jax.models import sharding
from aromni_jax.models.config import DecoderConfig
from aromni_jax.training import setup as setup_lib
from aromni_jax.training.config import TrainConfig, to_dataclass
from aromni_jax.training.terms import LossConfig
from aromni_jax.vocabulary import get_vocabulary
from benchmarks import peer

_STEPS = flags.DEFINE_integer("steps", 12, "Measured steps of each.")
_ROWS, _LENGTH = 8, 512
_RATE = 1e-4

MODEL = DecoderConfig(
  vocab_size=8192,
  embed_dim=256,
  mlp_dim=688,
  num_layers=4,
  num_heads=4,
  num_kv_heads=4,
  head_dim=64,
  dtype="float32",
  remat_policy="none",
  scan_layers=False,
)


def make_samples(count: int) -> list[np.ndarray]:
  """Returns random ids, int32[n] each, n log-uniform from 64 to 512."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.uniform(np.log(64), np.log(_LENGTH), count)).astype(int)
  return [rng.integers(10, MODEL.vocab_size, n, dtype=np.int32) for n in lengths]


def packed_batches(samples: list[np.ndarray]) -> list[Batch]:
  """Returns batches of packed rows, [8, 512]."""
  lengths = np.array([len(s) for s in samples])
  rng = np.random.default_rng(0)
  rows = list(PackedOrder(np.arange(len(samples)), lengths, _LENGTH, len(samples), rng))
  batches = []
  for start in range(0, len(rows) - _ROWS + 1, _ROWS):
    fields = {f.name: np.zeros((_ROWS, _LENGTH), np.int32) for f in dataclasses.fields(Batch)}
    fields["loss_weights"] = np.zeros((_ROWS, _LENGTH), np.float32)
    for b, row in enumerate(rows[start : start + _ROWS]):
      at = 0
      for segment, number in enumerate(row, 1):
        ids = samples[number]
        span = slice(at, at + len(ids))
        fields["tokens"][b, span] = ids
        fields["targets"][b, at : at + len(ids) - 1] = ids[1:]
        fields["loss_weights"][b, at : at + len(ids) - 1] = 1.0
        fields["positions"][b, span] = np.arange(len(ids))
        fields["segment_ids"][b, span] = segment
        at += len(ids)
    batches.append(Batch(**fields))
  return batches


def padded_batches(samples: list[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
  """Returns (ids, mask) of eight samples each, padded to the longest of them."""
  batches = []
  for start in range(0, len(samples) - _ROWS + 1, _ROWS):
    part = samples[start : start + _ROWS]
    ids = torch.ones((_ROWS, max(map(len, part))), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, sample in enumerate(part):
      ids[b, : len(sample)] = torch.from_numpy(sample)
      mask[b, : len(sample)] = 1
    batches.append((ids, mask))
  return batches


def make_ours():
  """Returns a function that runs one step on a batch and waits for it."""
  config = to_dataclass(TrainConfig, base.get_config().to_dict())
  config = dataclasses.replace(
    config,
    batch_size=_ROWS,
    model=MODEL,
    loss=LossConfig(perceptual_weight=0.0),
    data=dataclasses.replace(config.data, sequence_length=_LENGTH),
  )
  setup = setup_lib.build(config, get_vocabulary("demo"), None, sharding.make_mesh(1, 1, 1))
  state = setup.init(jax.random.key(0), {})

  def run(batch: Batch) -> None:
    nonlocal state
    state, metrics = setup.step(state, batch, None, jnp.float32(_RATE))
    jax.block_until_ready(metrics)

  return run


def make_peer():
  """Returns the same for the peer."""
  model = peer.make_chameleon(MODEL).train()
  optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, betas=(0.9, 0.95))

  def run(ids: torch.Tensor, mask: torch.Tensor) -> None:
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  return run


def main(argv: list[str]) -> None:
  del argv
  samples = make_samples(_ROWS * 3 * (_STEPS.value + 2))
  ours, theirs = make_ours(), make_peer()
  packed, padded = packed_batches(samples), padded_batches(samples)
  speeds = {"ours": [], "peer": []}
  computed = {"ours": [], "peer": []}
  for i in range(_STEPS.value + 2):
    for name, run, batch, real, size in (
      ("ours", ours, (packed[i],), int((packed[i].segment_ids > 0).sum()), packed[i].tokens.size),
      ("peer", theirs, padded[i], int(padded[i][1].sum()), padded[i][0].numel()),
    ):
      began = time.perf_counter()
      run(*batch)
      seconds = time.perf_counter() - began
      if i >= 2:  # the first ones compile and warm up
        speeds[name].append((real, seconds))
        computed[name].append(real / size)
  totals = {k: sum(r for r, _ in v) / sum(s for _, s in v) for k, v in speeds.items()}
  print(
    json.dumps(
      {
        "benchmark": "train_step",
        "ours_real_tokens_per_second": round(totals["ours"], 1),
        "peer_real_tokens_per_second": round(totals["peer"], 1),
        "ratio": round(totals["ours"] / totals["peer"], 3),
        "ours_real_share": round(float(np.mean(computed["ours"])), 3),
        "peer_real_share": round(float(np.mean(computed["peer"])), 3),
        "steps": _STEPS.value,
        **peer.versions(),
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
