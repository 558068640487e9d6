"""Pre-training of the 7B model (arXiv 2601.17761, section 3).

aromni train --config=pretrain_7b --workdir=DIR --config.base=models/anole \
  --config.data.shards=data/pretrain          the paper's recipe
aromni train --config=pretrain_7b:released ...     the released code's
aromni train --config=pretrain_7b:v5p:4x4x8 ...    for other chips than v5e:16x16,
  see configs/pods.py; :released,v5p:4x4x8 is both

It starts from the decoder of --config.base, a converted Anole or Chameleon with a speech codec
(aromni convert). The paper trains 140,000 steps of 480 samples of at most 1300 tokens: 87 billion
tokens, 3.7e21 floating-point operations. Here samples are packed into rows of 4096 tokens, as many
as the machine divides, and there are as many steps as make the same tokens. `aromni plan` tells how
long that takes.
"""

from ml_collections import ConfigDict

from aromni_jax.configs import base, pods


def get_config(argument: str = "") -> ConfigDict:
  recipe, topology = pods.split_argument(argument, "pretrain_7b")
  c = base.get_config()
  c.init_from_base = True
  c.eval_every = 5000
  c.checkpoint_every = 1000
  c.data.shards = "data/pretrain"
  c.data.long_samples = "drop"
  c.loss.vocab_block = 8192  # 65,536 logits of all positions would not fit
  base.apply(c, {**recipe.training, **recipe.pretraining})
  pods.pretraining(c, topology)
  c.num_steps = round(recipe.pretraining_tokens / (c.batch_size * c.data.sequence_length))
  c.optimizer.warmup_steps = round(recipe.warmup * c.num_steps)
  return c
