"""One HTML page of runs and evaluations, with every picture and sound inside it."""

import base64
import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.reference { color: #777; }
.scene { display: inline-block; margin: 0 .8rem .5rem 0; text-align: center; font-size: 12px;
  vertical-align: top; }
.scene img { width: 128px; image-rendering: pixelated; display: block; }
audio { height: 30px; width: 180px; display: block; }
section.example { border-top: 1px solid #ddd; padding: .8rem 0; }
.note { color: #666; font-size: 13px; }
"""

# Figures that are shown, of a task and of a ceiling, where there are such.
_SHOWN = ("wer", "exact", "count", "object", "colour")
_CEILINGS = ("count", "object", "colour", "psnr", "wer")


def page(
  evaluations: Mapping[str, Mapping[str, Any]],
  folders: Mapping[str, pathlib.Path],
  runs: Mapping[str, pathlib.Path],
) -> str:
  """Returns the page.

  Args:
    evaluations: name -> contents of a file that `aromni evaluate` wrote; the first one's examples
      come first.
    folders: name -> folder of that file, to find the examples.
    runs: name -> workdir of a training, for its loss curves.

  Raises:
    FileNotFoundError: if a run has no metrics.jsonl or an example's file is missing.
  """
  parts = ["<h1>aromni_jax on PictoTalk</h1>"]
  parts.append(
    "<p>One decoder reads and writes text, pictures and speech. Captions below pair objects with "
    "colours that no training has shown together.</p>"
  )
  if evaluations:
    parts.append(_table(evaluations))
    parts.append(_ceilings(evaluations))
    parts += [_settings(name, data) for name, data in evaluations.items()]
  for name, workdir in runs.items():
    parts.append(f"<h2>Training: {html.escape(name)}</h2>")
    parts.append(_curves(workdir))
  for name, data in evaluations.items():
    parts.append(f"<h2>Unseen captions: {html.escape(name)}</h2>")
    parts += [_example(entry, folders[name]) for entry in data["examples"]]
  parts.append(
    '<p class="note">Pictures are made of OpenMoji glyphs (openmoji.org), CC BY-SA 4.0. '
    "Speech is synthesised by espeak-ng.</p>"
  )
  body = "\n".join(parts)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>aromni_jax report</title>'
    f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
  )


def _table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
  names = list(evaluations)
  head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
  rows = [f"<tr><th>task</th><th>figure</th><th>n</th>{head}<th>chance</th></tr>"]
  first = evaluations[names[0]]["rows"]
  for row, entry in first.items():
    for figure in _SHOWN:
      if figure not in entry:
        continue
      cells = "".join(_number(evaluations[n]["rows"].get(row, {}).get(figure)) for n in names)
      rows.append(
        f"<tr><td>{html.escape(row)}</td><td>{_label(figure)}</td><td>{entry['n']}</td>{cells}"
        f'<td class="reference">{entry["chance"][figure]:.3f}</td></tr>'
      )
  return f"<h2>Figures</h2><table>{''.join(rows)}</table>"


def _label(figure: str) -> str:
  labels = {"wer": "word error rate ↓", "exact": "exactly right ↑", "psnr": "PSNR in dB ↑"}
  return labels.get(figure, f"{figure} right ↑")


def _number(value: float | None) -> str:
  return "<td>–</td>" if value is None else f"<td><b>{value:.3f}</b></td>"


def _ceilings(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
  """What the referees say of originals and of the codecs' reconstructions."""
  data = next(iter(evaluations.values()))["ceilings"]
  rows = ["<tr><th>seen or heard by the referee</th><th>figure</th><th>value</th></tr>"]
  for name, scores in data.items():
    for figure in filter(scores.__contains__, _CEILINGS):
      rows.append(
        f"<tr><td>{html.escape(name)}</td><td>{_label(figure)}</td>{_number(scores[figure])}</tr>"
      )
  return (
    "<h3>Ceilings</h3><p>No figure for drawn pictures or spoken words can be expected to beat "
    "what the same referee says of the originals, or of the codec's reconstructions of them.</p>"
    f"<table>{''.join(rows)}</table>"
  )


def _settings(name: str, data: Mapping[str, Any]) -> str:
  hidden = ("rows", "ceilings", "examples")
  shown = {k: v for k, v in data.items() if k not in hidden}
  return f'<p class="note">{html.escape(name)}: {html.escape(json.dumps(shown))}</p>'


def _curves(workdir: pathlib.Path) -> str:
  """Loss curves of a run as SVG."""
  import matplotlib

  matplotlib.use("svg")
  from matplotlib import pyplot

  path = workdir / "metrics.jsonl"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; --runs takes workdirs of aromni train")
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
  for axis, prefix in zip(axes, ("loss", "modality/", "task/"), strict=True):
    names = sorted({k for line in lines for k in line if k.startswith(prefix)})
    for name in names:
      points = [(line["step"], line[name]) for line in lines if name in line]
      axis.plot(*zip(*points, strict=True), label=name.removeprefix(prefix).strip("/") or "total")
    axis.set_xlabel("step")
    axis.set_title({"loss": "losses", "modality/": "nats per token"}.get(prefix, "nats per token"))
    axis.set_yscale("log" if prefix == "loss" else "linear")
    axis.legend(fontsize=7)
  out = io.StringIO()
  figure.savefig(out, format="svg")
  pyplot.close(figure)
  return out.getvalue()[out.getvalue().index("<svg") :]


def _example(entry: Mapping[str, str], folder: pathlib.Path) -> str:
  caption = html.escape(entry["caption"])
  pictures = _scenes(
    entry,
    folder,
    {
      "original_image": "original",
      "codec_image": "codec's reconstruction",
      "text_to_image_image": "drawn from the text",
      "speech_to_image_image": "drawn from speech",
      "dialogue_image": "drawn in dialogue",
    },
  )
  sounds = _scenes(
    entry,
    folder,
    {
      "original_speech": "original",
      "codec_speech": "codec's reconstruction",
      "text_to_speech_speech": "said from the text",
      "image_to_speech_speech": "said of the picture",
      "dialogue_speech": "said in dialogue",
    },
  )
  read = " · ".join(
    f"{what}: <b>{html.escape(entry[name])}</b>"
    for name, what in (
      ("image_caption_text", "caption of the picture"),
      ("speech_to_text_text", "transcript of the speech"),
      ("dialogue_text", "reply in dialogue"),
    )
  )
  return f'<section class="example"><h3>{caption}</h3>{pictures}<br>{sounds}<p>{read}</p></section>'


def _scenes(entry: Mapping[str, str], folder: pathlib.Path, names: Mapping[str, str]) -> str:
  return "".join(
    f'<span class="scene">{_embed(folder / entry[name])}{label}</span>'
    for name, label in names.items()
  )


def _embed(path: pathlib.Path) -> str:
  """The tag of a picture or sound with its bytes inside."""
  data = base64.b64encode(path.read_bytes()).decode()
  if path.suffix == ".png":
    return f'<img alt="" src="data:image/png;base64,{data}">'
  return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def names_and_paths(values: Sequence[str]) -> dict[str, pathlib.Path]:
  """Returns "name=path" strings as a dict.

  Raises:
    ValueError: for a string without "=".
  """
  for value in values:
    if "=" not in value:
      raise ValueError(f"{value!r}: expected name=path")
  return {name: pathlib.Path(path) for name, _, path in (v.partition("=") for v in values)}
