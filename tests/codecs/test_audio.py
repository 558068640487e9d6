import io

import numpy as np
import pytest
import soundfile

from aromni_jax.codecs import audio
from tests import parity


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_resampling_equals_the_reference(rate):
  tensors, _ = parity.load("resample")
  wav = audio.resample(tensors[f"{rate}.in"].mean(0), rate, 24000)
  np.testing.assert_allclose(wav, tensors[f"{rate}.out"][0], atol=1e-5)


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_files_resample_as_the_reference(tmp_path, rate):
  """Through a file: the channels' mean (44.1 kHz is stereo), then 24 kHz."""
  tensors, _ = parity.load("resample")
  soundfile.write(tmp_path / "x.wav", tensors[f"{rate}.in"].T, rate, subtype="FLOAT")
  wav = audio.read_audio(tmp_path / "x.wav", 24000)
  np.testing.assert_allclose(wav, tensors[f"{rate}.out"][0], atol=1e-5)


RATES = 8000, 11025, 16000, 22050, 32000, 44100, 44101, 48000


@pytest.mark.parametrize("to_rate", [16000, 24000])
@pytest.mark.parametrize("rate", RATES)
def test_every_rate_keeps_length_loudness_and_pitch(rate, to_rate):
  """A tone stays that tone, at 44.101 kHz too, which shares no divisor with 24 kHz."""
  seconds = np.arange(rate + 7) / rate
  wav = audio.resample(0.5 * np.sin(2 * np.pi * 440 * seconds), rate, to_rate)
  assert wav.dtype == np.float32 and len(wav) == -(-len(seconds) * to_rate // rate)
  want = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(wav)) / to_rate)
  np.testing.assert_allclose(wav[200:-200], want[200:-200], atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_gone():
  tone = np.sin(2 * np.pi * 15_000 * np.arange(48_000) / 48_000)
  assert np.abs(audio.resample(tone, 48_000, 24_000)[200:-200]).max() < 1e-2


@pytest.mark.parametrize("n", [1, 2, 13, 1000])
def test_blocks_join_without_a_seam(monkeypatch, n):
  wav = np.random.default_rng(0).normal(size=n).astype(np.float32)
  whole = audio.resample(wav, 16_000, 24_000)
  assert len(whole) == -(-3 * n // 2)
  monkeypatch.setattr(audio, "_BLOCK", 7)
  np.testing.assert_array_equal(audio.resample(wav, 16_000, 24_000), whole)


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
