"""Follows docs/extending.md: each example goes into a copy of the code, and the copy is tried.

What the copies must do stands in `learn` and `store`, which run in processes of their own, where
`aromni_jax` is the copy.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/extending.md"
BESIDE = ("configs", "data_pipelines", "launch")  # stand beside the package, live inside it


@dataclasses.dataclass(frozen=True)
class Example:
  """One file of an example.

  Attributes:
    section: heading that it stands below. path: of the file. kind: "diff", or "python" if it is a
      new file. text: of the block.
  """

  section: str
  path: str
  kind: str
  text: str


def sections():
  """Heading -> text below it."""
  parts = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.M)[1:]
  return dict(zip(parts[::2], parts[1::2], strict=True))


def examples():
  found = [
    Example(section, *match)
    for section, text in sections().items()
    for match in re.findall(r"^\*\*(\S+)\*\*\n\n```(diff|python)\n(.*?)```", text, re.M | re.S)
  ]
  assert len(found) == PAGE.read_text().count("```") // 2, "a block without a file before it"
  return found


def place(tree, path):
  """Where a file of the checkout is in a copy, which is laid out as an installed package."""
  return tree / "aromni_jax" / path if path.startswith(BESIDE) else tree / path


def apply(tree, example):
  file = place(tree, example.path)
  if example.kind == "python":
    assert not file.exists(), example.path
    file.write_text(example.text)
    return
  text = file.read_text()
  for hunk in example.text.split("@@\n"):
    lines = [line if line else " " for line in hunk.splitlines()]
    before, after = (
      "".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +")
    )
    assert {line[0] for line in lines} <= set(" -+") and before != after, hunk
    assert text.count(before) == 1, f"{example.path} has {text.count(before)} times:\n{before}"
    text = text.replace(before, after)
  file.write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """A folder with `aromni_jax`, and everything that the page adds."""
  out = tmp_path_factory.mktemp("extended")
  skipped = shutil.ignore_patterns("__pycache__", "pretrained")
  shutil.copytree(ROOT / "aromni_jax", out / "aromni_jax", ignore=skipped)
  (out / "aromni_jax/pretrained").symlink_to(ROOT / "aromni_jax/pretrained")
  for name in BESIDE:
    shutil.copytree(ROOT / name, out / "aromni_jax" / name, ignore=skipped)
  for example in examples():
    apply(out, example)
  return out


def python(tree, cwd, *arguments):
  """Runs Python on the copy; `tests` are those of the checkout."""
  env = os.environ | {"PYTHONPATH": f"{tree}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
  env |= {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
  return done.stdout


def test_the_table_counts_the_files():
  rows = re.findall(r"^\| \[(.+)\]\(#(.+)\) \| .+ \| (\d) \| (\d) \|$", PAGE.read_text(), re.M)
  assert len(rows) == 9
  names = {section.lower().replace(" ", "-"): section for section in sections()}
  found = examples()
  for title, anchor, changed, new in rows:
    mine = [e for e in found if e.section == names[anchor]]
    kinds = [e.kind for e in mine]
    assert (kinds.count("diff"), kinds.count("python")) == (int(changed), int(new)), title
    assert len({e.path for e in mine}) == len(mine) and anchor == title.replace(" ", "-")
  assert {e.section for e in found} == {names[anchor] for _, anchor, *_ in rows}


def test_the_files_that_a_modality_changes_are_there():
  text = sections()["A modality"]
  table = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
  files = re.findall(r"`(.+?)`", "".join(table))
  assert all((ROOT / file).is_file() for file in files)
  assert len(set(files)) == len(files) and f"That is {len(files)} files" in text


def test_examples_are_written_as_the_code_is(tree):
  files = sorted({str(place(tree, e.path)) for e in examples()})
  for command in (["check"], ["format", "--check"]):
    done = subprocess.run(
      [sys.executable, "-m", "ruff", *command, "--no-cache", f"--config={ROOT}/pyproject.toml"]
      + files,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_task_loss_backend_and_hook(tree, shards, tmp_path):
  script = "import sys; from tests import test_extending as t; t.learn(*sys.argv[1:])"
  out = python(tree, tmp_path, "-c", script, str(tree), str(shards), str(tmp_path))
  seen = json.loads(out.splitlines()[-1])
  from aromni_jax.tasks import TASKS

  assert "image_to_speech_and_text" not in TASKS  # here is the code without it
  assert seen["order"] == order(shards)
  assert seen["ids"] == {name: task.id for name, task in TASKS.items()} | {
    "image_to_speech_and_text": len(TASKS)
  }


@pytest.mark.processes
@pytest.mark.slow
def test_codec_source_layout_launcher_and_suite(tree, tmp_path):
  pictures(tmp_path / "pictures")
  script = "import sys; from tests import test_extending as t; t.store(*sys.argv[1:])"
  python(tree, tmp_path, "-c", script, str(tree), str(tmp_path))
  out = tmp_path / "figures.json"
  flags = [f"--model={tmp_path / 'model'}", f"--data_dir={tmp_path / 'pictures'}", f"--out={out}"]
  shown = python(tree, tmp_path, "-m", "aromni_jax.cli", "evaluate", "--suite=rebuilt", *flags)
  row = json.loads(out.read_text())["rows"]["rebuilt"]
  assert row["psnr"] > 45  # colours of the cube: rounding alone is lost
  # From 128, and the codec reads the dark ones, 85, as 84: float32 is truncated.
  errors = [(n * 44**2 + (8 - n) * 42**2) / 8 for n in map(dark_cells, range(11))]
  assert row["chance"]["psnr"] == pytest.approx(10 * np.mean(np.log10(255**2 / np.array(errors))))
  assert f"{row['psnr']:.1f} dB" in shown


def order(shards):
  """The records of a seed's first rows, with a mixture and without."""
  from aromni_jax.data.pipeline import DataConfig, RowPlan
  from aromni_jax.data.token_shards import TokenShards
  from tests.tiny import VOCABULARY

  source = TokenShards(shards, "train", VOCABULARY)
  mixtures = ({}, {"image_caption": 1.0, "text_to_speech": 2.0, "dialogue": 0.5})
  plans = [
    RowPlan(source.lengths, source.tasks, DataConfig(str(shards), mixture=mixture, seed=3))
    for mixture in mixtures
  ]
  return [plan.row(number).tolist() for plan in plans for number in range(40)]


