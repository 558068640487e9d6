"""Tokens per second of greedy decoding on the CPU, ours and the peer's `generate`.

  python -m benchmarks.decode

Prompt 64, 256 new tokens, batch 1 and 8, fp32. Ours decodes through the state machine, a picture
whose response is just as long. Both run once before they are measured; runs alternate between them.
"""

import json
import time

import numpy as np
import torch
from absl import app, flags
from flax import nnx

from aromni_jax.decoding.engine import Engine
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models.config import DecoderConfig
from aromni_jax.vocabulary import SPECIAL_NAMES, Vocabulary
from benchmarks import peer

_RUNS = flags.DEFINE_integer("runs", 3, "Measured runs of each.")
_PROMPT, _NEW = 64, 256

MODEL = DecoderConfig(
  vocab_size=16384,
  embed_dim=512,
  mlp_dim=1376,
  num_layers=12,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  dtype="float32",
  remat_policy="none",
  scan_layers=False,
)
VOCABULARY = Vocabulary(
  name="benchmark",
  size=MODEL.vocab_size,
  text=range(16, 8192),
  image=range(8192, 12288),
  speech=range(12288, 16384),
  image_length=_NEW - 4,  # boi, codes, eoi, eom, eos
  speech_rate=40,
  **{name: i for i, name in enumerate(SPECIAL_NAMES)},
)


def main(argv: list[str]) -> None:
  del argv
  engine = Engine(decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(0)), VOCABULARY)
  model = peer.make_chameleon(MODEL).eval()
  result = {"benchmark": "decode"}
  for batch in (1, 8):
    prompts = np.random.default_rng(0).integers(16, 8192, (batch, _PROMPT), dtype=np.int32)

    def ours(prompts=prompts, batch=batch) -> int:
      out = engine.generate(list(prompts), ["text_to_image"] * batch, max_new_tokens=_NEW)
      return sum(len(ids) for ids in out)

    def theirs(prompts=prompts) -> int:
      ids = torch.from_numpy(prompts.astype(np.int64))
      with torch.no_grad():
        out = model.generate(
          ids,
          attention_mask=torch.ones_like(ids),
          max_new_tokens=_NEW,
          min_new_tokens=_NEW,
          do_sample=False,
        )
      return out[:, _PROMPT:].numel()

    speeds = {"ours": [], "peer": []}
    for i in range(_RUNS.value + 1):
      for name, run in (("ours", ours), ("peer", theirs)):
        began = time.perf_counter()
        tokens = run()
        if i:
          speeds[name].append(tokens / (time.perf_counter() - began))
    medians = {k: float(np.median(v)) for k, v in speeds.items()}
    result |= {
      f"ours_batch_{batch}_tokens_per_second": round(medians["ours"], 1),
      f"peer_batch_{batch}_tokens_per_second": round(medians["peer"], 1),
      f"ratio_batch_{batch}": round(medians["ours"] / medians["peer"], 3),
    }
  print(json.dumps(result | {"runs": _RUNS.value} | peer.versions()))


if __name__ == "__main__":
  app.run(main)
