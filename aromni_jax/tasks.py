"""Tasks: what each takes, what it gives, and how it is asked for. A new task is one entry here."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Attributes:
    name: of it.
    id: stands in token shards and batches; it never changes, and a new task takes the next.
    inputs, outputs: modalities that it takes and gives, in the order in which they stand.
    wordings: instructions. The first is the default; training draws one by a hash of the sample's
      key. That of a question is the user's own.
    chats: whether it is a turn of a dialogue: its prompt may have turns before it, and its response
      begins with what the user said.
    released: whether the released pre-training code knows it; these have its ids (arXiv 2601.17761,
      data collator).
  """

  name: str
  id: int
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  wordings: tuple[str, ...]
  chats: bool = False
  released: bool = True

  @property
  def parts(self) -> tuple[str, ...]:
    """Fields of `Parts` that a response has."""
    return ("transcript", *self.outputs) if self.chats else self.outputs

  @property
  def only_draws(self) -> bool:
    """Whether the response is a picture and nothing else."""
    return self.outputs == ("image",)


QUESTIONS = ("How many are there?", "What is this?", "Which color is behind?")

# Wordings of the first four begin with the released defaults.
_TASKS = (
  Task(
    "image_caption",
    id=0,
    inputs=("image",),
    outputs=("text",),
    wordings=("Describe this image.", "What is in this picture?", "Caption this image."),
  ),
  Task(
    "speech_to_text",
    id=1,
    inputs=("speech",),
    outputs=("text",),
    wordings=(
      "Can you please convert this speech into written text?",
      "Transcribe this speech.",
      "Write down what is said.",
    ),
  ),
  Task(
    "text_to_image",
    id=2,
    inputs=("text",),
    outputs=("image",),
    wordings=(
      "Create a picture that matches the essence of this text.",
      "Draw this text.",
      "Make an image of this.",
    ),
  ),
  Task(
    "text_to_speech",
    id=3,
    inputs=("text",),
    outputs=("speech",),
    wordings=("Convert this text into speech.", "Say this text aloud.", "Read this out."),
  ),
  Task("image_to_text", id=4, inputs=("image",), outputs=("text",), wordings=QUESTIONS),
  Task(
    "speech_to_image",
    id=5,
    inputs=("speech",),
    outputs=("image",),
    wordings=(
      "Create a picture of this speech.",
      "Draw what is said.",
      "Make an image of what you hear.",
    ),
  ),
  Task("text_to_text", id=6, inputs=("text",), outputs=("text",), wordings=QUESTIONS),
  Task(
    "dialogue",
    id=7,
    inputs=("speech",),
    outputs=("text", "speech", "image"),
    wordings=(
      "Please transcribe the user's vocal input, create a picture of it.",
      "Answer the user with text, speech and a picture.",
      "Please acknowledge the user's vocal input, create a picture of it.",
    ),
    chats=True,
    released=False,
  ),
  Task(
    "image_to_speech",
    id=8,
    inputs=("image",),
    outputs=("speech",),
    wordings=(
      "Describe this image aloud.",
      "Say what is in this picture.",
      "Speak about this image.",
    ),
    released=False,
  ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}  # in the order of their ids


def get_task(name: str) -> Task:
  """Returns a task. Raises ValueError for a name that does not exist."""
  if name not in TASKS:
    raise ValueError(f"task {name!r} does not exist; expected one of {', '.join(TASKS)}")
  return TASKS[name]


def task_name(number: int) -> str:
  """Returns the name of a task's id. Raises ValueError for an id that no task has."""
  if not 0 <= number < len(TASKS):
    raise ValueError(f"no task has the id {number}; ids are 0 to {len(TASKS) - 1}")
  return tuple(TASKS)[number]
