"""The package as a user has it: a wheel in a fresh environment, away from the checkout."""

import dataclasses
import os
import pathlib
import shutil
import site
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).parents[1]
_PACKED = ("aromni_jax", "configs", "data_pipelines", "launch")
_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@dataclasses.dataclass(frozen=True)
class Installed:
  """An environment with the wheel; the packages that it requires are those of this interpreter.

  Attributes:
    python: its interpreter; the console script stands beside it.
    env: variables of its commands: nothing points to the checkout.
  """

  python: pathlib.Path
  env: dict[str, str]

  def aromni(
    self, *args: str, cwd: str | os.PathLike, env: dict[str, str] | None = None
  ) -> subprocess.CompletedProcess:
    """Runs the console script in a folder.

    Args:
      args: its words.
      cwd: the folder.
      env: further variables.
    """
    return self.run(str(self.python.with_name("aromni")), *args, cwd=cwd, env=env)

  def run(
    self, *command: str, cwd: str | os.PathLike, env: dict[str, str] | None = None
  ) -> subprocess.CompletedProcess:
    """Runs a command in a folder with this environment's programs first on PATH."""
    return subprocess.run(
      command, cwd=cwd, env=self.env | (env or {}), capture_output=True, text=True
    )


def install(folder: pathlib.Path) -> Installed:
  """Builds the wheel of this checkout and installs it into a new environment in a folder.

  A second call returns what is there.
  """
  python = folder / "venv/bin/python"
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
  env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
  env["XDG_CACHE_HOME"] = str(folder / "cache")
  made = Installed(python, env)
  if (folder / "whole").exists():
    return made
  source = folder / "source"
  for name in _PACKED:  # a copy, since a build leaves files behind
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in _FILES:
    shutil.copy(ROOT / name, source / name)
  _call(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
  purelib = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
  # A path in a .pth file brings the packages, but not the .pth files beside them, and so not the
  # checkout, which is installed there in place.
  packages = [p for p in (*site.getsitepackages(), site.getusersitepackages()) if os.path.isdir(p)]
  pathlib.Path(purelib, "parent.pth").write_text("\n".join(packages) + "\n")
  pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
  _call(*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(source))
  (wheel,) = folder.glob("*.whl")
  into = (*pip, f"--python={python}", "install", "--no-deps", "--no-index", "--ignore-installed")
  _call(*into, str(wheel))
  shutil.rmtree(source)
  where = made.run(str(python), "-c", "import aromni_jax; print(aromni_jax.__file__)", cwd=folder)
  assert where.stdout.startswith(purelib), where
  (folder / "whole").touch()
  return made


def _call(*command: str) -> None:
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