def dark_cells(number):
  return number % 7 + 1


def pictures(folder):
  """Eleven pictures of two colours, whose edges are edges of cells, with captions."""
  from PIL import Image

  folder.mkdir()
  lines = []
  for i in range(11):
    pixels = np.full((64, 64, 3), 85, np.uint8)
    pixels[:, 8 * dark_cells(i) :] = 170
    Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    lines.append(f"{i:02d}.png\ttwo dogs on blue\n")
  (folder / "captions.tsv").write_text("".join(lines))


# What runs in the copy.


def check_copy(tree):
  import aromni_jax.configs.base
  import aromni_jax.launch.run
  import aromni_jax.tasks

  for module in (aromni_jax.tasks, aromni_jax.configs.base, aromni_jax.launch.run):
    assert pathlib.Path(module.__file__).is_relative_to(tree), module


def learn(tree, shards, work):
  """The task, the loss term, the backend and the hook, and a training with all four."""
  check_copy(tree)
  from aromni_jax.tasks import TASKS

  task = "image_to_speech_and_text"
  try_task(task)
  try_backend()
  try_training(task, pathlib.Path(work))
  ids = {name: task.id for name, task in TASKS.items()}
  print(json.dumps({"order": order(shards), "ids": ids}))


def try_task(task):
  from aromni_jax.decoding.released import compile_released
  from aromni_jax.decoding.state_machine import compile_machine
  from aromni_jax.prompts import make_prompt, parse, read_response
  from aromni_jax.recipes import PAPER, RELEASED
  from aromni_jax.sample import Parts
  from aromni_jax.tasks import TASKS, get_task
  from tests.tiny import VOCABULARY as V
  from tests.tiny import random_samples, text_model

  text, image = text_model(), np.arange(V.image_length)
  for recipe, machine in ((PAPER, "ASSISTANT:"), (RELEASED, "GPT:")):
    prompt = make_prompt(task, V, text, recipe=recipe, inputs=Parts(image=image))
    assert prompt[0] == V.bos and (V.image_codes(parse(prompt, V)[3].ids) == image).all()
    said = text.decode(prompt[V.modality_of(prompt) == 0])
    assert TASKS[task].wordings[0] in said and said.endswith(machine)
    alone = [recipe.budget(get_task(name), 66, 100, None) for name in _ANSWERS]
    both = recipe.budget(get_task(task), 66, 100, None)
    assert max(alone) < both <= sum(alone)

  (sample,) = random_samples(1, tasks=(task,))
  tail = sample.tokens[sample.response_start :]
  kinds = ["special", "speech", "special", "text", "special", "special"]
  assert [s.kind for s in parse(tail, V)] == kinds

  # Any choice among what is allowed gives speech, then text, and ends in time.
  machine, rng = compile_machine(V), np.random.default_rng(0)
  assert machine.start.shape[0] == compile_released(V).start.shape[0] == len(TASKS)
  for budget in (machine.shortest(task), 20, 60):
    state, ids = machine.init_states([task], [0])[0], []
    while state != machine.done:
      left = budget - len(ids)
      allowed = np.flatnonzero((machine.cost[state] <= left)[machine.class_of])
      token = rng.choice(allowed)
      ids.append(token)
      state = machine.next_state[state, machine.class_of[token]]
    ids = np.array(ids)
    assert len(ids) <= budget and list(ids[-2:]) == [V.eom, V.eos]
    spans = [s.kind for s in parse(ids, V) if s.kind != "special"]
    parts = read_response(ids, V, text)
    assert spans == ["speech", "text"] and parts.speech.size and parts.image is None


