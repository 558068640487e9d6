"""What a 7B configuration changes with the machine: rows of a step, mesh, and what is recomputed.

docs/scale.md has the memory and time of each, `aromni plan` those of any other.
"""

import dataclasses

from ml_collections import ConfigDict

from aromni_jax.recipes import PAPER, RECIPES, Recipe


@dataclasses.dataclass(frozen=True)
class Pod:
  """Settings of a machine.

  Attributes:
    chips: of it.
    rows: of a step in pre-training, of 4096 tokens.
    data: copies of the parameters: one per slice, since only these cross the slower network.
    remat_policy: as much as the memory lets be kept.
    accumulate: micro-batches of a step in pre-training.
  """

  chips: int
  rows: int
  remat_policy: str
  data: int = 1
  accumulate: int = 1


PODS = {
  "v5e:16x16": Pod(256, 256, "norms"),
  "2xv5e:16x16": Pod(512, 512, "norms", data=2),
  "v5p:4x4x8": Pod(128, 256, "norms"),
  "v6e:16x16": Pod(256, 256, "norms"),
  "h100:8": Pod(8, 256, "norms", accumulate=16),
}
DEFAULT = "v5e:16x16"


def split_argument(argument: str, config: str) -> tuple[Recipe, str]:
  """Returns recipe and topology of RECIPE, TOPOLOGY or RECIPE,TOPOLOGY.

  Raises:
    ValueError: for anything else, naming the configuration.
  """
  recipe, topology = PAPER, DEFAULT
  for part in argument.split(",") if argument else ():
    if part in RECIPES:
      recipe = RECIPES[part]
    elif part in PODS:
      topology = part
    else:
      raise ValueError(
        f"{config}:{part} does not exist; expected one of {tuple(RECIPES)}, of {tuple(PODS)}, or "
        "one of both with a comma between them"
      )
  return recipe, topology


def pretraining(c: ConfigDict, topology: str) -> None:
  """Sets what depends on the machine: packed rows of 4096 tokens, whose number it divides."""
  pod = PODS[topology]
  c.mesh.data, c.model.remat_policy = pod.data, pod.remat_policy
  c.batch_size, c.accumulate = pod.rows, pod.accumulate
  c.data.sequence_length = 4096


def fine_tuning(c: ConfigDict, topology: str) -> None:
  """Sets what depends on the machine: where chips are more than rows, several share a row."""
  pod = PODS[topology]
  c.mesh.data = pod.data
  c.mesh.tensor = max(1, pod.chips // c.batch_size)
  c.model.remat_policy = "norms" if c.mesh.tensor > 1 else "full"
  c.accumulate = max(1, c.batch_size // pod.chips)
