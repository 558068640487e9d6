"""Task templates: text, pictures and speech -> one sequence of ids, and back.

A prompt ends where the model's turn begins. A sample is a prompt with its response and `eom eos`.
Two families exist: `recipe="released"` has the exact pieces of AR-Omni's code, `recipe="paper"` the
`USER:` / `ASSISTANT:` names of the paper. Text pieces are encoded one by one and concatenated.
The instruction stands before the user's speech, in a released dialogue after it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from aromni_jax.codecs.text import TextCodec
from aromni_jax.vocabulary import MODALITIES, SPECIAL, TEXT, Vocabulary

RECIPES = ("paper", "released")

# Modalities that a task takes and gives, in the order in which they stand.
INPUTS = {
  "image_caption": ("image",),
  "speech_to_text": ("speech",),
  "text_to_image": ("text",),
  "text_to_speech": ("text",),
  "image_to_text": ("image",),
  "speech_to_image": ("speech",),
  "text_to_text": ("text",),
  "dialogue": ("speech",),
  "image_to_speech": ("image",),
}
OUTPUTS = {
  "image_caption": ("text",),
  "speech_to_text": ("text",),
  "text_to_image": ("image",),
  "text_to_speech": ("speech",),
  "image_to_text": ("text",),
  "speech_to_image": ("image",),
  "text_to_text": ("text",),
  "dialogue": ("text", "speech", "image"),
  "image_to_speech": ("speech",),
}

# The first wording of a task is the default; training draws one by a hash of the sample's key.
# Those of the first four tasks begin with the released defaults. The instruction of image_to_text
# and text_to_text is the user's question.
WORDINGS = {
  "image_caption": ("Describe this image.", "What is in this picture?", "Caption this image."),
  "speech_to_text": (
    "Can you please convert this speech into written text?",
    "Transcribe this speech.",
    "Write down what is said.",
  ),
  "text_to_image": (
    "Create a picture that matches the essence of this text.",
    "Draw this text.",
    "Make an image of this.",
  ),
  "text_to_speech": (
    "Convert this text into speech.",
    "Say this text aloud.",
    "Read this out.",
  ),
  "image_to_text": ("How many are there?", "What is this?", "Which color is behind?"),
  "speech_to_image": (
    "Create a picture of this speech.",
    "Draw what is said.",
    "Make an image of what you hear.",
  ),
  "text_to_text": ("How many are there?", "What is this?", "Which color is behind?"),
  "dialogue": (
    "Please transcribe the user's vocal input, create a picture of it.",
    "Answer the user with text, speech and a picture.",
    "Please acknowledge the user's vocal input, create a picture of it.",
  ),
  "image_to_speech": (
    "Describe this image aloud.",
    "Say what is in this picture.",
    "Speak about this image.",
  ),
}

# What the released chat appends to the user's speech by default.
RELEASED_CHAT_INSTRUCTION = "Please acknowledge the user's vocal input, create a textual response."

_MACHINE = {"paper": "ASSISTANT:", "released": "GPT:"}


@dataclasses.dataclass(frozen=True)
class Parts:
  """What stands on one side of a sample; None where a task has no such part.

  Attributes:
    text: a string.
    image: int32[image_length] codes.
    speech: int32[n] codes.
    transcript: dialogue only, the words that the user spoke.
  """

  text: str | None = None
  image: np.ndarray | None = None
  speech: np.ndarray | None = None
  transcript: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
  """One training sequence.

  Attributes:
    tokens: int32[n], from bos to eos.
    task: task name.
    response_start: position of the first response's first id.
    key: stable name of the source item.
    response_spans: int32[k, 2], [start, stop) of every response of a dialogue of several turns, in
      order; None if the one response runs from `response_start` to the end.
  """

  tokens: np.ndarray
  task: str
  response_start: int
  key: str
  response_spans: np.ndarray | None = None

  @property
  def spans(self) -> np.ndarray:
    """int32[k, 2], [start, stop) of every response, whether there is one or several."""
    if self.response_spans is None:
      return np.array([[self.response_start, len(self.tokens)]], np.int32)
    return self.response_spans


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of a dialogue.

  Attributes:
    speech: int32[n] codes of what the user says.
    images: int32[image_length] codes each, of what the user shows.
    instruction: what to do, in words; may be empty.
    reply: int32[n], all ids that the model answered; None for the turn that it answers next.
  """

  speech: np.ndarray
  images: tuple[np.ndarray, ...] = ()
  instruction: str = ""
  reply: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
  """A run of ids of one modality; specials stand alone.

  Attributes:
    kind: "text", "image", "speech" or "special".
    ids: int32[n].
  """

  kind: str
  ids: np.ndarray


