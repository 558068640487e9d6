"""PictoTalk -> token shards:

  aromni tokenize --data_dir=data --config=base --out=data/tokens_base

Pictures and speech are encoded by the codecs of --model (the shipped ones by default), and every
caption becomes samples of all nine tasks. About a minute for the base set on two cores. Equal input
gives equal shards.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator

import numpy as np
from absl import flags, logging

from aromni_jax import compilation_cache, logs
from aromni_jax.codecs import batching
from aromni_jax.data import token_shards
from aromni_jax.model import Model, load_model
from aromni_jax.pictotalk import world
from aromni_jax.pictotalk.records import open_set
from aromni_jax.prompts import make_sample
from aromni_jax.sample import Parts, Sample

INPUT_VOICES = ("f2", "f5", "m2")  # f3 is held out
OUTPUT_VOICES = ("f2", "f5")  # the recogniser hears them best
_TEST_VOICE = "f3"

Item = dict[str, object]  # a raw record; pictures and speech as codes


def encode(model: Model, source, voices: tuple[str, ...], scenes: int) -> list[Item]:
  """Returns the records of a split with their pictures and speech as codes.

  Args:
    model: codecs.
    source: random-access raw records.
    voices: voices to encode.
    scenes: pictures per caption to encode.
  """
  records = [source[i] for i in range(len(source))]
  pictures = np.concatenate([r["image"][:scenes] for r in records])
  logging.info("Encoding %d pictures.", len(pictures))
  images = batching.encode_images(model.image_codec, pictures).reshape(len(records), scenes, -1)
  items = []
  for record, codes in zip(records, images, strict=True):
    names = {k: record[k].decode() for k in ("key", "caption", "object", "colour")}
    items.append({**names, "count": int(record["count"]), "image": codes, "speech": {}})
  for voice in voices:
    logging.info("Encoding %d phrases of voice %s.", len(records), voice)
    clips = [r[f"speech_{voice}"].astype(np.float32) / 32768 for r in records]
    for item, codes in zip(items, batching.encode_speech(model.speech_codec, clips), strict=True):
      item["speech"][voice] = codes
  return sorted(items, key=lambda item: item["key"])


def make_samples(
  items: list[Item], model: Model, voices: tuple[str, ...], scenes: int
) -> Iterator[Sample]:
  """Yields the samples of all tasks.

  Args:
    items: what `encode` returns.
    model: vocabulary, text codec and recipe.
    voices: voices of spoken inputs; spoken outputs use those of `OUTPUT_VOICES`.
    scenes: pictures per caption.
  """
  for item in items:
    for task, variant, inputs, response, instruction in _variants(item, voices, scenes):
      yield make_sample(
        task,
        model.vocabulary,
        model.text,
        recipe=model.recipe,
        inputs=inputs,
        response=response,
        key=f"{item['key']}/{variant}",
        instruction=instruction,
      )


def _variants(item: Item, voices, scenes):
  caption, images, speech = item["caption"], item["image"], item["speech"]
  spoken = [v for v in OUTPUT_VOICES if v in speech]

  def any_of(options, name):
    """A choice that depends on the item and the name alone."""
    digest = hashlib.sha256(f"{item['key']}/{name}".encode()).digest()
    return options[digest[1] % len(options)]

  for i in range(scenes):
    yield "image_caption", i, Parts(image=images[i]), Parts(text=caption), None
    yield "text_to_image", i, Parts(text=caption), Parts(image=images[i]), None
    voice = voices[i % len(voices)]
    yield "speech_to_image", i, Parts(speech=speech[voice]), Parts(image=images[i]), None
    if spoken:
      reply = speech[spoken[i % len(spoken)]]
      yield "image_to_speech", i, Parts(image=images[i]), Parts(speech=reply), None
  for voice in voices:
    yield "speech_to_text", voice, Parts(speech=speech[voice]), Parts(text=caption), None
  for voice in spoken:
    yield "text_to_speech", voice, Parts(text=caption), Parts(speech=speech[voice]), None
  scene = world.Caption(item["count"], item["object"], item["colour"])
  for number, (question, answer) in enumerate(world.questions(scene).values()):
    image = any_of(images, number)
    yield "image_to_text", number, Parts(image=image), Parts(text=answer), question
    yield "text_to_text", number, Parts(text=caption), Parts(text=answer), question
  for voice, reply in itertools.islice(itertools.product(voices, spoken), 0, None, 3):
    response = Parts(
      transcript=caption,
      text=f"Here is {caption}",
      speech=speech[reply],
      image=any_of(images, voice),
    )
    yield "dialogue", f"{voice}_{reply}", Parts(speech=speech[voice]), response, None


def tokenise(data_dir: str, config: str, out: str, model: Model) -> dict:
  """Writes the token shards of a PictoTalk configuration and returns their manifest.

  Raises:
    FileNotFoundError: if the raw set is not there.
  """
  builder = open_set(data_dir, config)
  splits = {}
  for split in builder.info.splits:
    training = split == "train"
    voices = INPUT_VOICES if training else OUTPUT_VOICES
    source, scenes = builder.as_data_source(split), 4 if training else 1
    extra = (_TEST_VOICE,) if split == "test" else ()
    items = encode(model, source, tuple(dict.fromkeys(voices + extra)), scenes)
    splits[split] = make_samples(items, model, voices, scenes)
    if extra:
      splits["test_voice"] = make_samples(items, model, extra, 1)
  if "validation" not in splits:  # the tiny set has none
    splits["validation"] = make_samples(items, model, voices, scenes)
  fingerprints = {f"{name}_fingerprint": value for name, value in model.fingerprints.items()}
  captions = world.captions(config)
  hashes = {
    split: hashlib.sha256(
      "\n".join(c.text for c in captions if c.split == split).encode()
    ).hexdigest()
    for split in world.SPLITS
  }
  metadata = {**fingerprints, "recipe": model.recipe.name, "source": config, "split_hashes": hashes}
  return token_shards.write(out, splits, model.vocabulary, metadata)


_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the TFDS data sets.")
_CONFIG = flags.DEFINE_enum("config", "base", world.PRESETS, "Which PictoTalk set.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
_MODEL = flags.DEFINE_string("model", None, "Model directory with codecs; the shipped one if none.")


def main(argv: list[str]) -> None:
  del argv
  compilation_cache.enable()
  out = _OUT.value or os.path.join(_DATA_DIR.value, f"tokens_{_CONFIG.value}")
  manifest = tokenise(_DATA_DIR.value, _CONFIG.value, out, load_model(_MODEL.value))
  for split, counts in manifest["splits"].items():
    logging.info("%s: %d samples, %d tokens", split, counts["samples"], counts["tokens"])


if __name__ == "__main__":
  logs.run(main)
