"""Opens pages in headless Chromium, and says what is broken in them.

  python -m tests.open_page runs/tiny/report.html [--screenshots=DIR]

A page passes if every picture has pixels, every sound has a length, every table has rows, nothing
is fetched from elsewhere, and nothing is written to the console, at the width of a screen and of a
telephone. Exit status: 0 if all pass; 1 with a line for everything that is wrong.
"""

import argparse
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

WIDTHS = (1200, 400)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
  *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
  *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
  *("--hide-scrollbars", "--force-device-scale-factor=1", "--enable-logging=stderr"),
  "--virtual-time-budget=20000",
)
# Goes to the end of a copy of the page, and leaves there what it has seen.
_LOOK = """
<script>
addEventListener("load", async () => {
  const name = (x) => (x.alt || x.parentElement.innerText.replace(/\\s+/g, " ")).slice(0, 60);
  const heard = (a) => a.readyState ? 1 : new Promise((done) => {
    a.onloadedmetadata = a.onerror = done;
    a.preload = "metadata";
    a.load();
  });
  const images = [...document.images], sounds = [...document.querySelectorAll("audio")];
  await Promise.all([...images.map((x) => x.decode().catch(() => 0)), ...sounds.map(heard)]);
  const seen = {
    images: images.length,
    broken_images: images.filter((x) => !x.naturalWidth).map(name),
    sounds: sounds.length,
    broken_sounds: sounds.filter((x) => !(x.duration > 0)).map(name),
    rows: [...document.querySelectorAll("table")].map((x) => x.querySelectorAll("tr").length),
    fetched: performance.getEntriesByType("resource").map((x) => x.name)
      .filter((x) => !x.startsWith("data:")),
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
  };
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>
"""


def chromium() -> str:
  """Returns the browser's program.

  Raises:
    FileNotFoundError: if there is none.
  """
  for name in PROGRAMS:
    if shutil.which(name):
      return name
  raise FileNotFoundError(f"none of {', '.join(PROGRAMS)} is on PATH; apt-get install chromium")


def _run(page: pathlib.Path, width: int, height: int, *flags: str) -> subprocess.CompletedProcess:
  with tempfile.TemporaryDirectory() as profile:
    return subprocess.run(
      [chromium(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", *flags]
      + [page.resolve().as_uri()],
      capture_output=True,
      text=True,
      timeout=180,
    )


def look(page: pathlib.Path, width: int) -> dict:
  """Returns what the browser has of a page, see `_LOOK`, and lines of its `console`.

  Raises:
    ValueError: if the browser says nothing of it.
  """
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, "page.html")
    copy.write_text(page.read_text() + _LOOK)
    done = _run(copy, width, 900, "--dump-dom")
  found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
  if not found:
    raise ValueError(f"{page}: the browser gave no answer: {done.stderr[-2000:]}")
  console = re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)
  return json.loads(html.unescape(found[1])) | {"console": console}


def wrong(seen: dict) -> list[str]:
  """Returns a sentence for everything that is wrong with what `look` saw."""
  out = [f"a picture is broken: {x}" for x in seen["broken_images"]]
  out += [f"a sound is broken: {x}" for x in seen["broken_sounds"]]
  out += [f"it fetches {x}" for x in seen["fetched"]]
  out += [f"the console says {x}" for x in seen["console"]]
  out += [f"table {i} has {n} rows" for i, n in enumerate(seen["rows"]) if n < 2]
  for name in ("images", "sounds", "rows"):
    if not seen[name]:
      out.append(f"it has no {name}")
  return out


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="python -m tests.open_page", description=__doc__)
  parser.add_argument("pages", nargs="+", type=pathlib.Path)
  parser.add_argument("--screenshots", type=pathlib.Path, help="Folder for a picture per width.")
  args = parser.parse_args(argv)
  found = 0
  for page in args.pages:
    for width in WIDTHS:
      seen = look(page, width)
      print(
        f"{page}, {width} px wide: {seen['images']} pictures, {seen['sounds']} sounds, tables of "
        f"{seen['rows']} rows, {seen['width']} x {seen['height']} px"
      )
      for line in wrong(seen):
        found += 1
        print(f"{page}, {width} px wide: {line}", file=sys.stderr)
      if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
        file = args.screenshots / f"{page.stem}_{width}.png"
        _run(page, width, min(seen["height"], 8000), f"--screenshot={file.resolve()}")
  return min(found, 1)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
