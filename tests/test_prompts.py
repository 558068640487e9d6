import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax import model_dir
from aromni_jax.codecs.text import SentencePieceText
from aromni_jax.prompts import (
  INPUTS,
  OUTPUTS,
  RECIPES,
  WORDINGS,
  Parts,
  Sample,
  make_prompt,
  make_sample,
  parse,
  read_response,
  without_prompt,
  wording,
)
from aromni_jax.vocabulary import TASKS, get_vocabulary

VOCABULARY = get_vocabulary("demo")
TEXT = SentencePieceText(model_dir.SHIPPED / "text.model", VOCABULARY)
WORDS = ("one", "two", "dogs", "volcano", "on", "blue", "Zürich", "7")


def random_parts(rng, names):
  values = {}
  for name in names:
    if name == "image":
      values[name] = rng.integers(0, 1024, 64)
    elif name == "speech":
      values[name] = rng.integers(0, 1024, rng.integers(1, 80))
    else:
      values[name] = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
  return Parts(**values)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_sample_parses_back_into_its_parts(task, recipe, seed):
  rng = np.random.default_rng(seed)
  inputs = random_parts(rng, INPUTS[task])
  extra = ("transcript",) if task == "dialogue" else ()
  response = random_parts(rng, OUTPUTS[task] + extra)
  sample = make_sample(
    task, VOCABULARY, TEXT, recipe=recipe, inputs=inputs, response=response, key="k"
  )
  prompt = make_prompt(
    task,
    VOCABULARY,
    TEXT,
    recipe=recipe,
    inputs=inputs,
    instruction=wording(task, sample.key),
  )
  np.testing.assert_array_equal(sample.tokens[: sample.response_start], prompt)
  got = read_response(sample.tokens[sample.response_start :], VOCABULARY, TEXT)
  for name in ("text", "transcript"):
    assert getattr(got, name) == getattr(response, name)
  for name in ("image", "speech"):
    want, have = getattr(response, name), getattr(got, name)
    assert (want is None) == (have is None)
    if want is not None:
      np.testing.assert_array_equal(have, want)
  segments = parse(sample.tokens, VOCABULARY)
  np.testing.assert_array_equal(np.concatenate([s.ids for s in segments]), sample.tokens)
  for kind in INPUTS[task]:
    codes = {"image": VOCABULARY.image_codes, "speech": VOCABULARY.speech_codes}.get(kind)
    if codes:
      first = next(s for s in parse(prompt, VOCABULARY) if s.kind == kind)
      np.testing.assert_array_equal(codes(first.ids), getattr(inputs, kind))


def test_paper_prompt_in_words():
  ids = make_prompt(
    "text_to_speech", VOCABULARY, TEXT, recipe="paper", inputs=Parts(text="two dogs on blue")
  )
  assert ids[0] == VOCABULARY.bos and VOCABULARY.eoh in ids
  said = TEXT.decode(ids)
  assert said.startswith("USER:") and said.endswith("ASSISTANT:")
  assert WORDINGS["text_to_speech"][0] in said and "This is input: two dogs on blue" in said


def test_released_prompt_names():
  ids = make_prompt(
    "dialogue", VOCABULARY, TEXT, recipe="released", inputs=Parts(speech=np.array([1, 2]))
  )
  assert TEXT.decode(ids).endswith("GPT:")


@pytest.mark.parametrize(
  "task, inputs, message",
  [
    ("sing", Parts(text="a"), "task 'sing' does not exist; expected one of image_caption"),
    ("text_to_image", Parts(), "needs as input text; got none"),
    ("text_to_image", Parts(text="a", speech=[1]), "needs as input text; got speech and text"),
    ("text_to_image", Parts(text=""), "needs as input text, but it is empty"),
    ("image_caption", Parts(image=[1, 2]), "a picture has 64 codes; got 2"),
  ],
)
def test_wrong_inputs_are_named(task, inputs, message):
  with pytest.raises(ValueError, match=message):
    make_prompt(task, VOCABULARY, TEXT, recipe="paper", inputs=inputs)
  with pytest.raises(ValueError, match="recipe 'mine' does not exist"):
    make_prompt("text_to_image", VOCABULARY, TEXT, recipe="mine", inputs=Parts(text="a"))


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_is_encoded_into_text_ids(text):
  ids = TEXT.encode(text)
  assert all(i in VOCABULARY.text for i in ids)
  normal = TEXT.encode(TEXT.decode(ids))
  np.testing.assert_array_equal(normal, TEXT.encode(TEXT.decode(normal)))


def test_characters_outside_the_model_survive_as_bytes():
  assert TEXT.decode(TEXT.encode("Füße 象 two dogs")) == "Füße 象 two dogs"


def test_responses_of_several_turns_move_with_the_ids_when_the_prompt_goes():
  ids = np.arange(12)
  one = without_prompt(Sample(ids, "dialogue", 4, "k"))
  np.testing.assert_array_equal(one.tokens, [0, *range(4, 12)])
  np.testing.assert_array_equal(one.spans, [[1, 9]])
  for spans in ([[4, 6], [8, 11]], [[1, 6], [8, 12]], [[0, 2], [3, 5]]):
    sample = Sample(ids, "dialogue", spans[0][0], "k", np.array(spans, np.int32))
    assert (np.diff(without_prompt(sample).tokens) > 0).all()
    for (a, b), (c, d) in zip(spans, without_prompt(sample).spans, strict=True):
      np.testing.assert_array_equal(ids[a:b], without_prompt(sample).tokens[c:d])
