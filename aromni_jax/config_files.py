"""Finds and loads the configuration that --config names.

  --config=demo                     of the package
  --config=demo:tiny                with an argument, which its get_config takes
  --config=mine.py, ../a/mine.py    a file of one's own, with :argument if it takes one

Whatever is wrong with it is a `ConfigError`: one line that names it the way it was typed.
"""

import difflib
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
import types

from absl import flags
from ml_collections import ConfigDict, config_flags

from aromni_jax import configs

flags.disclaim_key_flags()  # --config is of the job that asks for it
_HELP = "Configuration of the package, e.g. demo:tiny, or a file, with :argument if it takes one."


class ConfigError(flags.Error):
  """A configuration that cannot be loaded, or a field that it does not have."""


def define(values: flags.FlagValues = flags.FLAGS, sys_argv: list[str] | None = None) -> None:
  """Defines --config, and with it --config.FIELD for every field of what it names.

  Args:
    values: where it is defined.
    sys_argv: words that name fields; the program's own if None.
  """
  config_flags.DEFINE_config_file("config", None, _HELP, flag_values=values, sys_argv=sys_argv)
  values["config"].parser = _Parser(sys_argv)


class _Parser(flags.ArgumentParser):
  """What --config=TEXT stands for, once the fields that the line sets are known to exist."""

  def __init__(self, sys_argv: list[str] | None):
    self._sys_argv = sys_argv

  def parse(self, text: str) -> ConfigDict:
    config = load(text)
    for word in sys.argv if self._sys_argv is None else self._sys_argv:
      if field := re.match(r"--?(?:no)?config\.([^=]+)", word):
        _check_field(config, field[1], text)
    return config.lock()

  def flag_type(self) -> str:
    return "configuration"


def names() -> list[str]:
  """Returns the names of the package's configurations."""
  files = pathlib.Path(configs.__file__).parent.glob("*.py")
  return sorted(f.stem for f in files if re.search(r"^def get_config\(", f.read_text(), re.M))


def find(name: str) -> pathlib.Path:
  """Returns the file of a configuration.

  Args:
    name: without the argument: of the package's configurations, or a path.

  Raises:
    ConfigError: if there is no such file.
  """
  ours = names()
  if name in ours:
    return pathlib.Path(configs.__file__).with_name(f"{name}.py")
  path = pathlib.Path(name)
  if path.is_file():
    return path
  near = difflib.get_close_matches(path.stem, ours, n=1)
  hint = f"did you mean {near[0]}?" if near else f"the package has {', '.join(ours)}."
  raise ConfigError(f"{name} does not exist; {hint} A file of your own is named by its path")


def load(text: str) -> ConfigDict:
  """Returns the configuration that NAME or NAME:ARGUMENT names.

  Raises:
    ConfigError: if there is none, or its file does not make one.
  """
  name, colon, argument = text.partition(":")
  path = find(name)
  _know_configs()
  module = types.ModuleType("config_file")
  module.__file__ = str(path)
  sys.modules[module.__name__] = module  # as for an import; dataclasses look there
  try:
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
  except Exception as e:
    raise ConfigError(f"{name}: {_cause(e, path)}") from e
  get_config = getattr(module, "get_config", None)
  if not callable(get_config):
    raise ConfigError(f"{name} has no function get_config")
  arguments = [argument] if colon else []
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    wants = "takes no argument" if colon else f"needs an argument, {name}:ARGUMENT"
    raise ConfigError(f"{text}: its get_config {wants}") from None
  try:
    config = get_config(*arguments)
  except ValueError as e:
    message = _line(e)
    raise ConfigError(message if message.startswith(text) else f"{text}: {message}") from e
  except Exception as e:
    raise ConfigError(f"{text}: {_cause(e, path)}") from e
  if not isinstance(config, ConfigDict):
    raise ConfigError(f"{text}: get_config returned {type(config).__name__}, expected ConfigDict")
  return config


def _know_configs() -> None:
  """Lets files say `from configs import base`, as all did when there was only a checkout."""
  if "configs" not in sys.modules and importlib.util.find_spec("configs") is None:
    sys.modules["configs"] = configs


def _cause(error: Exception, path: pathlib.Path) -> str:
  """Returns where in a file something went wrong, and what, on one line."""
  if isinstance(error, SyntaxError) and error.filename == str(path):
    return f"line {error.lineno}: {error.msg}"
  frames = traceback.extract_tb(error.__traceback__)
  line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
  where = f"line {line}: " if line else ""
  return f"{where}{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
  return " ".join(str(error).split())


def _check_field(config: ConfigDict, field: str, text: str) -> None:
  """Raises ConfigError for config.FIELD that a configuration does not have, with the nearest."""
  where, value = "config", config
  for key in field.split("."):
    has = list(value) if isinstance(value, ConfigDict) else []
    if key not in has:
      near = difflib.get_close_matches(key, has, n=1)
      hint = f"{where} has {', '.join(has) or 'no fields'}"
      hint = f"did you mean {where}.{near[0]}?" if near else hint
      raise ConfigError(f"--{where}.{key} does not exist in {text}; {hint}")
    where, value = f"{where}.{key}", value[key]
