"""Speech codec: the architecture of WavTokenizer, sound <-> one stream of discrete codes.

`SpeechCodecConfig()` is the released tokenizer (24 kHz, hop 600, so 40 codes/s of 4096); the preset
"small" (16 kHz, hop 400, 1024 codes) is what the demo trains. There is one decoder (Vocos: ConvNeXt
blocks and an inverse STFT) and a choice of encoder: "seanet", the released one, or "log_mel", which
learns more per CPU minute. Sound is float32 `[B, n]` in [-1, 1]; codes are int32 `[B, L]`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from aromni_jax.codecs import params as codec_params
from aromni_jax.codecs import vq
from aromni_jax.codecs.spectrogram import hann, log_mel, overlap_add

Array = jax.Array

_EPSILON = 1e-6
_MAX_MAGNITUDE = 100.0


@dataclasses.dataclass(frozen=True)
class SpeechCodecConfig:
  """Shape of the codec. The defaults are WavTokenizer small-600-24k-4096.

  Attributes:
    sample_rate: samples per second.
    hop: samples per code.
    num_codes: size of the codebook.
    embed_dim: dimensions of a code.
    encoder: "seanet" (strided convolutions and an LSTM) or "log_mel" (ConvNeXt on a spectrogram).
    num_filters: width of the first SEANet convolution; doubled at each stride.
    strides: SEANet strides, first to last; their product is `hop`.
    lstm_layers: layers of SEANet's LSTM.
    mel_bins, encoder_dim, encoder_layers: the log-mel encoder.
    dim, mlp_dim, num_layers: width, inner width and number of the decoder's ConvNeXt blocks.
    num_conditions: rows of the adaptive norms (WavTokenizer has one per nominal bandwidth).
    position_net: whether convolutions and attention over the whole clip precede the ConvNeXt
      blocks. Without it the decoder sees only its neighbourhood and can stream exactly.
    num_groups: groups of the position net's norms.
    n_fft: samples of the inverse STFT's window, a multiple of `hop`.
  """

  sample_rate: int = 24_000
  hop: int = 600
  num_codes: int = 4096
  embed_dim: int = 512
  encoder: str = "seanet"
  num_filters: int = 32
  strides: tuple[int, ...] = (4, 5, 5, 6)
  lstm_layers: int = 2
  mel_bins: int = 80
  encoder_dim: int = 192
  encoder_layers: int = 4
  dim: int = 768
  mlp_dim: int = 2304
  num_layers: int = 12
  num_conditions: int = 4
  position_net: bool = True
  num_groups: int = 32
  n_fft: int = 2400

  def __post_init__(self):
    object.__setattr__(self, "strides", tuple(self.strides))
    if self.encoder not in ("seanet", "log_mel"):
      raise ValueError(f"SpeechCodecConfig.encoder {self.encoder!r}; expected seanet or log_mel.")
    if self.encoder == "seanet" and math.prod(self.strides) != self.hop:
      raise ValueError(f"SpeechCodecConfig.strides {self.strides} do not multiply to {self.hop}.")
    if self.n_fft % self.hop:
      raise ValueError(f"SpeechCodecConfig.n_fft {self.n_fft} is not a multiple of {self.hop}.")
    if self.position_net and self.dim % self.num_groups:
      raise ValueError(f"SpeechCodecConfig.dim {self.dim} is not a multiple of {self.num_groups}.")

  def num_frames(self, num_samples: int) -> int:
    """Codes of a clip."""
    return -(-num_samples // self.hop)


PRESETS = {
  "wavtokenizer": SpeechCodecConfig(),
  "small": SpeechCodecConfig(
    sample_rate=16_000,
    hop=400,
    num_codes=1024,
    embed_dim=32,
    encoder="log_mel",
    dim=192,
    mlp_dim=576,
    num_layers=6,
    num_conditions=1,
    position_net=False,
    n_fft=1600,
  ),
}


class SameConv(nnx.Module):
  """SEANet's convolution: reflected edges, output length ceil(n / stride). [B, n, C]."""

  def __init__(self, size: int, c_in: int, c_out: int, *, stride: int = 1, rngs: nnx.Rngs):
    self.size, self.stride = size, stride
    self.conv = nnx.Conv(c_in, c_out, (size,), strides=stride, padding="VALID", rngs=rngs)

  def __call__(self, x: Array) -> Array:
    length, total = x.shape[1], self.size - self.stride
    right = total // 2
    left = total - right
    frames = math.ceil((length - self.size + total) / self.stride + 1)
    right += (frames - 1) * self.stride + self.size - total - length
    return self.conv(_reflect_pad(x, left, right))


