"""Every task on PictoTalk, from raw pictures and sound to figures.

Chance is the same score for captions drawn at random from the set; ceilings are what the referees
say of the originals and of the codecs' reconstructions.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from aromni_jax import model_dir
from aromni_jax.codecs import audio, batching, image_vq
from aromni_jax.codecs.registry import CODECS
from aromni_jax.evaluation.metrics.captions import caption_scores
from aromni_jax.evaluation.metrics.wer import NORMALISER, error_rates
from aromni_jax.evaluation.suite import Suite
from aromni_jax.model import Model
from aromni_jax.pictotalk import records, world
from aromni_jax.pictotalk.scene_reader import read_scene, scene_scores
from aromni_jax.pictotalk.speech_recogniser import SAMPLE_RATE, recognise
from aromni_jax.pictotalk.world import Caption
from aromni_jax.recipes import Sampler
from aromni_jax.serving.requests import Request, Response, generate_batch

VOICES = ("f2", "f5", "m2")  # heard in training
REPLY_VOICES = ("f2", "f5")  # spoken in training
UNSEEN_VOICE = "f3"

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Item:
  """One raw record.

  Attributes:
    caption: what it shows and says.
    image: uint8[64, 64, 3].
    speech: voice -> float32[n] at 16 kHz.
  """

  caption: Caption
  image: np.ndarray
  speech: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
  """One request with what should come back: part ("text", "image" ...) -> caption or text."""

  row: str
  item: int
  request: Request
  expected: dict[str, Any]


def load_items(data_dir: str, config: str, split: str, limit: int = 0) -> list[Item]:
  """Returns the records of a raw PictoTalk split, sorted by key.

  Args:
    data_dir: folder that `data_pipelines.build_pictotalk` wrote.
    config: PictoTalk preset.
    split: its split.
    limit: if not 0, at most so many records, always the same random ones.

  Raises:
    FileNotFoundError: if the set or the split is not there.
  """
  builder = records.open_set(data_dir, config)
  if split not in builder.info.splits:
    raise FileNotFoundError(
      f"PictoTalk {config} in {data_dir} has no split {split!r}; it has {list(builder.info.splits)}"
    )
  source = builder.as_data_source(split)
  found = sorted((source[i] for i in range(len(source))), key=lambda r: r["key"])
  if limit and limit < len(found):
    found = [found[i] for i in _some(len(found), limit)]
  voices = (*VOICES, UNSEEN_VOICE)
  return [
    Item(
      Caption(int(r["count"]), r["object"].decode(), r["colour"].decode()),
      r["image"][0],
      {v: r[f"speech_{v}"].astype(np.float32) / 32768 for v in voices},
    )
    for r in found
  ]


def _some(size: int, count: int) -> list[int]:
  """Returns positions of at most `count` of `size` items; even steps would miss most objects."""
  return sorted(np.random.default_rng(0).permutation(size)[:count].tolist())


def make_cases(items: Sequence[Item], sample_rate: int) -> list[Case]:
  """Returns the requests of all tasks; the first part of a `row` is its task.

  Args:
    items: raw records.
    sample_rate: rate that the model hears.
  """
  cases = []
  for i, item in enumerate(items):
    caption, text = item.caption, item.caption.text
    clips = {v: audio.resample(x, SAMPLE_RATE, sample_rate) for v, x in item.speech.items()}
    voice = VOICES[i % len(VOICES)]

    def add(row, expected, i=i, **inputs):
      cases.append(Case(row, i, Request(row.split("/")[0], **inputs), expected))

    for v, clip in clips.items():
      add(f"speech_to_text/{v}", {"text": text}, speech=clip)
    add("text_to_speech", {"speech": text}, text=text)
    add("image_caption", {"text": text}, image=item.image)
    add("text_to_image", {"image": caption}, text=text)
    add("speech_to_image", {"image": caption}, speech=clips[voice])
    add("image_to_speech", {"speech": text}, image=item.image)
    for kind, (question, answer) in world.questions(caption).items():
      add(f"image_to_text/{kind}", {"text": answer}, image=item.image, instruction=question)
      add(f"text_to_text/{kind}", {"text": answer}, text=text, instruction=question)
    reply = {"transcript": text, "text": f"Here is {text}", "speech": text, "image": caption}
    add("dialogue", reply, speech=clips[voice])
  return cases


def text_scores(references: Sequence[str], hypotheses: Sequence[str]) -> Scores:
  """Returns wer, cer, exact and word_accuracy."""
  return error_rates(references, hypotheses) | caption_scores(references, hypotheses)


def evaluate(
  model: Model,
  items: Sequence[Item],
  *,
  preset: str,
  seed: int = 0,
  samplers: Mapping[str, Sampler] | None = None,
  batch_size: int = 32,
) -> tuple[dict[str, Any], list[tuple[Case, Response]]]:
  """Returns the figures, and every case with its response.

  Args:
    model: codecs and a decoder.
    items: raw records.
    preset: PictoTalk preset, whose captions the recogniser's grammar allows.
    seed: of the samplers.
    samplers: name -> sampler; the recipe's if None.
    batch_size: responses at a time.
  """
  cases = make_cases(items, model.speech_codec.config.sample_rate)
  logging.info("Generating %d responses.", len(cases))
  responses = generate_batch(
    model, [c.request for c in cases], seed=seed, samplers=samplers, batch_size=batch_size
  )
  referees = _Referees(model, preset)
  logging.info("Reading pictures and recognising speech.")
  results: dict[str, Any] = {}
  groups = collections.defaultdict(list)
  for case, response in zip(cases, responses, strict=True):
    for part in case.expected:
      groups[case.row, part].append((case, response))
  everything = world.captions(preset)
  rng = np.random.default_rng(seed)
  for (row, part), pairs in groups.items():
    expected = [case.expected[part] for case, _ in pairs]
    found = [referees.read(part, getattr(response, part)) for _, response in pairs]
    score = scene_scores if part == "image" else text_scores
    random = [everything[i] for i in rng.integers(len(everything), size=len(pairs))]
    guesses = [_as_answer(guess, row, part) for guess in random]
    entry = {"n": len(pairs), **score(expected, found), "chance": score(expected, guesses)}
    results[row if len(pairs[0][0].expected) == 1 else f"{row}/{part}"] = entry
  return {"rows": results, "ceilings": referees.ceilings(items)}, list(
    zip(cases, responses, strict=True)
  )


def _as_answer(caption: Caption, row: str, part: str) -> Any:
  """What a guesser who always answers with this caption would say."""
  if part == "image":
    return caption
  task, _, kind = row.partition("/")
  if task in ("image_to_text", "text_to_text"):
    return world.questions(caption)[kind][1]
  return f"Here is {caption.text}" if (task, part) == ("dialogue", "text") else caption.text


class _Referees:
  """Reads generated parts back into what they say."""

  def __init__(self, model: Model, preset: str):
    self.model, self.preset = model, preset
    self.rate = model.speech_codec.config.sample_rate
    new = world.NEW_OBJECTS if preset == "new_objects" else ()
    self.objects = world.OBJECTS + new

  def read(self, part: str, value: Any) -> Any:
    if part == "image":
      return read_scene(value, self.objects)
    if part == "speech":
      return recognise(audio.resample(value, self.rate, SAMPLE_RATE), self.preset)
    return value

  def ceilings(self, items: Sequence[Item]) -> dict[str, Scores]:
    """What the referees say of the originals and of the codecs' reconstructions."""
    captions = [item.caption for item in items]
    out = {}
    pictures = np.stack([item.image for item in items])
    codes = batching.encode_images(self.model.image_codec, pictures)
    rebuilt = batching.decode_images(self.model.image_codec, codes)
    for name, seen in (("original", pictures), ("codec", rebuilt)):
      out[f"image/{name}"] = scene_scores(captions, [self.read("image", p) for p in seen])
    out["image/codec"]["psnr"] = image_vq.psnr(rebuilt, pictures)
    texts = [caption.text for caption in captions]
    for voice in REPLY_VOICES:
      clips = [audio.resample(item.speech[voice], SAMPLE_RATE, self.rate) for item in items]
      codes = batching.encode_speech(self.model.speech_codec, clips)
      rebuilt = batching.decode_speech(self.model.speech_codec, codes)
      for name, heard in (("original", clips), ("codec", rebuilt)):
        scores = text_scores(texts, [self.read("speech", x) for x in heard])
        out[f"speech/{voice}/{name}"] = scores
    return out


