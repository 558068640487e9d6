import numpy as np
import pytest

from aromni_jax.codecs.text import TokenizerJsonText
from aromni_jax.convert.tokenizer import read_vocabulary
from aromni_jax.vocabulary import get_vocabulary
from tests import released


def swap(a, b):
  def edit(names):
    names[a], names[b] = names[b], names[a]
    return names

  return edit


def rename(i, name):
  def edit(names):
    names[i] = name
    return names

  return edit


def test_the_released_names_give_the_released_vocabulary(tmp_path):
  released.write_tokenizer(tmp_path / "a.json", rename(8711, "<image>"))
  vocabulary = read_vocabulary(tmp_path / "a.json")
  assert vocabulary == get_vocabulary("aromni_7b")
  assert vocabulary.text == range(16388, 65536)
  text = TokenizerJsonText(tmp_path / "a.json", vocabulary)
  ids = text.encode("USER: zwölf 苹果!\n")
  assert ids.dtype == np.int32 and (ids >= 16388).all()
  assert text.decode(np.concatenate([[0, 8197, 5], ids, [8724, 12831, 2]])) == "USER: zwölf 苹果!\n"
  assert len(text.encode("")) == 0


def test_text_may_begin_elsewhere(tmp_path):
  released.write_tokenizer(tmp_path / "a.json", rename(16387, "more"))
  assert read_vocabulary(tmp_path / "a.json").text == range(16387, 65536)


@pytest.mark.parametrize(
  "edit, message",
  [
    (swap(11, 12), "the image code 7 is id 12; expected id 11"),
    (swap(8196, 8197), "<eoss> is id 8197; expected id 8196"),
    (swap(0, 3), "<s> is id 3; expected id 0"),
    (rename(1, "pad"), "<pad> is missing; expected id 1"),
    (swap(12820, 12831), r"<reserved\d+> is id 128\d\d; expected id 128\d\d"),
    (swap(8300, 8301), r"<sentinel:10\d> is id 830\d; expected id 830\d"),
    (rename(8712, "<image>"), "<image> is id 8712; expected id 8711"),
    (rename(12820, "word"), "'word' has id 12820, but ids 8197 to 12841 are for speech and turns"),
    (lambda names: names[:60000], "has 60000 ids; expected 65536"),
    (rename(20000, "IMGIMGIBJCZ"), "has 8193 names of image codes; expected 8192"),
  ],
)
def test_other_vocabularies_are_refused(tmp_path, edit, message):
  released.write_tokenizer(tmp_path / "a.json", edit)
  with pytest.raises(ValueError, match=message):
    read_vocabulary(tmp_path / "a.json")


def test_other_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="a.json does not exist"):
    read_vocabulary(tmp_path / "a.json")
  (tmp_path / "a.json").write_text('{"vocab": 1}')
  with pytest.raises(ValueError, match="a.json is not a tokenizer JSON"):
    read_vocabulary(tmp_path / "a.json")
  released.write_tokenizer(tmp_path / "b.json", lambda names: names[:30000])
  with pytest.raises(ValueError, match="b.json has 30000 ids, vocabulary aromni_7b has 65536"):
    TokenizerJsonText(tmp_path / "b.json", get_vocabulary("aromni_7b"))
