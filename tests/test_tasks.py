import pytest

from aromni_jax.tasks import TASKS, get_task, task_name

# Ids of the released pre-training code (its data collator), then ours: in every shard there is.
IDS = {
  "image_caption": 0,
  "speech_to_text": 1,
  "text_to_image": 2,
  "text_to_speech": 3,
  "image_to_text": 4,
  "speech_to_image": 5,
  "text_to_text": 6,
  "dialogue": 7,
  "image_to_speech": 8,
}


def test_ids_are_for_ever():
  assert {name: TASKS[name].id for name in IDS} == IDS
  assert [task.id for task in TASKS.values()] == list(range(len(TASKS)))
  assert [name for name, task in TASKS.items() if task.released] == list(IDS)[:7]
  assert all(task_name(task.id) == name for name, task in TASKS.items())


def test_unknown_tasks_are_named():
  with pytest.raises(ValueError, match="task 'asr' does not exist; expected one of image_caption"):
    get_task("asr")
  for number in (-1, len(TASKS)):
    with pytest.raises(ValueError, match=f"no task has the id {number}; ids are 0 to"):
      task_name(number)
