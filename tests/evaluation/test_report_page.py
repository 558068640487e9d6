import json
import re

import numpy as np
import pytest
from PIL import Image

from aromni_jax.codecs import audio
from aromni_jax.evaluation import report_page

PICTURES = ("original", "codec", "text_to_image", "speech_to_image", "dialogue")
SOUNDS = ("original", "codec", "text_to_speech", "image_to_speech", "dialogue")


@pytest.fixture
def evaluation(tmp_path):
  folder = tmp_path / "examples"
  folder.mkdir()
  entry = {"caption": "one <dog> on red", "dialogue_text": "Here is one dog"}
  for task in ("image_caption", "speech_to_text"):
    entry[f"{task}_text"] = f"said by {task}"
  for task in PICTURES:
    key = f"{task}_image"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / f"{key}.png")
    entry[key] = f"examples/{key}.png"
  for task in SOUNDS:
    key = f"{task}_speech"
    audio.write_wav(folder / f"{key}.wav", np.zeros(800, np.float32), 16000)
    entry[key] = f"examples/{key}.wav"
  scene = {"count": 0.25, "object": 0.5, "colour": 0.75, "all": 0.1}
  words = {"wer": 0.125, "cer": 0.1, "exact": 0.625, "word_accuracy": 0.9}
  return {
    "seed": 0,
    "rows": {
      "text_to_image": {"n": 3, **scene, "chance": dict.fromkeys(scene, 0.01)},
      "text_to_speech": {"n": 3, **words, "chance": dict.fromkeys(words, 0.02)},
    },
    "ceilings": {"image/codec": scene | {"psnr": 21.5}, "speech/f2/codec": words},
    "examples": [entry],
  }


def test_page_holds_everything(evaluation, tmp_path):
  lines = [{"step": s, "loss": 1 / s, "modality/text": 2 / s, "task/dialogue": 1} for s in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  text = report_page.page({"ours": evaluation}, {"ours": tmp_path}, {"ours": tmp_path})
  assert text.count("data:image/png;base64,") == len(PICTURES)
  assert text.count("data:audio/wav;base64,") == len(SOUNDS)
  assert "<svg" in text and "one &lt;dog&gt; on red" in text and "CC BY-SA 4.0" in text
  for figure in ("0.125", "0.625", "0.250", "0.010", "21.500"):
    assert figure in text
  assert not re.findall(r'(?:src|href)="(?!data:|#)', text)  # nothing is loaded from elsewhere


def test_wrong_input_is_named(tmp_path):
  with pytest.raises(ValueError, match="'x': expected name=path"):
    report_page.names_and_paths(["x"])
  with pytest.raises(FileNotFoundError, match="--runs takes workdirs"):
    report_page.page({}, {}, {"a": tmp_path})
