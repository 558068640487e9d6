"""The two recipes, side by side: what the paper says (arXiv 2601.17761), and what the released code
does where it differs. Everything else in the project asks the recipe.

A recipe's prompts and decoding rules travel with a model; its training settings are what
`configs/` sets.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from aromni_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How ids are drawn in one kind of span.

  Attributes:
    temperature: 0 takes the likeliest id.
    top_p: share of the probability mass that is kept, the likeliest ids first.
    repetition_penalty: ids that stand in the sequence already become less likely (Keskar et al.
      2019); 1 is off.
    guidance: pictures only: how far the logits move away from those without a prompt (Ho and
      Salimans 2022); 1 is off.
    image_guidance: pictures only: the share of that move which the pictures so far cause, where
      `guidance` is the share of all else; None is as much as `guidance`.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  guidance: float = 1.0
  image_guidance: float | None = None

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f"temperature is {self.temperature}; it must be >= 0")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
    if self.repetition_penalty <= 0:
      raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be > 0")
    if self.guidance < 0:
      raise ValueError(f"guidance is {self.guidance}; it must be >= 0")
    if self.image_guidance is not None and self.image_guidance < 0:
      raise ValueError(f"image_guidance is {self.image_guidance}; it must be >= 0")


# Positions of the released model: the most that a prompt and its response have together.
CONTEXT = 4096


def _paper_budget(task: Task, picture: int, prompt: int, asked: int | None) -> int:
  """What the parts of a response usually need; a picture's is exact."""
  if asked:
    return asked
  ids = {"text": 64, "transcript": 64, "speech": 200, "image": picture}
  return 4 + sum(ids[part] for part in task.parts)