def wording(task: str, key: str) -> str:
  """Returns the instruction that a sample of this key has, by a hash."""
  digest = hashlib.sha256(f"{task}/{key}".encode()).digest()
  return WORDINGS[task][digest[0] % len(WORDINGS[task])]


def default_instruction(task: str, recipe: str) -> str:
  """Returns what a prompt asks for if nothing else is asked."""
  chats = recipe == "released" and task == "dialogue"
  return RELEASED_CHAT_INSTRUCTION if chats else WORDINGS[task][0]


def check_recipe(recipe: str) -> None:
  """Raises ValueError for a recipe that does not exist."""
  if recipe not in RECIPES:
    raise ValueError(f"recipe {recipe!r} does not exist; expected one of {RECIPES}")


def make_prompt(
  task: str,
  vocabulary: Vocabulary,
  text_codec: TextCodec,
  *,
  recipe: str,
  inputs: Parts,
  instruction: str | None = None,
) -> np.ndarray:
  """Returns int32[n], the ids up to the point where the model answers.

  Args:
    task: task name.
    vocabulary: id space.
    text_codec: encodes the text pieces.
    recipe: "paper" or "released".
    inputs: the parts that `INPUTS[task]` names.
    instruction: what to do; `default_instruction(task, recipe)` if None.

  Raises:
    ValueError: for a task or recipe that does not exist, or a part that is missing, superfluous or
      empty.
  """
  if task not in INPUTS:
    raise ValueError(f"task {task!r} does not exist; expected one of {', '.join(INPUTS)}")
  check_recipe(recipe)
  _check_parts(f"task {task} needs as input", inputs, INPUTS[task])
  say = text_codec.encode
  instruction = default_instruction(task, recipe) if instruction is None else instruction
  if task == "dialogue":
    turn = Turn(inputs.speech, instruction=instruction)
    return make_chat_prompt([turn], vocabulary, text_codec, recipe=recipe)
  released_drawing = recipe == "released" and task == "text_to_image"
  user: list[np.ndarray] = [say("USER:")]
  if inputs.image is not None:
    user.append(_image(inputs.image, vocabulary))
  user.append(say(instruction))
  if inputs.text is not None:
    user += [say(" This is input: " if released_drawing else "This is input: "), say(inputs.text)]
  if inputs.speech is not None:
    user.append(_speech(inputs.speech, vocabulary))
  machine = " GPT:" if released_drawing else _MACHINE[recipe]
  pieces = [[vocabulary.bos], *user, [vocabulary.eoh], say(machine)]
  return np.concatenate(pieces).astype(np.int32)


def make_chat_prompt(
  turns: Sequence[Turn], vocabulary: Vocabulary, text_codec: TextCodec, *, recipe: str
) -> np.ndarray:
  """Returns int32[n], a dialogue up to the point where the model answers the last turn.

  All turns before the last are the history: their prompts and replies, as they are. As in AR-Omni's
  chat it loses bos and eos at its two ends and is closed by eom; replies inside stay open or end in
  eos, as the model left them.

  Args:
    turns: oldest first; all but the last have a reply.
    vocabulary, text_codec, recipe: as in `make_prompt`.

  Raises:
    ValueError: without turns, for a recipe that does not exist, a turn without speech, a picture of
      the wrong length, or a reply too many or too few.
  """
  check_recipe(recipe)
  if not turns:
    raise ValueError("a dialogue has no turn; expected at least one")
  say, v = text_codec.encode, vocabulary
  history: list[Sequence[int] | np.ndarray] = []
  for i, turn in enumerate(turns):
    if not len(turn.speech):
      raise ValueError(f"turn {i} of a dialogue needs speech, but it is empty")
    if (turn.reply is None) != (i == len(turns) - 1):
      raise ValueError(f"turn {i} of {len(turns)}: every turn but the last has a reply")
    said = [_speech(turn.speech, v), say(turn.instruction)]
    user = [say("USER:"), *(_image(codes, v) for codes in turn.images)]
    user += said if recipe == "released" else said[::-1]
    user += [[v.eoh], say(_MACHINE[recipe])]
    if turn.reply is not None:
      history += [*user, turn.reply]
  pieces = [[v.bos], *user]
  if history:
    before = _strip(np.concatenate(history), (v.bos, v.eos))
    pieces[1:1] = [before] if before[-1] == v.eom else [before, [v.eom]]
  return np.concatenate(pieces).astype(np.int32)


def _strip(ids: np.ndarray, outer: tuple[int, ...]) -> np.ndarray:
  inner = np.flatnonzero(~np.isin(ids, outer))
  return ids[inner[0] : inner[-1] + 1]


