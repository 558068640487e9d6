"""Codec parameters as nested dicts of arrays, the form in which they are stored and converted."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def init(make: Callable[[nnx.Rngs], Module], seed: int) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the structure and the random parameters of a module, made in one compiled call.

  Args:
    make: builds the module from `rngs`.
    seed: seed of the parameters.
  """
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  return graphdef, jax.jit(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(jax.random.key(seed))


def to_params(module: nnx.Module) -> dict:
  """Returns the parameters as nested dicts of arrays, all keys strings (list positions too)."""
  return state_to_params(nnx.state(module, nnx.Param))


def state_to_params(state: nnx.State) -> dict:
  """Returns a state of parameters as nested dicts, all keys strings."""
  params: dict = {}
  for path, variable in nnx.to_flat_state(state):
    put(params, [str(key) for key in path], variable.get_value())
  return params


def put(params: dict, path: Sequence[str], leaf: Any) -> None:
  """Puts a leaf into nested dicts, making those that are missing."""
  *parents, last = path
  for key in parents:
    params = params.setdefault(key, {})
  params[last] = leaf


def from_params(make: Callable[[nnx.Rngs], Module], params: dict, name: str) -> Module:
  """Returns the module with the given parameters (nested dicts as `to_params` makes them).

  Args:
    make: builds the module from `rngs`; only its structure is used.
    params: nested dicts of arrays.
    name: what error messages call the module.

  Raises:
    ValueError: if names or shapes are not those of the module, naming the differences.
  """
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graphdef, state = nnx.split(abstract)
  check(to_params(abstract), shapes(params), name)
  nnx.replace_by_pure_dict(state, jax.device_put(params))  # jnp.asarray compiles for each shape
  return nnx.merge(graphdef, state)


def check(
  wanted: dict, have: dict[str, tuple[int, ...]], name: str, config: str = "its config"
) -> None:
  """Raises ValueError, naming the differences, if parameters do not have the wanted shapes.

  Args:
    wanted: nested dicts of arrays or their descriptions.
    have: dotted name -> shape.
    name, config: what messages call the module and what says its shape.
  """
  want = shapes(wanted)
  if want == have:
    return
  missing = sorted(want.keys() - have.keys())
  extra = sorted(have.keys() - want.keys())
  both = want.keys() & have.keys()
  differ = [f"{k}: {have[k]} for {want[k]}" for k in both if want[k] != have[k]]
  raise ValueError(
    f"The parameters of the {name} do not fit {config}: "
    f"missing {missing[:4]} ({len(missing)}), unexpected {extra[:4]} ({len(extra)}), "
    f"wrong shapes {sorted(differ)[:4]} ({len(differ)}). Use the config saved beside them."
  )


def shapes(params: dict) -> dict[str, tuple[int, ...]]:
  """Returns dotted name -> shape of nested dicts of arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {".".join(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
