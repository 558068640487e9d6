"""Mappings to frozen dataclasses, each value checked: configurations, sections of files."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


def to_dataclass(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
  """Returns a frozen dataclass made of a (nested) mapping.

  Args:
    cls: the dataclass.
    values: field -> value; sections are mappings themselves.
    where: name of the mapping in error messages.

  Raises:
    ValueError: for a key that the dataclass does not have (with the nearest one), a missing
      field, or a value of the wrong type.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"{where} is {values!r}; expected the fields of {cls.__name__}")
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f"; did you mean {where}.{near[0]}?" if near else f"; it has {', '.join(fields)}"
      raise ValueError(f"{where}.{key} does not exist{hint}")
  out = {}
  for name, field in fields.items():
    if name not in values:
      if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        raise ValueError(f"{where}.{name} is missing")
      continue
    out[name] = _convert(hints[name], values[name], f"{where}.{name}")
  return cls(**out)


def _convert(hint: Any, value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return to_dataclass(hint, value, where)
  origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
  if origin is Mapping and isinstance(value, Mapping):
    return dict(value.items())
  if origin is tuple and isinstance(value, list | tuple):
    kind = arguments[0]
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, item in enumerate(value))
  if isinstance(hint, types.UnionType):
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, origin) or (hint is int and isinstance(value, bool)):
    raise ValueError(f"{where} is {value!r}; expected {getattr(origin, '__name__', origin)}")
  return value
