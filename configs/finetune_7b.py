"""Fine-tuning of a converted 7B model on instruction data, responses only.

aromni train --config=configs/finetune_7b.py --workdir=DIR --config.base=models/pretrained \
  --config.data.shards=data/instruct          the paper's recipe
aromni train --config=configs/finetune_7b.py:released ...     the released code's

--config.base is what aromni convert wrote; data.shards what data_pipelines.import_aromni wrote.
"""

from ml_collections import ConfigDict

from configs import base

ARGUMENTS = ("paper", "released")


def get_config(argument: str = "paper") -> ConfigDict:
  if argument not in ARGUMENTS:
    raise ValueError(
      f"configs/finetune_7b.py:{argument} does not exist; expected one of {ARGUMENTS}"
    )
  c = base.get_config()
  c.init_from_base = True
  c.model.norm_placement = "swin"
  c.batch_size = 64
  c.num_steps = 18_000
  c.eval_every = 1000
  c.data.shards = "data/instruct"
  c.data.sequence_length = 3456
  c.data.long_samples = "drop"
  c.data.loss_weights.prompt = 0.0
  c.data.loss_weights.boosted = 1.0
  c.loss.vocab_block = 8192  # 65,536 logits of all positions would not fit
  c.optimizer.learning_rate = 2e-5
  c.optimizer.warmup_steps = 900  # 0.05
  if argument == "released":
    base.released(c)
    c.model.norm_placement = "pre"  # an error says so if the checkpoint has the other one
    c.loss.perceptual_tasks = ()  # every picture that is answered with
    c.data.sequence_length = 2048
    c.optimizer.b2 = 0.999
    c.optimizer.warmup_steps = 540  # 0.03; the released code counts 5 epochs instead of steps
  return c