def make_sample(
  task: str,
  vocabulary: Vocabulary,
  text_codec: TextCodec,
  *,
  recipe: str,
  inputs: Parts,
  response: Parts,
  key: str,
  instruction: str | None = None,
) -> Sample:
  """Returns a whole training sequence; arguments and errors as in `make_prompt`.

  Args:
    response: the parts that `OUTPUTS[task]` names; a dialogue also has a transcript.
    key: stable name of the source item; it also chooses the wording if there is no instruction.
  """
  if task in WORDINGS and instruction is None:
    instruction = wording(task, key)
  prompt = make_prompt(
    task, vocabulary, text_codec, recipe=recipe, inputs=inputs, instruction=instruction
  )
  extra = ("transcript",) if task == "dialogue" else ()
  _check_parts(f"task {task} needs as response", response, OUTPUTS[task] + extra)
  pieces: list[Sequence[int] | np.ndarray] = []
  if response.transcript is not None:
    pieces += [[vocabulary.instruction], text_codec.encode(response.transcript)]
    pieces += [[vocabulary.response]]
  if response.text is not None:
    pieces.append(text_codec.encode(response.text))
  if response.speech is not None:
    pieces.append(_speech(response.speech, vocabulary))
  if response.image is not None:
    pieces.append(_image(response.image, vocabulary))
  tokens = np.concatenate([prompt, *pieces, [vocabulary.eom, vocabulary.eos]]).astype(np.int32)
  return Sample(tokens, task, len(prompt), key)


def without_prompt(sample: Sample) -> Sample:
  """Returns the sample as bos and its response: what guidance compares a picture with. Of several
  turns, what follows the first response stays. A sample whose response is empty stays whole."""
  if sample.response_start == len(sample.tokens):
    return sample
  cut = max(sample.response_start - 1, 0)
  spans = None if sample.response_spans is None else sample.response_spans - cut
  tokens = np.concatenate([sample.tokens[:1], sample.tokens[cut + 1 :]])
  start = sample.response_start - cut
  return dataclasses.replace(sample, tokens=tokens, response_start=start, response_spans=spans)


def parse(tokens: np.ndarray, vocabulary: Vocabulary) -> list[Segment]:
  """Splits ids into runs of one modality; every special id is a segment of its own."""
  tokens = np.asarray(tokens, np.int32)
  kinds = vocabulary.modality_of(tokens)
  breaks = np.flatnonzero((np.diff(kinds) != 0) | (kinds[1:] == SPECIAL)) + 1
  runs = np.split(tokens, breaks) if len(tokens) else []
  return [Segment(MODALITIES[int(vocabulary.modality_of(run[:1])[0])], run) for run in runs]


def read_response(tokens: np.ndarray, vocabulary: Vocabulary, text_codec: TextCodec) -> Parts:
  """Returns the parts of a generated response, finished or not.

  Of several pictures it is the first; all speech is one clip. `parse` has them one by one. What
  stands before `response` is the transcript, and what follows an `instruction` without one.
  """
  reply = np.asarray(tokens)
  segments, transcript = parse(reply, vocabulary), None
  images = [s.ids for s in segments if s.kind == "image"]
  speech = [s.ids for s in segments if s.kind == "speech"]
  opened, asked = (
    np.flatnonzero(reply == i) for i in (vocabulary.response, vocabulary.instruction)
  )
  if len(opened) or len(asked):
    end = opened[0] if len(opened) else len(reply)
    transcript = text_codec.decode(reply[:end])
    reply = reply[end:]
  has_text = (vocabulary.modality_of(reply) == TEXT).any()
  return Parts(
    text=text_codec.decode(reply) if has_text else None,
    image=picture_codes(images[0], vocabulary) if images else None,
    speech=vocabulary.speech_codes(np.concatenate(speech)) if speech else None,
    transcript=transcript,
  )


def picture_codes(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """Returns int32[image_length], the codes of a picture's ids, filled up with the first."""
  codes = vocabulary.image_codes(ids[: vocabulary.image_length])
  return np.pad(codes, (0, vocabulary.image_length - len(codes)), constant_values=codes[0])


def _check_parts(what: str, parts: Parts, wanted: tuple[str, ...]) -> None:
  given = {f.name for f in dataclasses.fields(parts) if getattr(parts, f.name) is not None}
  if given != set(wanted):
    raise ValueError(f"{what} {' and '.join(wanted)}; got {' and '.join(sorted(given)) or 'none'}")
  for name in wanted:
    if not len(getattr(parts, name)):
      raise ValueError(f"{what} {name}, but it is empty")


def _image(codes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  if len(codes) != vocabulary.image_length:
    raise ValueError(f"a picture has {vocabulary.image_length} codes; got {len(codes)}")
  return np.concatenate([[vocabulary.boi], vocabulary.image_ids(codes), [vocabulary.eoi]])


def _speech(codes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  return np.concatenate([[vocabulary.boa], vocabulary.speech_ids(codes), [vocabulary.eoa]])
