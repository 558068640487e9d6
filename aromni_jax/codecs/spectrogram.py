"""Short-time spectra in JAX: what the speech codec hears and is trained with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def hann(n: int) -> Array:
  """Returns the periodic Hann window, float32[n]."""
  return jnp.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n), jnp.float32)


def frame(wav: Array, size: int, hop: int) -> Array:
  """Returns ceil(n / hop) frames float32[B, L, size], frame t centred on hop t (zeros outside).

  Built of shifted slices, whose gradient is fast everywhere (that of a gather is not).

  Raises:
    ValueError: if size is not a multiple of hop.
  """
  _check_multiple(size, hop)
  parts, length = size // hop, -(-wav.shape[1] // hop)
  before = (size - hop) // 2
  after = (length + parts - 1) * hop - before - wav.shape[1]
  pieces = jnp.pad(wav, ((0, 0), (before, after))).reshape(len(wav), -1, hop)
  return jnp.concatenate([pieces[:, i : i + length] for i in range(parts)], axis=-1)


def overlap_add(frames: Array, hop: int) -> Array:
  """Returns the sum of frames [B, L, n] laid `hop` samples apart, [B, (L - 1) * hop + n].

  Raises:
    ValueError: if n is not a multiple of hop.
  """
  batch, length, size = frames.shape
  _check_multiple(size, hop)
  parts = size // hop
  pieces = frames.reshape(batch, length, parts, hop)
  total = sum(jnp.pad(pieces[:, :, i], ((0, 0), (i, parts - 1 - i), (0, 0))) for i in range(parts))
  return total.reshape(batch, -1)


def _check_multiple(size: int, hop: int) -> None:
  if size % hop:
    raise ValueError(f"frames of {size} samples are not a multiple of the hop, {hop}.")


def magnitude(wav: Array, n_fft: int, hop: int) -> Array:
  """Returns the magnitude spectrum float32[B, ceil(n / hop), n_fft // 2 + 1]."""
  spectrum = jnp.fft.rfft(frame(wav, n_fft, hop) * hann(n_fft))
  # The small constant keeps the gradient finite where the spectrum is zero.
  return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-10)


def log_mel(wav: Array, sample_rate: int, *, n_fft: int, hop: int, bins: int) -> Array:
  """Returns the natural logarithm of the mel spectrum, float32[B, ceil(n / hop), bins]."""
  mel = magnitude(wav, n_fft, hop) @ mel_filters(sample_rate, n_fft, bins)
  return jnp.log(jnp.maximum(mel, 1e-4))


@functools.cache
def mel_filters(sample_rate: int, n_fft: int, bins: int) -> np.ndarray:
  """Returns triangular filters float32[n_fft // 2 + 1, bins], even on the HTK mel scale."""

  def to_mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)

  edges = np.linspace(0.0, to_mel(sample_rate / 2), bins + 2)
  hertz = 700 * (10 ** (edges / 2595) - 1)
  frequencies = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
  rising = (frequencies - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
  falling = (hertz[2:] - frequencies) / (hertz[2:] - hertz[1:-1])
  return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
