"""Compiles the 7B training step for every machine of configs/pods.py and writes docs/scale.md.

  python -m benchmarks.scale                  all: about half an hour on two cores
  python -m benchmarks.scale --only=v6e       those whose name has it; the rest stays as it is

Needs libtpu, no TPU. Each step is compiled in a process of its own by `aromni plan --compile`; what
is not a TPU is estimated. Prints one JSON line.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app, flags

from aromni_jax.cluster.hardware import GIB
from aromni_jax.configs.pods import PODS

_ONLY = flags.DEFINE_string("only", "", "Part of the names of the rows that are made anew.")
_FIGURES = flags.DEFINE_string("figures", "docs/scale.json", "File of the figures behind the page.")
_PAGE = pathlib.Path("docs/scale.md")

# Name -> configuration, topology and changes. The last group is weak scaling: a row of 4096 tokens
# per chip, everything computed again, as it fits on 16 chips.
_WEAK = {
  16: ("v5e:4x4", 1), 64: ("v5e:8x8", 1), 256: ("v5e:16x16", 1), 512: ("2xv5e:16x16", 2),
  1024: ("4xv5e:16x16", 4), 2048: ("8xv5e:16x16", 8),
}  # fmt: skip


def cases() -> dict[str, list[str]]:
  """Returns the flags of `aromni plan` of every row, by its name."""
  out = {}
  for name in ("pretrain_7b", "finetune_7b"):
    for topology in PODS:
      out[f"{name}:{topology}"] = [
        f"--config={name}:{topology}",
        f"--topology={topology}",
      ]
  for policy in ("full", "mlp", "up"):
    flag = f"--config.model.remat_policy={policy}"
    out[f"remat {policy}"] = ["--config=pretrain_7b", "--topology=v5e:16x16", flag]
  for chips, (topology, data) in _WEAK.items():
    out[f"weak {chips}"] = [
      "--config=pretrain_7b",
      f"--topology={topology}",
      "--config.model.remat_policy=full",
      f"--config.batch_size={chips}",
      f"--config.mesh.data={data}",
    ]
  return out


def plan(arguments: list[str]) -> dict:
  """Returns the figures of `aromni plan`; an error's last line where there are none."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "plan.json"
    gpu = any("h100" in a for a in arguments)
    command = [sys.executable, "-m", "aromni_jax.plan", *arguments, f"--json={out}"]
    done = subprocess.run(
      command + ([] if gpu else ["--compile"]), capture_output=True, text=True, check=False
    )
    if out.exists():
      return json.loads(out.read_text())
    said = re.findall(r".*(?:[Ee]rror|Check failed).*", done.stderr) or ["no error was printed"]
    return {"error": said[-1].strip()}


def row(name: str, f: dict) -> str:
  """Returns a line of the table of machines."""
  if "error" in f:
    return f"| {name} | {f['error'][:80]} |" + " |" * 9
  compiled = f.get("compiled")
  best = compiled or f["estimate"]
  waits = f"{compiled['wire_waits']:.3f}" if compiled else "-"
  memory = f"{compiled['total'] / GIB:.2f}" if compiled else "-"
  ratio = f"{f['estimate']['total'] / compiled['total']:.3f}" if compiled else "-"
  mesh = " x ".join(str(n) for n in f["mesh"].values())
  tokens = f["rows"] * f["sequence_length"]
  return (
    f"| {name} | {mesh} | {f['rows']} x {f['sequence_length']} | {f['remat_policy']} | "
    f"{f['estimate']['total'] / GIB:.2f} | {memory} | {ratio} | {best['seconds']:.3f} | {waits} | "
    f"{best['mfu']:.3f} | {tokens / best['seconds'] / 1e3:.0f} |"
  )


_COLUMNS = (
  "", "mesh data x fsdp x tensor", "rows x tokens", "recomputes", "GiB, estimate", "GiB, compiler",
  "ratio", "step, s", "waits for collectives, s", "MFU at most", "thousand tokens/s",
)  # fmt: skip
_WEAK_COLUMNS = (
  "chips", "slices", "step, s", "waits for collectives, s", "MFU at most", "chip-s per M tokens",
)  # fmt: skip


def head(columns: tuple[str, ...]) -> list[str]:
  """Returns the first two lines of a table."""
  return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def tables(figures: dict[str, dict]) -> dict[str, str]:
  """Returns the tables of the page by their names."""
  machines = [row(n, f) for n, f in figures.items() if "7b:" in n]
  policies = [row(n, f) for n, f in figures.items() if n.startswith("remat")]
  weak = head(_WEAK_COLUMNS)
  for chips, (_, slices) in _WEAK.items():
    f = figures.get(f"weak {chips}", {}).get("compiled")
    if f:
      cost = chips * f["seconds"] / (chips * 4096 / 1e6)
      weak.append(
        f"| {chips} | {slices} | {f['seconds']:.3f} | {f['wire_waits']:.3f} | {f['mfu']:.3f} | "
        f"{cost:.0f} |"
      )
  return {
    "machines": "\n".join([*head(_COLUMNS), *machines]),
    "policies": "\n".join([*head(_COLUMNS), *policies]),
    "weak": "\n".join(weak),
  }


def write_page(figures: dict[str, dict]) -> None:
  """Puts the tables of some figures into the page."""
  page = _PAGE.read_text()
  for key, table in tables(figures).items():
    pattern = rf"(<!-- {key} -->\n).*?(<!-- end -->)"
    page = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.S)
  _PAGE.write_text(page)


def main(argv: list[str]) -> None:
  del argv
  path = pathlib.Path(_FIGURES.value)
  figures = json.loads(path.read_text()) if path.exists() else {}
  chosen = {name: arguments for name, arguments in cases().items() if _ONLY.value in name}
  for number, (name, arguments) in enumerate(chosen.items(), 1):
    print(f"{number}/{len(chosen)} {name}", file=sys.stderr, flush=True)
    figures[name] = plan(arguments)
    ordered = {n: figures[n] for n in cases() if n in figures}
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    write_page(ordered)
  compiled = {n: f["compiled"]["mfu"] for n, f in figures.items() if "compiled" in f}
  print(json.dumps({"benchmark": "scale", "mfu_at_most": compiled}))


if __name__ == "__main__":
  app.run(main)
