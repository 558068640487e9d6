"""The whole way of a released model: convert, import its data, fine-tune, use, and go back."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from aromni_jax import model_dir
from aromni_jax.configs import finetune_7b
from aromni_jax.convert import decoders, exporter
from aromni_jax.training import loop
from aromni_jax.training.config import TrainConfig, to_dataclass
from tests import released

pytestmark = pytest.mark.torch


def write_jsonl(folder):
  rng = np.random.default_rng(0)
  folder.mkdir()
  with open(folder / "part.jsonl", "w") as f:
    for i in range(40):
      speech = (8724 + rng.integers(0, 4096, 20)).tolist()
      words = (16388 + rng.integers(0, 256, 6)).tolist()
      ids = [0, *words, 12821, *speech, 12820, 12830, *words, 12831, 2]
      line = {"discrete_code": ids, "task": "speech_to_text", "response": words + [12831]}
      f.write(json.dumps(line | {"id": f"s{i}"}) + "\n")


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tune")
  write_jsonl(folder / "jsonl")
  arguments = [f"--source={folder / 'jsonl'}", f"--out={folder / 'shards'}", f"--model={model}"]
  command = [sys.executable, "-m", "data_pipelines.import_aromni", *arguments]
  subprocess.run(command, check=True, capture_output=True)
  c = finetune_7b.get_config("released")
  c.base, c.data.shards = str(model), str(folder / "shards")
  c.num_steps, c.batch_size, c.data.sequence_length = 2, 8, 64
  c.optimizer.warmup_steps, c.optimizer.learning_rate, c.eval_batches = 0, 1e-3, 1
  m, tiny = c.model, released.TINY
  for name in ("embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
    m[name] = getattr(tiny, name)
  m.dtype = "float32"
  config = to_dataclass(TrainConfig, c.to_dict())
  loop.train(config, str(folder / "run"), model_dir.open_base(config.base))
  return folder / "run/model"


def test_a_base_of_another_function_is_refused(model, tmp_path):
  c = finetune_7b.get_config("released")
  c.base, c.data.shards = str(model), str(tmp_path)
  c.model.update(dataclasses.asdict(released.TINY) | {"norm_placement": "swin"})
  config, base = to_dataclass(TrainConfig, c.to_dict()), model_dir.open_base(model)
  with pytest.raises(ValueError, match="norm_placement is swin, but the decoder of .* has pre"):
    loop._check_same_function(config, base)
  loop._check_same_function(dataclasses.replace(config, change_norm_placement=True), base)
  other = dataclasses.replace(config.model, norm_placement="pre", rope_theta=5e5)
  with pytest.raises(ValueError, match="rope_theta is 500000.0, but the decoder of .* has 10000.0"):
    loop._check_same_function(dataclasses.replace(config, model=other), base)


def test_a_tuned_model_goes_back_to_ar_omni(root, tuned, tmp_path):
  assert not (tuned / "certificate.json").exists()  # it was about other weights
  assert model_dir.decoder_config(tuned).param_dtype == "bfloat16"
  exporter.export(tuned, tmp_path / "native", "native")
  before, after = decoders.find_decoder(root), decoders.find_decoder(tmp_path / "native")
  assert before.config == after.config and before.tensors.keys() == after.tensors.keys()
  for name in ("output.weight", "layers.2.attention.wq.weight"):
    was, now = (d.tensors[name].read().astype(np.float32) for d in (before, after))
    assert 0 < np.abs(was - now).max() < 0.1 and was.dtype == now.dtype
  assert (tmp_path / "native/tokenizer/vqgan.ckpt").is_file()


@pytest.mark.parametrize("task, inputs", [("text_to_text", ["--text=a b"]), ("text_to_image", [])])
def test_a_converted_model_answers(tuned, tmp_path, task, inputs):
  inputs = inputs or ["--text=a b", f"--out={tmp_path / 'x.png'}"]
  command = [sys.executable, "-m", "aromni_jax.generate", f"--model={tuned}", f"--task={task}"]
  limit = ["--max_new_tokens=8"] if task == "text_to_text" else []
  done = subprocess.run([*command, *inputs, *limit], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "x.png").is_file() == (task == "text_to_image")