def describe(model: Model) -> dict[str, Any]:
  """Returns what the figures depend on besides the data and the seed."""
  samplers = model.recipe.samplers
  return {
    "model": "shipped" if model.path == model_dir.SHIPPED else str(model.path),
    "codecs": {name: model.fingerprints[name] for name in CODECS},
    "parameters": model.decoder.config.num_params(),
    "samplers": {name: dataclasses.asdict(sampler) for name, sampler in samplers.items()},
    "normaliser": NORMALISER,
    "speech_referee": "pocketsphinx with a grammar of the captions",
    "picture_referee": "template reader on the known glyphs, both blurred by 2 px",
    "chance": "the score of captions drawn at random from the whole set",
    "voices": {"heard": VOICES, "spoken": REPLY_VOICES, "unseen": UNSEEN_VOICE},
  }


def write_examples(
  folder: pathlib.Path,
  model: Model,
  items: Sequence[Item],
  answered: Sequence[tuple[Case, Response]],
  count: int,
) -> list[dict[str, Any]]:
  """Writes originals and responses of some captions for the report; returns their index.

  Args:
    folder: pictures and sounds go here.
    model: for the codec's own reconstruction.
    items: raw records.
    answered: the second result of `evaluate`.
    count: how many captions, always the same random ones.

  Returns:
    Per caption: name -> text, or the file's path relative to the folder's parent.
  """
  chosen = _some(len(items), count)
  responses = {(case.item, case.row): response for case, response in answered}
  rate = model.speech_codec.config.sample_rate
  folder.mkdir(parents=True, exist_ok=True)
  index = []
  for number, i in enumerate(chosen):
    item = items[i]
    entry: dict[str, Any] = {"caption": item.caption.text}

    def keep(name, value, number=number, entry=entry):
      if isinstance(value, str):
        entry[name] = value
        return
      path = folder / f"{number:02}_{name}{'.png' if value.ndim == 3 else '.wav'}"
      if value.ndim == 3:
        Image.fromarray(value).save(path)
      else:
        audio.write_wav(path, value, rate)
      entry[name] = f"{folder.name}/{path.name}"

    voice = REPLY_VOICES[0]
    codes = batching.encode_images(model.image_codec, item.image[None], batch_size=1)
    keep("original_image", item.image)
    keep("codec_image", batching.decode_images(model.image_codec, codes, batch_size=1)[0])
    clip = audio.resample(item.speech[voice], SAMPLE_RATE, rate)
    codes = batching.encode_speech(model.speech_codec, [clip], batch_size=1)
    keep("original_speech", clip)
    keep("codec_speech", batching.decode_speech(model.speech_codec, codes, batch_size=1)[0])
    for task, part in (
      *(("text_to_image", "image"), ("speech_to_image", "image"), ("image_caption", "text")),
      *(("text_to_speech", "speech"), ("image_to_speech", "speech")),
      *(("dialogue", p) for p in ("transcript", "text", "speech", "image")),
    ):
      keep(f"{task}_{part}", getattr(responses[i, task], part))
    keep("speech_to_text_text", responses[i, f"speech_to_text/{voice}"].text)
    index.append(entry)
  return index


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the figures as aligned text, one row per task."""
  lines = []
  for name, entry in rows.items():
    shown = ("count", "object", "colour") if "object" in entry else ("wer", "exact")
    values = "  ".join(f"{k} {entry[k]:.3f} ({entry['chance'][k]:.3f})" for k in shown)
    lines.append(f"{name:26} n {entry['n']:4}  {values}")
  return "\n".join([f"{'task':26}         figure (chance)", *lines])


SUITE = Suite(
  presets=world.PRESETS,
  splits=world.SPLITS,
  load=load_items,
  evaluate=evaluate,
  examples=write_examples,
  describe=describe,
  table=table,
)
