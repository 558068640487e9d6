import io
import pathlib

import numpy as np
import pytest
import soundfile
from safetensors import safe_open

from aromni_jax.codecs import audio

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/parity/resample.safetensors"


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_resampling_equals_the_reference(rate):
  with safe_open(FIXTURE, "np") as f:
    wav, want = f.get_tensor(f"{rate}.in").mean(0), f.get_tensor(f"{rate}.out")[0]
  np.testing.assert_allclose(audio.resample(wav, rate, 24000), want, atol=1e-5)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_any_width_rate_and_channels(tmp_path, subtype, channels):
  tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
  path = tmp_path / "tone.wav"
  soundfile.write(path, np.stack([tone] * channels, 1), 8000, subtype=subtype)
  wav = audio.read_audio(path, 16000)
  assert wav.shape == (16000,) and wav.dtype == np.float32
  want = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
  np.testing.assert_allclose(wav[200:-200], want[200:-200], atol=0.02)


def test_round_trip_through_a_file(tmp_path):
  wav = np.linspace(-1.5, 1.5, 100).astype(np.float32)
  audio.write_wav(tmp_path / "x.wav", wav, 16000)
  np.testing.assert_allclose(
    audio.read_audio(tmp_path / "x.wav", 16000), wav.clip(-1, 1), atol=1e-4
  )


def test_bad_sounds_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.wav does not exist"):
    audio.read_audio(tmp_path / "none.wav", 16000)
  (tmp_path / "text.wav").write_text("not a sound")
  with pytest.raises(ValueError, match="text.wav is not a sound"):
    audio.read_audio(tmp_path / "text.wav", 16000)
  buffer = io.BytesIO()
  soundfile.write(buffer, np.zeros(0), 16000, format="WAV")
  with pytest.raises(ValueError, match="the given bytes is empty"):
    audio.read_audio(buffer.getvalue(), 16000)
