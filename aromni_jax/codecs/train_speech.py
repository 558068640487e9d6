"""What the speech codec is trained with: random crops of clips, spectral losses."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aromni_jax.codecs import speech_codec, training
from aromni_jax.codecs.spectrogram import magnitude, mel_filters

Array = jax.Array

_CROP_SECONDS = 1.0
_RESOLUTIONS = ((512, 40), (1024, 80), (2048, 120))  # samples of the window, mel bins


class CropSource:
  """Random crops of every training step, int16[batch_size, n].

  Args:
    clips: int16 arrays; clips shorter than a crop are extended with silence.
    batch_size: crops per step.
    samples: samples of a crop.
    seed: the crops of a step depend on (seed, step) alone.
  """

  def __init__(self, clips: Sequence[np.ndarray], *, batch_size: int, samples: int, seed: int):
    self.clips, self.batch_size, self.samples, self.seed = clips, batch_size, samples, seed

  def __call__(self, step: int) -> np.ndarray:
    rng = np.random.default_rng([self.seed, step])
    out = np.zeros((self.batch_size, self.samples), np.int16)
    for row in out:
      clip = self.clips[rng.integers(len(self.clips))]
      start = rng.integers(max(len(clip) - self.samples, 0) + 1)
      piece = clip[start : start + self.samples]
      row[: len(piece)] = piece
    return out


def spectral_losses(output: Array, target: Array, sample_rate: int) -> training.Metrics:
  """Returns L1 errors of log-mel and log-magnitude spectra, averaged over three resolutions.

  Args:
    output, target: sound float32[B, n].
    sample_rate: samples per second.
  """
  mel_error = stft_error = 0.0
  for n_fft, bins in _RESOLUTIONS:
    filters = mel_filters(sample_rate, n_fft, bins)
    ours, theirs = (magnitude(wav, n_fft, n_fft // 4) for wav in (output, target))

    def log(x, floor):
      return jnp.log(jnp.maximum(x, floor))

    mel_error += jnp.mean(jnp.abs(log(ours @ filters, 1e-3) - log(theirs @ filters, 1e-3)))
    stft_error += jnp.mean(jnp.abs(log(ours, 1e-2) - log(theirs, 1e-2)))
  count = len(_RESOLUTIONS)
  metrics = {"mel": mel_error / count, "stft": stft_error / count}
  return metrics | {"loss": metrics["mel"] + metrics["stft"]}


def make_task(
  model: speech_codec.SpeechCodecConfig,
  config: training.CodecTrainingConfig,
  clips: Sequence[np.ndarray],
  held_out: Sequence[np.ndarray],
) -> training.CodecTask:
  """Returns what the training loop needs.

  Args:
    model: shape of the codec.
    config: training options.
    clips: training sound, int16[n] each, at the codec's rate.
    held_out: sound for the progress lines.
  """
  samples = int(_CROP_SECONDS * model.sample_rate) // model.hop * model.hop
  crops = functools.partial(CropSource, samples=samples)
  fixed = crops(held_out, batch_size=32, seed=1)(0).astype(np.float32) / 32768

  @nnx.jit
  def evaluate(codec):
    codes = codec.encode(fixed)
    losses = spectral_losses(codec.decode(codes), fixed, model.sample_rate)
    return losses | {"used": jnp.sum(jnp.bincount(codes.ravel(), length=model.num_codes) > 0)}

  return training.CodecTask(
    make=lambda rngs: speech_codec.SpeechCodec(model, rngs=rngs),
    codebook=lambda codec: codec.codebook,
    prepare=lambda batch: batch.astype(jnp.float32) / 32768,
    losses=functools.partial(spectral_losses, sample_rate=model.sample_rate),
    batch_at=crops(clips, batch_size=config.batch_size, seed=config.seed),
    measure=lambda codec: {k: float(v) for k, v in evaluate(codec).items()},
  )
