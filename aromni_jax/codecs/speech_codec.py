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

from aromni_jax.codecs import vq
from aromni_jax.codecs.seanet import SEANetEncoder
from aromni_jax.codecs.spectrogram import log_mel
from aromni_jax.codecs.vocos import ConvNeXt, Decoder
from aromni_jax.models import params as codec_params

Array = jax.Array

_EPSILON = 1e-6


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

  @property
  def hears_padding(self) -> bool:
    """Whether the last codes of a padded clip depend on how much silence follows it."""
    return self.encoder == "log_mel"

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


class LogMelEncoder(nnx.Module):
  """float32[B, n] -> float32[B, ceil(n / hop), embed_dim], by ConvNeXt on a log-mel spectrogram.

  Past a clip's end it hears silence: the last frames of a padded clip (14, 0.35 s, in the preset
  "small") are those of the clip with as much silence as there is padding.
  """

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

  def __call__(self, wav: Array, lengths: Array) -> Array:
    c = self.config
    wav = jnp.where(_mask(lengths, wav.shape[1]), wav, 0.0)
    mel = log_mel(wav, c.sample_rate, n_fft=3 * c.hop, hop=c.hop, bins=c.mel_bins)
    x = self.conv_in(0.25 * mel + 1.0)  # speech then lies about in [-1, 1.5]
    for block in self.blocks:
      x = block(x)
    return self.out(self.norm(x))


def _make_encoder(config: SpeechCodecConfig, rngs: nnx.Rngs) -> nnx.Module:
  c = config
  if c.encoder == "log_mel":
    return LogMelEncoder(c, rngs=rngs)
  return SEANetEncoder(c.num_filters, c.strides, c.lstm_layers, c.embed_dim, rngs=rngs)


def _make_decoder(config: SpeechCodecConfig, rngs: nnx.Rngs) -> Decoder:
  c = config
  return Decoder(
    embed_dim=c.embed_dim,
    dim=c.dim,
    mlp_dim=c.mlp_dim,
    num_layers=c.num_layers,
    num_conditions=c.num_conditions,
    position_groups=c.num_groups if c.position_net else None,
    hop=c.hop,
    n_fft=c.n_fft,
    rngs=rngs,
  )


class SpeechCodec(nnx.Module):
  """WavTokenizer-shaped codec; every product runs at the highest matmul precision.

  A batch may hold clips of several lengths, padded with anything: with `lengths`, int32[B] from 1
  to the width of the batch, each row comes out as it would alone. The one exception is the encoder
  "log_mel", to which padding is silence. Values past a row's end are zeros in sound and without
  meaning in codes and vectors.
  """

  def __init__(self, config: SpeechCodecConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.encoder = _make_encoder(config, rngs)
    shape = (config.num_codes, config.embed_dim)
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
    self.decoder = _make_decoder(config, rngs)

  def encode(self, wav: Array, lengths: Array | None = None) -> Array:
    """Returns the codes int32[B, ceil(n / hop)] of sound float32[B, n].

    Args:
      wav: sound at the codec's rate.
      lengths: int32[B], valid samples of each row; None: all. `config.num_frames` of them are valid
        codes.

    Raises:
      ValueError: if the clips are empty or not [B, n], or the lengths not [B].
    """
    if wav.ndim != 2 or not wav.shape[1]:
      raise ValueError(
        f"SpeechCodec.encode got sound of shape {wav.shape}; expected [B, n] with n >= 1."
      )
    return vq.nearest_codes(self.latents(wav, lengths), self.codebook[...])

  def decode(self, codes: Array, lengths: Array | None = None, condition: int = 0) -> Array:
    """Returns sound float32[B, L * hop] of codes int32[B, L].

    Args:
      codes: codes.
      lengths: int32[B], valid codes of each row; None: all.
      condition: row of the adaptive norms (WavTokenizer's bandwidth id).

    Raises:
      ValueError: if the codes are not [B, L] with L >= 1, or the lengths not [B].
    """
    if codes.ndim != 2 or not codes.shape[1]:
      raise ValueError(
        f"SpeechCodec.decode got codes of shape {codes.shape}; expected [B, L] with L >= 1."
      )
    return self.render(self.codebook[...][codes], lengths, condition)

  def latents(self, wav: Array, lengths: Array | None = None) -> Array:
    """Returns the vectors before quantisation, float32[B, L, embed_dim]."""
    with jax.default_matmul_precision("highest"):
      return self.encoder(wav, _lengths(wav, lengths))

  def render(self, features: Array, lengths: Array | None = None, condition: int = 0) -> Array:
    """Returns the sound float32[B, L * hop] of quantised vectors float32[B, L, embed_dim]."""
    mask = _mask(_lengths(features, lengths), features.shape[1])
    with jax.default_matmul_precision("highest"):
      return self.decoder(features, mask, condition)


def _lengths(rows: Array, lengths: Array | None) -> Array:
  """Returns int32[B], the given lengths or the whole width of rows [B, n, ...]."""
  if lengths is None:
    return jnp.full(len(rows), rows.shape[1], jnp.int32)
  lengths = jnp.asarray(lengths)
  if lengths.shape != (len(rows),) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(
      f"SpeechCodec got lengths {lengths.dtype}{list(lengths.shape)} for {len(rows)} rows; "
      f"expected int32[{len(rows)}], one valid length per row."
    )
  return lengths


def _mask(lengths: Array, width: int) -> Array:
  """Returns bool[B, width], true before each row's end."""
  return jnp.arange(width) < lengths[:, None]


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
