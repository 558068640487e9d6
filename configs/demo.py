"""The small model on PictoTalk.

aromni train --config=demo --workdir=runs/demo           nine minutes on two cores
aromni train --config=demo:shipped --workdir=DIR         how the shipped decoder was made
aromni train --config=demo:new_objects --workdir=DIR     fine-tunes it on eight new objects
aromni train --config=demo:tiny --workdir=DIR            seconds, to see that all works
"""

from ml_collections import ConfigDict

from aromni_jax.configs import base
from aromni_jax.tasks import TASKS

ARGUMENTS = ("default", "shipped", "new_objects", "tiny")

# Shares of tokens: pictures and what combines two tasks are the hardest.
_SHIPPED_MIXTURE = {
  "image_caption": 1.2,
  "text_to_image": 1.8,
  "speech_to_image": 1.4,
  "image_to_speech": 1.2,
  "speech_to_text": 0.8,
  "text_to_speech": 1.0,
  "image_to_text": 0.5,
  "text_to_text": 0.3,
  "dialogue": 1.0,
}


def get_config(argument: str = "default") -> ConfigDict:
  if argument not in ARGUMENTS:
    expected = ", ".join(ARGUMENTS)
    raise ValueError(f"demo:{argument} does not exist; expected one of {expected}")
  c = base.get_config()
  c.batch_size = 8
  c.code_embedding_std = 0.3
  c.num_steps = 100_000
  c.max_minutes = 9.0
  c.log_every = 20
  c.eval_batches = 8
  c.checkpoint_every = 200
  m = c.model
  # Minutes on a CPU are few samples: a smaller model sees more of them.
  m.vocab_size, m.embed_dim, m.mlp_dim = 2944, 128, 352
  m.num_layers, m.num_heads, m.num_kv_heads, m.head_dim = 4, 2, 2, 64
  m.init_std = 0.06  # a narrow model needs larger weights
  m.dtype, m.remat_policy = "float32", "none"
  m.scan_layers = False  # a loop over layers is a third slower on a CPU
  c.data.shards = "data/tokens_base"
  c.data.sequence_length = 336  # short rows waste less on attention; these pack best
  c.data.drop_prompt = 0.1
  c.data.code_noise = 0.2
  # Responses carry the tasks; a text response is a few ids beside 50 to 66 of speech or picture.
  c.data.loss_weights.prompt = 0.02
  c.data.loss_weights.boosted = 4.0
  c.data.loss_weights.boosted_tasks = (
    *("image_caption", "speech_to_text", "image_to_text", "text_to_text"),
  )
  c.loss.perceptual_weight = 0.02
  c.loss.normaliser = "weights"
  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 3e-3
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup_steps = 100
  c.optimizer.weight_decay = 0.02
  c.mesh.data, c.mesh.fsdp = -1, 1
  if argument in ("default", "tiny"):
    # Minutes are short: the four basic tasks come first, and drawing, the hardest, before all.
    c.data.mixture = {task: 0.1 for task in TASKS}
    c.data.mixture.update(speech_to_text=0.8, text_to_speech=1.2)
    c.data.mixture.update(image_caption=0.6, text_to_image=1.6)
  if argument in ("shipped", "new_objects"):
    m.embed_dim, m.mlp_dim, m.num_heads, m.num_kv_heads = 192, 512, 3, 3
  if argument == "shipped":
    c.max_minutes, c.num_steps = 0.0, 3300
    c.data.mixture = _SHIPPED_MIXTURE
  if argument == "new_objects":
    c.init_from_base = True
    c.data.shards = "data/tokens_new_objects"
    c.data.mixture = _SHIPPED_MIXTURE
    c.max_minutes, c.num_steps = 0.0, 300
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 2e-3, 20
  if argument == "tiny":
    c.data.shards = "data/tokens_tiny"
    c.max_minutes, c.num_steps = 0.0, 20
    m.embed_dim, m.mlp_dim, m.num_layers, m.num_heads, m.num_kv_heads = 32, 64, 2, 2, 2
    m.head_dim, c.eval_batches = 16, 1
    c.log_every, c.checkpoint_every = 5, 10
  return c
