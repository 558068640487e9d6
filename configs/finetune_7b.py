"""Fine-tuning of a converted 7B model on instruction data, responses only.

aromni train --config=finetune_7b --workdir=DIR --config.base=models/pretrained \
  --config.data.shards=data/instruct          the paper's recipe
aromni train --config=finetune_7b:released ...     the released code's
aromni train --config=finetune_7b:h100:8 ...       for other chips than v5e:16x16,
  see configs/pods.py; :released,h100:8 is both

--config.base is what aromni convert wrote; data.shards what aromni import_aromni wrote.
"""

from ml_collections import ConfigDict

from aromni_jax.configs import base, pods


def get_config(argument: str = "") -> ConfigDict:
  recipe, topology = pods.split_argument(argument, "finetune_7b")
  c = base.get_config()
  c.init_from_base = True
  c.batch_size = 64
  c.num_steps = 18_000
  c.eval_every = 1000
  c.data.shards = "data/instruct"
  c.data.long_samples = "drop"
  c.data.loss_weights.prompt = 0.0
  c.data.loss_weights.boosted = 1.0
  c.loss.vocab_block = 8192  # 65,536 logits of all positions would not fit
  base.apply(c, {**recipe.training, **recipe.fine_tuning})
  pods.fine_tuning(c, topology)
  return c