def _reflect_pad(x: Array, left: int, right: int) -> Array:
  """Reflects the edges of [B, n, C]; a clip too short to reflect is first extended with zeros."""
  short = max(left, right) - x.shape[1] + 1
  if short <= 0:
    return jnp.pad(x, ((0, 0), (left, right), (0, 0)), mode="reflect")
  x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
  return jnp.pad(x, ((0, 0), (left, right), (0, 0)), mode="reflect")[:, :-short]


class SEANetUnit(nnx.Module):
  """shortcut(x) + conv1(elu(conv3(elu(x))))."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv3 = SameConv(3, channels, channels // 2, rngs=rngs)
    self.conv1 = SameConv(1, channels // 2, channels, rngs=rngs)
    self.shortcut = SameConv(1, channels, channels, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.shortcut(x) + self.conv1(jax.nn.elu(self.conv3(jax.nn.elu(x))))


class LSTM(nnx.Module):
  """One layer with zero initial state; gates in the order input, forget, cell, output."""

  def __init__(self, dim: int, *, rngs: nnx.Rngs):
    self.input = nnx.Linear(dim, 4 * dim, rngs=rngs)
    self.recurrent = nnx.Linear(dim, 4 * dim, use_bias=False, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    kernel = self.recurrent.kernel[...]

    def step(carry, gates):
      hidden, cell = carry
      i, f, g, o = jnp.split(gates + hidden @ kernel, 4, axis=-1)
      cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
      return (hidden, cell), hidden

    zeros = jnp.zeros((len(x), x.shape[-1]), x.dtype)
    _, out = jax.lax.scan(step, (zeros, zeros), self.input(x).swapaxes(0, 1))
    return out.swapaxes(0, 1)


class SEANetEncoder(nnx.Module):
  """float32[B, n] -> float32[B, ceil(n / hop), embed_dim]."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    width = config.num_filters
    self.conv_in = SameConv(7, 1, width, rngs=rngs)
    units, downs = [], []
    for stride in config.strides:
      units.append(SEANetUnit(width, rngs=rngs))
      downs.append(SameConv(2 * stride, width, 2 * width, stride=stride, rngs=rngs))
      width *= 2
    self.units, self.downs = nnx.List(units), nnx.List(downs)
    self.lstm = nnx.List([LSTM(width, rngs=rngs) for _ in range(config.lstm_layers)])
    self.conv_out = SameConv(7, width, config.embed_dim, rngs=rngs)

  def __call__(self, wav: Array) -> Array:
    x = self.conv_in(wav[..., None])
    for unit, down in zip(self.units, self.downs, strict=True):
      x = down(jax.nn.elu(unit(x)))
    y = x
    for layer in self.lstm:
      y = layer(y)
    return self.conv_out(jax.nn.elu(x + y))