def _released_budget(task: Task, picture: int, prompt: int, asked: int | None) -> int:
  """`min(max_seq_len, prompt + max_gen_len) - prompt`. What is asked for is the max_gen_len; it
  counts all ids of a response, where the released code begins anew after each picture."""
  transcribes = task.inputs == ("speech",) and task.outputs == ("text",)
  context = 1024 if transcribes and asked is None else CONTEXT
  if task.only_draws:
    budget = picture - 1  # boi and codes
  elif task.chats or transcribes:
    budget = asked or context
  else:
    ids = {"text": 128, "speech": 1024, "image": picture}
    budget = asked or sum(ids[part] for part in task.outputs)
  budget = min(budget, context - prompt)
  if budget <= 0:
    raise ValueError(
      f"{task.name}: a prompt of {prompt} tokens leaves none of {context} for the response; "
      "shorten the input" + (" or set max_new_tokens" if context < CONTEXT else "")
    )
  return budget


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything in which the paper and the released code differ.

  Attributes:
    name: of it, as flags, model.json and manifests have it.
    machine: opens the model's turn.
    spaced_tasks: tasks whose prompt has a space before "This is input:" and before `machine`.
    speech_first: whether the user's speech stands before the instruction in a turn of a dialogue.
    chat_instruction: default instruction of a dialogue; None is the task's first wording.
    rules: of decoding: "grammar" (`decoding/state_machine.py`: every response parses) or "selector"
      (`decoding/released.py`).
    samplers: how ids are drawn. Grammar: in spans of "text", "speech" and "image"; selector:
      "greedy" and "sampled" in the text phase, and "image".
    budget: (task, ids of a picture with its marks, ids of the prompt, ids that are asked for or
      None) -> the most ids of a response. Raises ValueError if the prompt leaves no room.
    training: `config.` fields of every training, dotted.
    pretraining, fine_tuning: further ones of `configs/pretrain_7b.py` and `finetune_7b.py`.
    pretraining_tokens: of the whole pre-training, counted as steps x samples x longest sample.
    warmup: share of the steps of pre-training that warm up.
  """

  name: str
  machine: str
  spaced_tasks: frozenset[str]
  speech_first: bool
  chat_instruction: str | None
  rules: str
  samplers: Mapping[str, Sampler]
  budget: Callable[[Task, int, int, int | None], int]
  training: Mapping[str, Any]
  pretraining: Mapping[str, Any]
  fine_tuning: Mapping[str, Any]
  pretraining_tokens: int
  warmup: float


PAPER = Recipe(
  name="paper",
  machine="ASSISTANT:",
  spaced_tasks=frozenset(),
  speech_first=False,
  chat_instruction=None,
  rules="grammar",
  # The likeliest picture is an empty background, so pictures are sampled.
  samplers={
    "text": Sampler(),
    "speech": Sampler(),
    "image": Sampler(temperature=0.2, top_p=0.9, guidance=2.5),
  },
  budget=_paper_budget,
  training={
    "loss.perceptual_weight": 0.1,
    "loss.perceptual_pairing": "predicting",
    "loss.perceptual_distance": "squared_l2",
    "loss.perceptual_tasks": (),
    "loss.train_projection": True,
    "loss.normaliser": "tokens",
    "optimizer.learning_rate": 6e-5,
  },
  pretraining={
    "model.norm_placement": "swin",
    "change_norm_placement": True,  # Anole's norms stand before the branches; step 0 is not Anole
    # Text : pictures with text : speech with text = 0.5 : 1 : 2 (section 3); the paper does not say
    # how a modality is shared by its tasks, nor in which unit: halves, of tokens.
    "data.mixture": {
      "text_to_text": 0.5,
      "image_caption": 0.5,
      "text_to_image": 0.5,
      "speech_to_text": 1.0,
      "text_to_speech": 1.0,
    },
  },
  fine_tuning={
    "model.norm_placement": "swin",
    "data.sequence_length": 3456,
    "optimizer.learning_rate": 2e-5,
    "optimizer.warmup_steps": 900,  # 0.05
  },
  pretraining_tokens=140_000 * 480 * 1300,
  warmup=0.05,
)

RELEASED = Recipe(
  name="released",
  machine="GPT:",
  spaced_tasks=frozenset({"text_to_image"}),
  speech_first=True,
  chat_instruction="Please acknowledge the user's vocal input, create a textual response.",
  rules="selector",
  # The defaults of AR-Omni's code; its text-to-picture script has an image guidance of 1.32, which
  # without a picture in the prompt changes nothing.
  samplers={
    "greedy": Sampler(repetition_penalty=1.2),
    "sampled": Sampler(temperature=1.2, top_p=0.96, repetition_penalty=1.2),
    "image": Sampler(temperature=1.0, top_p=0.96, guidance=3.07, image_guidance=1.15),
  },
  budget=_released_budget,
  training={
    "loss.perceptual_weight": 1.0,
    "loss.perceptual_pairing": "own_position",
    "loss.perceptual_distance": "mse",
    "loss.perceptual_tasks": ("text_to_image",),
    "loss.train_projection": False,
    "loss.normaliser": "weights",
    "optimizer.learning_rate": 1e-5,
  },
  pretraining={
    "model.norm_placement": "pre",
    "change_norm_placement": False,  # the released code keeps what the checkpoint says
    "data.mixture": {},  # every sample as it comes
    "optimizer.b2": 0.999,
  },
  fine_tuning={
    "model.norm_placement": "pre",  # an error says so if the checkpoint has the other one
    "loss.perceptual_tasks": (),  # every picture that is answered with
    "data.sequence_length": 2048,
    "optimizer.b2": 0.999,
    "optimizer.warmup_steps": 540,  # 0.03; the released code counts 5 epochs instead of steps
  },
  pretraining_tokens=150_000 * 256 * 1300,
  warmup=0.03,
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (PAPER, RELEASED)}


def get_recipe(name: str) -> Recipe:
  """Returns a recipe. Raises ValueError for a name that does not exist."""
  if name not in RECIPES:
    raise ValueError(f"recipe {name!r} does not exist; expected one of {', '.join(RECIPES)}")
  return RECIPES[name]
