"""Every option with its default; other configurations import this one and change some."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # of parameters; the data have their own
  c.base = ""  # model directory with codecs and text model; "" is the shipped one
  c.init_from_base = False  # start from the base's decoder (fine-tuning) or from random parameters
  c.change_norm_placement = False  # allows model.norm_placement to differ from the base's decoder
  c.code_embedding_std = 0.0  # if not 0, ids of codes start as their codec's vectors, at this scale
  c.batch_size = 8  # rows per step, over all devices
  c.accumulate = 1  # micro-batches of a step; fewer activations, the same result
  c.num_steps = 1000  # optimiser steps
  c.max_minutes = (
    0.0  # if not 0, also ends after this time, and the learning rate follows the clock
  )
  c.log_every = 10  # steps between lines of metrics
  c.eval_every = 0  # steps between validation losses; 0 is at the end only
  c.eval_batches = 4  # batches of a validation loss; 0 never computes one
  c.checkpoint_every = 500  # steps between checkpoints
  c.checkpoints_kept = 2  # newest checkpoints that are kept
  c.sample_every = 0  # steps between samples in TensorBoard; 0 is never
  c.step_timeout = 900.0  # seconds that a step may take, after the first; 0 is any time
  c.phase_timeout = 3600.0  # the same for the first step, saves, evaluations and all else
  c.export_dtype = "bfloat16"  # storage type of the trained model directory

  c.model = m = ConfigDict()
  m.vocab_size = 65536  # ids; must be the vocabulary's
  m.embed_dim = 4096  # width of the residual stream
  m.mlp_dim = 11008  # inner width of the MLP
  m.num_layers = 32  # layers
  m.num_heads = 32  # query heads
  m.num_kv_heads = 32  # key and value heads
  m.head_dim = 128  # dimensions of a head
  m.rope_theta = 10_000.0  # base of the rotary angles
  m.norm_eps = 1e-5  # epsilon of the RMS norms
  m.per_head_norm = False  # one q/k norm per head instead of a shared one
  m.norm_placement = "pre"  # pre | swin
  m.dtype = "bfloat16"  # of computation
  m.param_dtype = "float32"  # of parameters
  m.remat_policy = "full"  # full | mlp | up | norms | none: what the backward pass computes again
  m.scan_layers = True  # one compiled layer in a loop
  m.init_std = 0.02  # standard deviation of initial weights
  m.attention = "auto"  # auto | xla | splash | cudnn
  m.max_segments = 0  # not 0: packed rows are faster on GPUs; more than data.max_samples

  c.data = d = ConfigDict()
  d.shards = "data/tokens"  # folder of token shards
  d.split = "train"  # split that is trained on
  d.sequence_length = 1300  # tokens of a packed row
  d.mixture = ConfigDict()  # task -> weight; empty takes every sample once per epoch
  d.mixture_unit = "tokens"  # weights are shares of tokens | samples
  d.long_samples = "error"  # a sample longer than a row: error | drop
  d.drop_prompt = 0.0  # share of drawing samples without their prompt, for guidance
  d.code_noise = 0.0  # share of a response's codes that are read as random ones
  d.window = 1024  # samples that are packed together
  d.max_samples = 0  # samples of a row at most; 0 is any number
  d.seed = 0  # of the order
  d.threads = 2  # reader threads per process; 2 are plenty on a disk, take 16 on a mounted bucket
  d.loss_weights = w = ConfigDict()
  w.prompt = 1.0  # weight of prompt targets; 0 trains on responses only
  w.response = 1.0  # weight of response targets
  w.boosted = 2.0  # weight of the responses of boosted_tasks
  w.boosted_tasks = ("image_caption", "speech_to_text")  # short texts about other modalities
  w.transcript = 1.0  # factor on what is written down between <-Ins-> and <-Res->

  c.loss = loss = ConfigDict()
  loss.perceptual_weight = 0.1  # lambda; 0 leaves the perceptual loss out
  loss.perceptual_pairing = "predicting"  # predicting (paper) | own_position (released code)
  loss.perceptual_distance = "squared_l2"  # squared_l2 (paper) | mse (released code)
  loss.perceptual_tasks = ()  # tasks whose pictures count; empty is all
  loss.train_projection = True  # trained (paper) or frozen random (released code)
  loss.normaliser = "tokens"  # tokens (paper) | weights (released code)
  loss.z_loss_weight = 0.0  # keeps logits from drifting
  loss.vocab_block = 0  # ids whose logits exist at once; 0 is all

  c.optimizer = o = ConfigDict()
  o.name = "adam"  # adam | muon (for matrices; the rest by Adam)
  o.learning_rate = 6e-5  # peak
  o.schedule = "linear"  # cosine | linear | constant
  o.warmup_steps = 7000  # steps of linear warm-up
  o.final_ratio = 0.0  # last rate as a share of the peak
  o.b1 = 0.9  # Adam's first moment
  o.b2 = 0.95  # Adam's second moment
  o.epsilon = 1e-8  # Adam's epsilon
  o.mu_dtype = "float32"  # of Adam's first moment: float32 | bfloat16
  o.weight_decay = 0.0  # decoupled, of kernels only
  o.clip_norm = 1.0  # largest global gradient norm; 0 never clips

  c.mesh = mesh = ConfigDict()
  mesh.data = 1  # copies of the parameters
  mesh.fsdp = -1  # devices that parameters are split over; -1 is the rest
  mesh.tensor = 1  # devices that heads and MLP are split over
  return c


def apply(c: ConfigDict, fields: Mapping[str, Any]) -> None:
  """Sets dotted fields, such as a recipe's."""
  for name, value in fields.items():
    section, _, field = name.rpartition(".")
    (c[section] if section else c)[field] = value