class LogMelEncoder(nnx.Module):
  """float32[B, n] -> float32[B, ceil(n / hop), embed_dim], by ConvNeXt on a log-mel spectrogram."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    self.config = config
    dim = config.encoder_dim
    self.conv_in = nnx.Conv(config.mel_bins, dim, (3,), rngs=rngs)
    self.blocks = nnx.List(
      [
        ConvNeXt(dim, 3 * dim, 1, config.encoder_layers, rngs=rngs)
        for _ in range(config.encoder_layers)
      ]
    )
    self.norm = nnx.LayerNorm(dim, epsilon=_EPSILON, rngs=rngs)
    self.out = nnx.Linear(dim, config.embed_dim, rngs=rngs)

  def __call__(self, wav: Array) -> Array:
    c = self.config
    mel = log_mel(wav, c.sample_rate, n_fft=3 * c.hop, hop=c.hop, bins=c.mel_bins)
    x = self.conv_in(0.25 * mel + 1.0)  # speech then lies about in [-1, 1.5]
    for block in self.blocks:
      x = block(x)
    return self.out(self.norm(x))


class AdaptiveNorm(nnx.Module):
  """LayerNorm whose gain and bias are rows of a table: `norm(x) * scale[i] + shift[i]`."""

  def __init__(self, dim: int, num_conditions: int, *, rngs: nnx.Rngs):
    del rngs
    self.scale = nnx.Param(jnp.ones((num_conditions, dim)))
    self.shift = nnx.Param(jnp.zeros((num_conditions, dim)))

  def __call__(self, x: Array, condition: int | Array = 0) -> Array:
    mean = x.mean(-1, keepdims=True)
    x = x - mean
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _EPSILON)
    return x * self.scale[...][condition] + self.shift[...][condition]


class ConvNeXt(nnx.Module):
  """Depthwise convolution of 7 frames, adaptive norm, MLP with GELU, scaled residual. [B, L, D]."""

  def __init__(self, dim: int, mlp_dim: int, num_conditions: int, depth: int, *, rngs: nnx.Rngs):
    # Kernel [7, 1, D] as nnx.Conv would have it, applied as seven shifted products: XLA's grouped
    # convolutions are many times slower on a CPU.
    init = nnx.initializers.truncated_normal(0.02)
    self.depthwise = nnx.Param(init(rngs.params(), (7, 1, dim)))
    self.depthwise_bias = nnx.Param(jnp.zeros(dim))
    self.norm = AdaptiveNorm(dim, num_conditions, rngs=rngs)
    self.up = nnx.Linear(dim, mlp_dim, rngs=rngs)
    self.down = nnx.Linear(mlp_dim, dim, rngs=rngs)
    self.gamma = nnx.Param(jnp.full(dim, 1.0 / depth))

  def __call__(self, x: Array, condition: int | Array = 0) -> Array:
    kernel = self.depthwise[...]
    reach = len(kernel) // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    h = sum(padded[:, i : i + x.shape[1]] * kernel[i, 0] for i in range(len(kernel)))
    h = self.norm(h + self.depthwise_bias[...], condition)
    h = self.down(jax.nn.gelu(self.up(h), approximate=False))
    return x + self.gamma[...] * h


def _group_norm(config: SpeechCodecConfig, rngs: nnx.Rngs) -> nnx.GroupNorm:
  return nnx.GroupNorm(
    config.dim,
    num_groups=config.num_groups,
    epsilon=_EPSILON,
    use_fast_variance=False,
    rngs=rngs,
  )


class PositionRes(nnx.Module):
  """norm, swish, conv, norm, swish, conv, plus the input; statistics run over the whole clip."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    self.norm1, self.norm2 = _group_norm(config, rngs), _group_norm(config, rngs)
    self.conv1 = nnx.Conv(config.dim, config.dim, (3,), rngs=rngs)
    self.conv2 = nnx.Conv(config.dim, config.dim, (3,), rngs=rngs)

  def __call__(self, x: Array) -> Array:
    h = self.conv1(jax.nn.silu(self.norm1(x)))
    return x + self.conv2(jax.nn.silu(self.norm2(h)))


class PositionAttention(nnx.Module):
  """Single-head attention over all frames of the clip, with residual."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    dim = config.dim
    self.norm = _group_norm(config, rngs)
    self.q, self.k, self.v = (nnx.Linear(dim, dim, rngs=rngs) for _ in range(3))
    self.proj_out = nnx.Linear(dim, dim, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    h = self.norm(x)
    scores = jnp.einsum("btd,bsd->bts", self.q(h), self.k(h)) * x.shape[-1] ** -0.5
    return x + self.proj_out(jax.nn.softmax(scores, axis=-1) @ self.v(h))


class PositionNet(nnx.Module):
  """Two residual blocks, attention, two residual blocks, norm: the part that sees whole clips."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    make = PositionRes, PositionRes, PositionAttention, PositionRes, PositionRes
    self.blocks = nnx.List([block(config, rngs=rngs) for block in make])
    self.norm = _group_norm(config, rngs)

  def __call__(self, x: Array) -> Array:
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