_ANSWERS = ("image_caption", "image_to_speech")


def try_backend():
  import jax
  import jax.numpy as jnp

  from aromni_jax.models import attention

  assert attention.choose("auto", 128, 16, "float32", "cpu").name == "xla"
  with pytest.raises(ValueError, match="'blocks' needs a length of whole 64s"):
    attention.choose("blocks", 100, 16, "float32", "cpu")
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (2, 128, 4, 16))
  k, v = (jax.random.normal(key, (2, 128, 2, 16)) for key in keys[1:3])
  ids = jnp.sort(jax.random.randint(keys[3], (2, 128), 0, 4))

  def run(backend):
    def f(q, k, v, ids):
      out = attention.attention(q, k, v, segment_ids=ids, backend=backend)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))

  ours, theirs = run("blocks"), run("xla")
  for segments in (None, ids):
    found = ours(q, k, v, segments), theirs(q, k, v, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *found)


def try_training(task, work):
  """Two steps: the term is in the total, the backend runs, the hook looks."""
  import jax

  from aromni_jax import model_dir
  from aromni_jax.data import token_shards
  from aromni_jax.data.pipeline import make_train_iterator
  from aromni_jax.evaluation.hooks import make_hooks
  from aromni_jax.models import sharding
  from aromni_jax.training import loop
  from aromni_jax.training import setup as setup_lib
  from aromni_jax.training.config import TrainConfig, to_dataclass
  from tests import tiny

  base = model_dir.open_base("")
  metadata = {f"{name}_fingerprint": value for name, value in base.fingerprints.items()}
  kept = list(tiny.random_samples(60))  # of all tasks
  token_shards.write(work / "tokens", {"train": kept}, base.vocabulary, metadata)
  read = token_shards.TokenShards(work / "tokens", "train", base.vocabulary, base.fingerprints)
  again = {(s.task, s.key): s for s in read}
  assert read.manifest["splits"]["train"]["samples_of_task"][task] == 6
  for sample in kept:
    other = again[sample.task, sample.key]
    assert other.response_start == sample.response_start
    assert other.tokens.tolist() == sample.tokens.tolist()

  changes = {"num_steps": 2, "eval_batches": 0, "code_embedding_std": 0.0, "weight_norm_every": 1}
  changes |= {"loss.focal_weight": 0.5, "loss.perceptual_weight": 0.0, "optimizer.name": "adam"}
  changes |= {"model.attention": "blocks", "model.num_layers": 1, "data.code_noise": 0.0}
  config = to_dataclass(TrainConfig, tiny.train_config(work / "tokens", **changes).to_dict())
  batch = next(make_train_iterator(config.data, base.vocabulary, batch_size=config.batch_size))
  assert (batch.task_ids == 9).any()
  loop.train(config, str(work / "run"), base, hooks=make_hooks(config))
  lines = [json.loads(x) for x in (work / "run/metrics.jsonl").read_text().splitlines()]
  steps = {n: {k: v for x in lines if x["step"] == n for k, v in x.items()} for n in (1, 2)}
  first = steps[1]
  assert first[f"task/{task}"] > 1 and first["weights/norm"] != steps[2]["weights/norm"]

  # The first step by hand, target by target.
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  setup = setup_lib.build(config, base.vocabulary, None, mesh)
  params = setup.init(jax.random.key(config.seed), {}).params
  decoder = setup.decoder(params)
  squares = sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(params))
  assert squares**0.5 == pytest.approx(first["weights/norm"], rel=0.05)  # a step later
  hidden = jax.jit(lambda b: decoder.logits(decoder(b.tokens, b.positions, b.segment_ids)))
  with jax.set_mesh(mesh):
    logits = np.asarray(hidden(batch), np.float64)
  total = plain = 0.0
  for at in zip(*np.nonzero(batch.loss_weights), strict=True):
    scores, weight = logits[at], float(batch.loss_weights[at])
    nll = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[batch.targets[at]]
    plain += weight * nll
    total += weight * (1 - np.exp(-nll)) ** 2 * nll
  count = float(batch.loss_weights.sum())  # the demo's normaliser
  assert first["loss/focal"] == pytest.approx(total / count, rel=1e-4)
  assert first["loss"] == pytest.approx((plain + 0.5 * total) / count, rel=1e-4)


