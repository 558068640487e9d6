import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.prompts import (
  make_chat_prompt,
  make_prompt,
  make_sample,
  parse,
  read_response,
  wording,
)
from aromni_jax.recipes import PAPER, RECIPES, RELEASED, get_recipe
from aromni_jax.sample import Parts, Sample, Turn, without_prompt
from aromni_jax.tasks import TASKS
from aromni_jax.vocabulary import get_vocabulary
from tests import tiny

VOCABULARY = get_vocabulary("demo")
TEXT = tiny.text_model()
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


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_sample_parses_back_into_its_parts(task, recipe, seed):
  rng = np.random.default_rng(seed)
  inputs = random_parts(rng, TASKS[task].inputs)
  extra = ("transcript",) if TASKS[task].chats else ()
  response = random_parts(rng, TASKS[task].outputs + extra)
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
  for kind in TASKS[task].inputs:
    codes = {"image": VOCABULARY.image_codes, "speech": VOCABULARY.speech_codes}.get(kind)
    if codes:
      first = next(s for s in parse(prompt, VOCABULARY) if s.kind == kind)
      np.testing.assert_array_equal(codes(first.ids), getattr(inputs, kind))


def test_paper_prompt_in_words():
  ids = make_prompt(
    "text_to_speech", VOCABULARY, TEXT, recipe=PAPER, inputs=Parts(text="two dogs on blue")
  )
  assert ids[0] == VOCABULARY.bos and VOCABULARY.eoh in ids
  said = TEXT.decode(ids)
  assert said.startswith("USER:") and said.endswith("ASSISTANT:")
  assert TASKS["text_to_speech"].wordings[0] in said and "This is input: two dogs on blue" in said


V, SAY = VOCABULARY, TEXT.encode
CLIP, DRAWN = np.array([3, 1, 4]), np.arange(64)
SOUND = [V.boa, *V.speech_ids(CLIP), V.eoa]
SHOWN = [V.boi, *V.image_ids(DRAWN), V.eoi]
CHAT = "Please acknowledge the user's vocal input, create a textual response."


@pytest.mark.parametrize(
  "task, inputs, pieces",
  [
    (
      "image_caption",
      Parts(image=DRAWN),
      [SAY("USER:"), SHOWN, SAY("Describe this image."), [V.eoh], SAY("GPT:")],
    ),
    (
      "text_to_image",
      Parts(text="two dogs"),
      [
        SAY("USER:"),
        SAY("Create a picture that matches the essence of this text."),
        SAY(" This is input: "),
        SAY("two dogs"),
        [V.eoh],
        SAY(" GPT:"),
      ],
    ),
    (
      "speech_to_text",
      Parts(speech=CLIP),
      [
        SAY("USER:"),
        SAY("Can you please convert this speech into written text?"),
        SOUND,
        [V.eoh],
        SAY("GPT:"),
      ],
    ),
    (
      "text_to_speech",
      Parts(text="two dogs"),
      [
        SAY("USER:"),
        SAY("Convert this text into speech."),
        SAY("This is input: "),
        SAY("two dogs"),
        [V.eoh],
        SAY("GPT:"),
      ],
    ),
    ("dialogue", Parts(speech=CLIP), [SAY("USER:"), SOUND, SAY(CHAT), [V.eoh], SAY("GPT:")]),
  ],
)
def test_released_prompts_piece_by_piece(task, inputs, pieces):
  ids = make_prompt(task, V, TEXT, recipe=RELEASED, inputs=inputs)
  np.testing.assert_array_equal(ids, np.concatenate([[V.bos], *pieces]))


class Spelling:
  """A text codec that shows spaces: one id per character."""

  def encode(self, text):
    return np.array([V.text.start + ord(c) for c in text], np.int32)


def test_released_spaces_survive():
  pieces = {"text_to_image": (" This is input: ", " GPT:"), "text_to_speech": ("This is input: ",)}
  for task, wanted in pieces.items():
    ids = make_prompt(task, V, Spelling(), recipe=RELEASED, inputs=Parts(text="x"))
    said = "".join(chr(i - V.text.start) if i in V.text else "|" for i in ids)
    want = "|USER:" + TASKS[task].wordings[0] + wanted[0] + "x|" + (wanted[1:] or ("GPT:",))[0]
    assert said == want


