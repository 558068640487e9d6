"""Task templates: text, pictures and speech -> one sequence of ids, and back.

A prompt ends where the model's turn begins. A sample is a prompt with its response and `eom eos`.
`RELEASED` has the exact pieces of AR-Omni's code, `PAPER` the `USER:` / `ASSISTANT:` names of the
paper. Text pieces are encoded one by one and concatenated.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from aromni_jax.codecs.text import TextCodec
from aromni_jax.recipes import Recipe
from aromni_jax.sample import Parts, Sample, Turn
from aromni_jax.tasks import get_task
from aromni_jax.vocabulary import MODALITIES, SPECIAL, TEXT, Vocabulary


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
  wordings = get_task(task).wordings
  digest = hashlib.sha256(f"{task}/{key}".encode()).digest()
  return wordings[digest[0] % len(wordings)]


def default_instruction(task: str, recipe: Recipe) -> str:
  """Returns what a prompt asks for if nothing else is asked."""
  entry = get_task(task)
  return (entry.chats and recipe.chat_instruction) or entry.wordings[0]


def make_prompt(
  task: str,
  vocabulary: Vocabulary,
  text_codec: TextCodec,
  *,
  recipe: Recipe,
  inputs: Parts,
  instruction: str | None = None,
) -> np.ndarray:
  """Returns int32[n], the ids up to the point where the model answers.

  Args:
    task: task name.
    vocabulary: id space.
    text_codec: encodes the text pieces.
    recipe: whose template.
    inputs: the parts that the task takes.
    instruction: what to do; `default_instruction(task, recipe)` if None.

  Raises:
    ValueError: for a task that does not exist, or a part that is missing, superfluous or empty.
  """
  entry = get_task(task)
  _check_parts(f"task {task} needs as input", inputs, entry.inputs)
  say = text_codec.encode
  instruction = default_instruction(task, recipe) if instruction is None else instruction
  if entry.chats:
    turn = Turn(inputs.speech, instruction=instruction)
    return make_chat_prompt([turn], vocabulary, text_codec, recipe=recipe)
  space = " " if task in recipe.spaced_tasks else ""
  user: list[np.ndarray] = [say("USER:")]
  if inputs.image is not None:
    user.append(_image(inputs.image, vocabulary))
  user.append(say(instruction))
  if inputs.text is not None:
    user += [say(f"{space}This is input: "), say(inputs.text)]
  if inputs.speech is not None:
    user.append(_speech(inputs.speech, vocabulary))
  pieces = [[vocabulary.bos], *user, [vocabulary.eoh], say(space + recipe.machine)]
  return np.concatenate(pieces).astype(np.int32)


def make_chat_prompt(
  turns: Sequence[Turn], vocabulary: Vocabulary, text_codec: TextCodec, *, recipe: Recipe
) -> np.ndarray:
  """Returns int32[n], a dialogue up to the point where the model answers the last turn.

  All turns before the last are the history: their prompts and replies, as they are. As in AR-Omni's
  chat it loses bos and eos at its two ends and is closed by eom; replies inside stay open or end in
  eos, as the model left them.

  Args:
    turns: oldest first; all but the last have a reply.
    vocabulary, text_codec, recipe: as in `make_prompt`.

  Raises:
    ValueError: without turns, for a turn without speech, a picture of the wrong length, or a reply
      too many or too few.
  """
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
    user += said if recipe.speech_first else said[::-1]
    user += [[v.eoh], say(recipe.machine)]
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
  recipe: Recipe,
  inputs: Parts,
  response: Parts,
  key: str,
  instruction: str | None = None,
) -> Sample:
  """Returns a whole training sequence; arguments and errors as in `make_prompt`.

  Args:
    response: the parts that the task gives; a dialogue also has a transcript.
    key: stable name of the source item; it also chooses the wording if there is no instruction.
  """
  if instruction is None:
    instruction = wording(task, key)
  prompt = make_prompt(
    task, vocabulary, text_codec, recipe=recipe, inputs=inputs, instruction=instruction
  )
  _check_parts(f"task {task} needs as response", response, get_task(task).parts)
  pieces: list[Sequence[int] | np.ndarray] = []
  if response.transcript is not None:
    pieces += [[vocabulary.instruction], text_codec.encode(response.transcript)]
    pieces += [[vocabulary.response]]
  write = {
    "text": text_codec.encode,
    "speech": lambda codes: _speech(codes, vocabulary),
    "image": lambda codes: _image(codes, vocabulary),
  }
  pieces += [write[name](getattr(response, name)) for name in get_task(task).outputs]
  tokens = np.concatenate([prompt, *pieces, [vocabulary.eom, vocabulary.eos]]).astype(np.int32)
  return Sample(tokens, task, len(prompt), key)


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