def store(tree, work):
  """The codec, the source, the layout and the launcher."""
  check_copy(tree)
  work = pathlib.Path(work)
  try_codec(work)
  try_layout(work)
  try_launcher()
  try_source(work)


def try_codec(work):
  from flax import nnx

  from aromni_jax import model_dir
  from aromni_jax.codecs import batching, mosaic
  from aromni_jax.model import load_model
  from aromni_jax.recipes import PAPER
  from aromni_jax.serving import requests
  from aromni_jax.serving.media import encode_pictures
  from tests.tiny import VOCABULARY

  folder = work / "model"
  codec = mosaic.Mosaic(mosaic.MosaicConfig(), rngs=nnx.Rngs(0))
  model_dir.create(folder, VOCABULARY, PAPER)
  shutil.copy(model_dir.SHIPPED / "text.model", folder)
  model_dir.save_codec(folder, "mosaic_codec", codec, "float32")
  model = load_model(folder)
  requests.check_codecs(model, "image_caption")
  with pytest.raises(ValueError, match="has no speech_codec"):
    requests.check_codecs(model, "image_to_speech_and_text")
  pixels = np.full((64, 64, 3), 85, np.uint8)
  pixels[8:16, 8:24] = (170, 0, 255)
  codes = encode_pictures(model, [pixels])
  assert codes.shape == (1, VOCABULARY.image_length) and len(np.unique(codes)) == 2
  rebuilt = batching.decode_images(model.image_codec, codes)[0]
  assert np.abs(rebuilt.astype(int) - pixels).max() <= 1
  assert model_dir.perceptual_table(folder).shape == (1000, 3)
  shipped = load_model(decoder=False)
  assert type(shipped.image_codec).__name__ == "ImageVQ" and "mosaic_codec" not in shipped.codecs


def try_layout(work):
  import jax
  from flax import nnx

  from aromni_jax import model_dir
  from aromni_jax.convert import decoders, exporter, layouts, writers
  from aromni_jax.models import params as params_lib
  from aromni_jax.models.decoder import Decoder
  from aromni_jax.storage import StoredArrays
  from tests.tiny import DECODER

  decoder = Decoder(DECODER, rngs=nnx.Rngs(0))
  model_dir.save_decoder(work / "decoder", decoder, "float32")
  layout = layouts.get_layout("prefixed")
  assert layouts.get_layout("D") is layout
  arrays = StoredArrays(work / "decoder/decoder")
  tensors = list(exporter._decoder_tensors(arrays, DECODER, layout))
  (work / "released").mkdir()
  layout.write(work / "released", writers.Weights(tensors, DECODER, {}, None, lambda size: None))
  found = decoders.find_decoder(work / "released")
  assert found.layout is layout and all(name.startswith("decoder.") for name in found.tensors)
  assert found.config.num_layers == DECODER.num_layers and found.config.norm_placement == "pre"
  back, _ = decoders.leaves(found)
  read = jax.tree.map(lambda leaf: np.concatenate([piece() for piece in leaf.pieces]), back)
  jax.tree.map(np.testing.assert_array_equal, read, params_lib.to_params(decoder))


def try_launcher():
  import contextlib
  import io

  from aromni_jax.launch import run

  said, line = io.StringIO(), ["--", "--config=demo:tiny", "--workdir=/runs/mine"]
  options = ["--target=ssh", "--host=box", "--folder=src/my code", "--dry-run"]
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    assert run.main([*options, "--topology=h100:8", *line]) == 0
    assert run.main([*options, "--topology=h100:16", *line]) == 1
  script, error = said.getvalue().split("error: ")
  assert script.startswith("ssh box ") and "my code" in script and "export XLA_FLAGS=" in script
  assert "-m aromni_jax.train --config=demo:tiny --workdir=/runs/mine" in script
  assert "several machines" in error


def try_source(work):
  from aromni_jax import cli
  from aromni_jax.data.pipeline import DataConfig, make_train_iterator
  from aromni_jax.model import load_model

  out, source = work / "captioned", work / "pictures"
  sys.argv = ["aromni", "captioned", f"--source={source}", f"--out={out}"]
  sys.argv += [f"--model={work / 'model'}"]
  with pytest.raises(SystemExit) as end:
    cli.main()
  assert not end.value.code
  model = load_model(work / "model")
  splits = json.loads((out / "manifest.json").read_text())["splits"]
  assert {name: split["samples"] for name, split in splits.items()} == {
    "train": 18,
    "validation": 4,
  }
  batch = next(
    make_train_iterator(
      DataConfig(str(out)), model.vocabulary, batch_size=2, codecs=model.fingerprints
    )
  )
  assert {0, 2} <= set(np.unique(batch.task_ids))  # image_caption and text_to_image