def test_a_chat_of_three_turns_piece_by_piece():
  first = np.array([V.bos, 2100, 2101, V.eos], np.int32)
  second = np.array([2102, V.eom, V.eos], np.int32)
  turns = [
    Turn(CLIP, (DRAWN, DRAWN), "look", first),
    Turn(CLIP, (), "", second),
    Turn(CLIP, (DRAWN,), CHAT),
  ]
  pieces = [
    [[V.bos], SAY("USER:"), SHOWN, SHOWN, SOUND, SAY("look"), [V.eoh], SAY("GPT:")],
    [first, SAY("USER:"), SOUND, [V.eoh], SAY("GPT:")],
    [[2102, V.eom], SAY("USER:"), SHOWN, SOUND, SAY(CHAT), [V.eoh], SAY("GPT:")],
  ]
  ids = make_chat_prompt(turns, V, TEXT, recipe=RELEASED)
  np.testing.assert_array_equal(ids, np.concatenate(sum(pieces, [])))
  paper = make_chat_prompt(turns[2:], V, TEXT, recipe=PAPER)
  want = [[V.bos], SAY("USER:"), SHOWN, SAY(CHAT), SOUND, [V.eoh], SAY("ASSISTANT:")]
  np.testing.assert_array_equal(paper, np.concatenate(want))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
  "replies, kept",
  [
    # The first reply ended by itself, the next was cut by its budget: only the end is closed.
    ([[2100, V.eos], [2101, V.boa]], [[2100, V.eos], [2101, V.boa, V.eom]]),
    ([[V.eos, 2100], [2101, V.eos, V.eos]], [[V.eos, 2100], [2101, V.eom]]),
    ([[2100, V.eom], [2101, V.eom]], [[2100, V.eom], [2101, V.eom]]),
    ([[], [V.eos]], [[], [V.eom]]),
  ],
)
def test_only_the_end_of_the_history_is_closed(recipe, replies, kept):
  turns = [Turn(CLIP, (), "look", np.array(reply, np.int32)) for reply in replies]
  user = make_chat_prompt([Turn(CLIP, (), "look")], V, TEXT, recipe=recipe)
  ids = make_chat_prompt([*turns, Turn(CLIP, (), "look")], V, TEXT, recipe=recipe)
  want = [user, kept[0], user[1:], kept[1], user[1:]]
  np.testing.assert_array_equal(ids, np.concatenate(want))


@pytest.mark.parametrize(
  "turns, message",
  [
    ([], "a dialogue has no turn"),
    ([Turn(np.zeros(0, int))], "turn 0 of a dialogue needs speech"),
    ([Turn(CLIP), Turn(CLIP)], "turn 0 of 2: every turn but the last has a reply"),
    ([Turn(CLIP, reply=np.array([5]))], "turn 0 of 1: every turn but the last has a reply"),
  ],
)
def test_wrong_chats_are_named(turns, message):
  with pytest.raises(ValueError, match=message):
    make_chat_prompt(turns, V, TEXT, recipe=RELEASED)


def test_unfinished_and_unruly_responses_are_read_as_far_as_they_are():
  speech = V.speech_ids(CLIP)
  words = SAY("two dogs")
  got = read_response(np.array([*words, V.boa, *speech]), V, TEXT)
  assert got.text == "two dogs" and got.image is None and got.transcript is None
  np.testing.assert_array_equal(got.speech, CLIP)
  got = read_response(np.array([V.instruction, *words]), V, TEXT)
  assert got == Parts(transcript="two dogs")
  other = [V.boi, *V.image_ids(DRAWN[::-1]), V.eoi]
  ids = [V.instruction, V.response, *speech, *SHOWN, *words, V.bos, *other, V.boa, *speech, V.eoa]
  got = read_response(np.array(ids), V, TEXT)
  assert got.text == "two dogs" and got.transcript == ""
  np.testing.assert_array_equal(got.image, DRAWN)
  np.testing.assert_array_equal(got.speech, [*CLIP, *CLIP])
  got = read_response(np.array(SHOWN[:10]), V, TEXT)
  np.testing.assert_array_equal(got.image, [*DRAWN[:9], *[DRAWN[0]] * 55])
  assert read_response(np.array([V.eos]), V, TEXT) == Parts()


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
    make_prompt(task, VOCABULARY, TEXT, recipe=PAPER, inputs=inputs)
  with pytest.raises(ValueError, match="recipe 'mine' does not exist; expected one of paper, rel"):
    get_recipe("mine")


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
  empty = Sample(ids, "text_to_image", 12, "k")
  assert without_prompt(empty) is empty and empty.spans.tolist() == [[12, 12]]
  one = without_prompt(Sample(ids, "dialogue", 4, "k"))
  np.testing.assert_array_equal(one.tokens, [0, *range(4, 12)])
  np.testing.assert_array_equal(one.spans, [[1, 9]])
  for spans in ([[4, 6], [8, 11]], [[1, 6], [8, 12]], [[0, 2], [3, 5]]):
    sample = Sample(ids, "dialogue", spans[0][0], "k", np.array(spans, np.int32))
    assert (np.diff(without_prompt(sample).tokens) > 0).all()
    for (a, b), (c, d) in zip(spans, without_prompt(sample).spans, strict=True):
      np.testing.assert_array_equal(ids[a:b], without_prompt(sample).tokens[c:d])
