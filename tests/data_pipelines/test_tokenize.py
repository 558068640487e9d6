import numpy as np
import pytest

from aromni_jax.codecs import batching
from aromni_jax.data.token_shards import TokenShards
from aromni_jax.data_pipelines import picto_talk
from aromni_jax.data_pipelines.tokenize import tokenise
from aromni_jax.model import load_model
from aromni_jax.pictotalk import suite, world
from aromni_jax.prompts import parse, read_response


@pytest.fixture(scope="module")
def model():
  return load_model()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  out = tmp_path_factory.mktemp("raw")
  picto_talk.build(str(out), "tiny")
  return out


@pytest.fixture(scope="module")
def tokens(data_dir, model):
  return data_dir / "tokens", tokenise(str(data_dir), "tiny", str(data_dir / "tokens"), model)


@pytest.mark.slow
def test_manifest_counts_and_names_what_the_tokens_are(tokens, model):
  out, manifest = tokens
  train = manifest["splits"]["train"]
  captions = len(world.captions("tiny", "train"))
  assert train["samples_of_task"]["image_caption"] == 4 * captions
  assert train["samples_of_task"]["text_to_speech"] == 2 * captions
  assert train["samples_of_task"]["image_to_text"] == 3 * captions
  assert manifest["image_codec_fingerprint"] == model.fingerprints["image_codec"]
  assert manifest["vocabulary_fingerprint"] == model.vocabulary.fingerprint()
  assert train["tokens"] == TokenShards(out, "train", model.vocabulary).lengths.sum()


@pytest.mark.slow
def test_no_test_caption_is_trained_on(tokens, model):
  out, _ = tokens
  said = {}
  for split in ("train", "test"):
    shards = TokenShards(out, split, model.vocabulary)
    said[split] = {
      read_response(s.tokens[s.response_start :], model.vocabulary, model.text).text
      for s in shards
      if s.task == "image_caption"
    }
  assert said["test"] and not said["train"] & said["test"]
  assert said["test"] == {c.text for c in world.captions("tiny", "test")}


@pytest.mark.slow
def test_codes_are_those_of_the_raw_record(tokens, data_dir, model):
  out, _ = tokens
  item = suite.load_items(str(data_dir), "tiny", "test", limit=1)[0]
  text = item.caption.text.replace(" ", "_")
  sample = next(
    s
    for s in TokenShards(out, "test", model.vocabulary)
    if s.task == "image_caption" and s.key == f"tiny/{text}/0"
  )
  (ids,) = [s.ids for s in parse(sample.tokens, model.vocabulary) if s.kind == "image"]
  codes = batching.encode_images(model.image_codec, item.image[None], batch_size=1)[0]
  # Codes at near ties may differ between batch sizes.
  assert np.mean(model.vocabulary.image_codes(ids) == codes) > 0.95


@pytest.mark.slow
def test_two_builds_give_identical_shards(tokens, data_dir, model):
  out, manifest = tokens
  again = data_dir / "again"
  assert tokenise(str(data_dir), "tiny", str(again), model) == manifest
  files = sorted(p.relative_to(out) for p in out.rglob("*array_record*"))
  assert files
  for file in files:
    assert (out / file).read_bytes() == (again / file).read_bytes()


def test_missing_raw_set_is_named(tmp_path, model):
  with pytest.raises(FileNotFoundError, match="make it with aromni build_pictotalk"):
    tokenise(str(tmp_path), "tiny", str(tmp_path / "out"), model)
  with pytest.raises(FileNotFoundError, match="make it with aromni build_pictotalk"):
    suite.load_items(str(tmp_path), "tiny", "test")