class Decoder(nnx.Module):
  """Vocos: float32[B, L, embed_dim] -> float32[B, L * hop]."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    self.config = config
    dim, rows = config.dim, config.num_conditions
    self.embed = nnx.Conv(config.embed_dim, dim, (7,), rngs=rngs)
    self.position_net = PositionNet(config, rngs=rngs) if config.position_net else None
    self.norm = AdaptiveNorm(dim, rows, rngs=rngs)
    self.blocks = nnx.List(
      [
        ConvNeXt(dim, config.mlp_dim, rows, config.num_layers, rngs=rngs)
        for _ in range(config.num_layers)
      ]
    )
    self.final_norm = nnx.LayerNorm(dim, epsilon=_EPSILON, use_fast_variance=False, rngs=rngs)
    self.head = nnx.Linear(dim, config.n_fft + 2, rngs=rngs)

  def hidden(self, features: Array, condition: int | Array = 0) -> Array:
    """Returns the frames before the head, float32[B, L, dim]."""
    x = self.embed(features)
    if self.position_net is not None:
      x = self.position_net(x)
    x = self.norm(x, condition)
    for block in self.blocks:
      x = block(x, condition)
    return self.final_norm(x)

  def __call__(self, features: Array, condition: int | Array = 0) -> Array:
    c = self.config
    magnitude, phase = jnp.split(self.head(self.hidden(features, condition)), 2, axis=-1)
    magnitude = jnp.minimum(jnp.exp(magnitude), _MAX_MAGNITUDE)
    spectrum = jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase))
    window = hann(c.n_fft)
    frames = jnp.fft.irfft(spectrum, c.n_fft) * window
    wav = overlap_add(frames, c.hop)
    envelope = overlap_add(jnp.broadcast_to(window**2, (1, *frames.shape[1:])), c.hop)
    trim = (c.n_fft - c.hop) // 2
    return (wav / jnp.where(envelope > 1e-11, envelope, 1.0))[:, trim : wav.shape[1] - trim]


class SpeechCodec(nnx.Module):
  """WavTokenizer-shaped codec; every product runs at the highest matmul precision."""

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    self.config = config
    encoders = {"seanet": SEANetEncoder, "log_mel": LogMelEncoder}
    self.encoder = encoders[config.encoder](config, rngs=rngs)
    shape = (config.num_codes, config.embed_dim)
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
    self.decoder = Decoder(config, rngs=rngs)

  def encode(self, wav: Array) -> Array:
    """Returns the codes int32[B, ceil(n / hop)] of sound float32[B, n].

    Raises:
      ValueError: if the clips are empty or not [B, n].
    """
    if wav.ndim != 2 or not wav.shape[1]:
      raise ValueError(
        f"SpeechCodec.encode got sound of shape {wav.shape}; expected [B, n] with n >= 1."
      )
    return vq.nearest_codes(self.latents(wav), self.codebook[...])

  def decode(self, codes: Array, condition: int = 0) -> Array:
    """Returns sound float32[B, L * hop] of codes int32[B, L].

    Args:
      codes: codes.
      condition: row of the adaptive norms (WavTokenizer's bandwidth id).

    Raises:
      ValueError: if the codes are not [B, L] with L >= 1.
    """
    if codes.ndim != 2 or not codes.shape[1]:
      raise ValueError(
        f"SpeechCodec.decode got codes of shape {codes.shape}; expected [B, L] with L >= 1."
      )
    return self.render(self.codebook[...][codes], condition)

  def latents(self, wav: Array) -> Array:
    """Returns the vectors before quantisation, float32[B, L, embed_dim]."""
    with jax.default_matmul_precision("highest"):
      return self.encoder(wav)

  def render(self, features: Array, condition: int = 0) -> Array:
    """Returns the sound float32[B, L * hop] of quantised vectors float32[B, L, embed_dim]."""
    with jax.default_matmul_precision("highest"):
      return self.decoder(features, condition)


def to_params(codec: SpeechCodec) -> dict:
  """Returns the parameters as nested dicts of arrays, all keys strings (list positions too)."""
  return codec_params.to_params(codec)


def from_params(config: SpeechCodecConfig, params: dict) -> SpeechCodec:
  """Returns the codec with the given parameters (nested dicts as `to_params` makes them).

  Raises:
    ValueError: if names or shapes are not those of the config, naming the differences.
  """
  return codec_params.from_params(
    lambda rngs: SpeechCodec(config, rngs=rngs), params, "speech codec"
  )
