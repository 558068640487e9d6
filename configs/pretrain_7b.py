"""Pre-training of the 7B model (arXiv 2601.17761, section 3).

aromni train --config=configs/pretrain_7b.py --workdir=DIR --config.base=models/anole \
  --config.data.shards=data/pretrain          the paper's recipe
aromni train --config=configs/pretrain_7b.py:released ...     the released code's

It starts from the decoder of --config.base, a converted Anole or Chameleon with a speech codec
(aromni convert). 140,000 steps of 480 rows are 87 billion tokens, 3.7e21 floating-point operations.
"""

from ml_collections import ConfigDict

from configs import base

ARGUMENTS = ("paper", "released")

# Text : pictures with text : speech with text = 0.5 : 1 : 2 (section 3); the paper does not say
# how a modality is shared by its tasks, nor in which unit: halves, of tokens.
_MIXTURE = {
  "text_to_text": 0.5,
  "image_caption": 0.5,
  "text_to_image": 0.5,
  "speech_to_text": 1.0,
  "text_to_speech": 1.0,
}


def get_config(argument: str = "paper") -> ConfigDict:
  if argument not in ARGUMENTS:
    raise ValueError(
      f"configs/pretrain_7b.py:{argument} does not exist; expected one of {ARGUMENTS}"
    )
  c = base.get_config()
  c.init_from_base = True
  c.model.norm_placement = "swin"
  c.change_norm_placement = True  # Anole's norms stand before the branches; step 0 is not Anole
  c.batch_size = 480
  c.num_steps = 140_000
  c.eval_every = 5000
  c.checkpoint_every = 1000
  c.data.shards = "data/pretrain"
  c.data.sequence_length = 1300
  c.data.long_samples = "drop"
  c.data.mixture = ConfigDict(_MIXTURE)
  c.loss.vocab_block = 8192  # 65,536 logits of all positions would not fit
  c.optimizer.warmup_steps = 7000  # 0.05
  if argument == "released":
    base.released(c)
    c.model.norm_placement = "pre"
    c.change_norm_placement = False  # the released code keeps what the checkpoint says
    c.batch_size = 256
    c.num_steps = 150_000
    c.optimizer.b2 = 0.999
    c.optimizer.warmup_steps = 4500  # 0.03
    c.data.mixture = ConfigDict()  # every sample as it comes
  return c
