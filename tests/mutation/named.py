"""Mistakes that a person could make in the step, the weights and the masks: (file, code, mistake).

`python -m tests.mutation --named` makes each and names the test that notices; all must be noticed.
"""

_STEP, _TERMS = "aromni_jax/training/step.py", "aromni_jax/training/terms.py"
_SETUP, _OPTIMIZER = "aromni_jax/training/setup.py", "aromni_jax/training/optimizer.py"
_WEIGHTS, _PIPELINE = "aromni_jax/data/loss_weights.py", "aromni_jax/data/pipeline.py"
_TARGETS = 'out["targets"][at : at + n - 1] = sample.tokens[1:]'

NAMED = {
  "token weights are ignored": (
    _TERMS,
    "jnp.sum(f.batch.loss_weights * f.nll)",
    "jnp.sum((f.batch.loss_weights > 0) * f.nll)",
  ),
  "the normaliser is ignored": (
    _TERMS,
    'weights if loss.normaliser == "weights" else weights > 0',
    "weights > 0",
  ),
  "the z-loss is left out of the total": (
    _STEP,
    "    for term in active(config)\n  )",
    '    for term in active(config) if term.name != "z_loss"\n  )',
  ),
  "the z-loss has no token weights": (
    _TERMS,
    "losses.z_loss(f.log_z, f.batch.loss_weights)",
    "losses.z_loss(f.log_z, f.batch.loss_weights > 0)",
  ),
  "the perceptual loss has no weight": (
    _TERMS,
    "weight=lambda loss: loss.perceptual_weight",
    "weight=lambda loss: float(loss.perceptual_weight > 0)",
  ),
  "targets are one too far": (
    _PIPELINE,
    _TARGETS,
    'out["targets"][at : at + n - 2] = sample.tokens[2:]',
  ),
  "noise is on the targets, too": (
    _PIPELINE,
    _TARGETS,
    'out["targets"][at : at + n - 1] = out["tokens"][at + 1 : at + n]',
  ),
  "positions do not begin anew": (
    _PIPELINE,
    'out["positions"][span] = np.arange(n)',
    'out["positions"][span] = np.arange(at, at + n)',
  ),
  "samples of a row are one segment": (
    _PIPELINE,
    'out["segment_ids"][span] = segment',
    'out["segment_ids"][span] = 1',
  ),
  "all tasks lose their prompt": (_PIPELINE, " and get_task(sample.task).only_draws", ""),
  "the last position of a sample counts": (_WEIGHTS, "np.float32(0))", "np.float32(1))"),
  "weights stand where the id is read": (
    _WEIGHTS,
    "return np.append(weights[1:], np.float32(0))",
    "return weights",
  ),
  "eos is boosted": (
    _WEIGHTS,
    "weights[start:stop][tokens[start:stop] != vocabulary.eos] = config.boosted",
    "weights[start:stop] = config.boosted",
  ),
  "the transcript begins one too early": (
    _WEIGHTS,
    "inside[start + 1 : stop]",
    "inside[start:stop]",
  ),
  "the transcript ends one too late": (
    _WEIGHTS,
    "inside[start + 1 : stop]",
    "inside[start + 1 : stop + 1]",
  ),
  "own_position's mask is not shifted": (
    _TERMS,
    "jnp.pad(counted[:, :-1], ((0, 0), (1, 0)))",
    "counted",
  ),
  "the first image code is no image": (
    _TERMS,
    "ids >= vocabulary.image.start",
    "ids > vocabulary.image.start",
  ),
  "what follows the image codes is one": (
    _TERMS,
    "ids < vocabulary.image.stop",
    "ids <= vocabulary.image.stop",
  ),
  "pictures of prompts that do not count do": (
    _TERMS,
    "counted = batch.loss_weights > 0",
    "counted = batch.loss_weights >= 0",
  ),
  "micro-batches divide by their own counts": (
    _STEP,
    "total_loss(sums, counts, config.loss), sums",
    "total_loss(sums, denominators(part, config), config.loss), sums",
  ),
  "the rate is not multiplied": (_STEP, "(p - rate * u)", "(p - u)"),
  "steps go uphill": (_STEP, "(p - rate * u)", "(p + rate * u)"),
  "a frozen projection is trained": (_SETUP, "if t.group and t.trained(config.loss)", "if t.group"),
  "a frozen projection is trained by its step": (
    _STEP,
    "trained = {name: state.params[name] for name in config.trained}",
    "trained = dict(state.params)",
  ),
  "the gradient is clipped after Adam": (
    _OPTIMIZER,
    "optax.chain(clip, direction, ",
    "optax.chain(direction, clip, ",
  ),
  "the gradient is not clipped": (
    _OPTIMIZER,
    "optax.chain(clip, direction, ",
    "optax.chain(direction, ",
  ),
  "attention crosses samples": (
    "aromni_jax/models/decoder.py",
    "backend.run(q, k, v, segment_ids, c.max_segments)",
    "backend.run(q, k, v, None, c.max_segments)",
  ),
}
