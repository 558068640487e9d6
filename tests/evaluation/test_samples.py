"""Samples while training: on the parameters as they are split, one engine per run."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from aromni_jax import model_dir
from aromni_jax.decoding.engine import Engine
from aromni_jax.evaluation.samples import Samples
from aromni_jax.models import decoder as decoder_lib
from aromni_jax.models import sharding
from aromni_jax.models.config import DecoderConfig
from aromni_jax.planning.sampling import SEQUENCES
from aromni_jax.training.writer import Writer
from aromni_jax.vocabulary import get_vocabulary
from tests.cluster.test_processes import free_port

CONFIG = DecoderConfig(
  vocab_size=get_vocabulary("demo").size,
  embed_dim=32,
  mlp_dim=64,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=16,
  dtype="float32",
)


def make_decoder(seed, devices):
  """A random decoder, split over some devices, of all processes if there are several."""
  mesh = sharding.make_mesh(1, -1, 1, devices=jax.devices()[:devices])
  abstract = nnx.eval_shape(lambda: decoder_lib.Decoder(CONFIG, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(abstract)

  def init(key):
    return decoder_lib.init_params(CONFIG, key)[1]

  init = jax.jit(init, out_shardings=sharding.state_shardings(state, mesh))
  return nnx.merge(graphdef, init(jax.random.key(seed)))


@pytest.fixture
def held(monkeypatch):
  """(size, most of it on one device) of every matrix that engines have loaded."""
  out, load = [], Engine.load

  def watched(self, decoder, **options):
    load(self, decoder, **options)
    for x in jax.tree.leaves(self._params):
      if x.ndim == 2:
        out.append((x.size, max(shard.data.size for shard in x.addressable_shards)))

  monkeypatch.setattr(Engine, "load", watched)
  return out


@pytest.mark.slow
def test_no_device_holds_the_decoder_and_the_second_look_compiles_nothing(
  tmp_path, held, monkeypatch
):
  samples, writer = Samples(model_dir.SHIPPED), Writer(tmp_path, 0)
  programs, sequences = [], []
  with_twins = Engine._with_twins

  def counted(self, prompts, tasks):
    out = with_twins(self, prompts, tasks)
    sequences.append(len(out))
    return out

  monkeypatch.setattr(Engine, "_with_twins", counted)
  for step in (1, 2):
    samples(step, make_decoder(step, devices=2), writer)
    engine = samples._engine
    programs.append((engine._prefill._cache_size(), engine._advance._cache_size()))
    assert engine._params is None  # given back
  writer.close()
  assert max(sequences) == SEQUENCES  # what plans count
  assert programs[0] == programs[1] and programs[0][0] > 0
  assert held and all(most == size / 2 for size, most in held)
  (events,) = (tmp_path / "tensorboard").iterdir()
  written = events.read_bytes()
  for name in (b"text_to_image/", b"text_to_speech/", b"/read_back"):
    assert name in written


def answers(devices):
  """Ids that a greedy engine gives two prompts."""
  prompts, tasks = [np.array([0, 2060, 2061, 2056])] * 2, ["text_to_speech", "image_caption"]
  engine = Engine(make_decoder(3, devices), get_vocabulary("demo"))
  return [ids.tolist() for ids in engine.generate(prompts, tasks, max_new_tokens=24)]


@pytest.mark.slow
def test_split_parameters_answer_as_whole_ones():
  assert answers(2) == answers(1)


_WORKER = """
import sys
from aromni_jax.cluster import agreement
agreement.join(sys.argv[1], 2, int(sys.argv[2]), join_timeout=60, host_timeout=60)
from tests.evaluation.test_samples import answers
print(answers(4))
"""


@pytest.mark.processes
def test_processes_sample_together():
  address = f"localhost:{free_port()}"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", _WORKER, address, str(i)],
      cwd=pathlib.Path(__file__).parents[2],
      env=env,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [worker.communicate(timeout=240)[0].splitlines()[-1] for worker in workers]
  assert said == [str(answers(1))] * 2


def test_a_base_without_a_codec_is_named_before_the_run(tmp_path):
  base = tmp_path / "base"
  model_dir.shutil.copytree(model_dir.SHIPPED, base)
  info = model_dir.read_info(base)
  del info["speech_codec"]
  (base / "model.json").write_text(model_dir.json.dumps(info))
  with pytest.raises(ValueError, match="base has no speech_codec. Convert with --wavtokenizer"):
    Samples(base)
