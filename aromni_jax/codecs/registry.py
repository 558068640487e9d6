"""The codecs that a model directory may have. A new kind of codec is one entry here."""

import dataclasses

from aromni_jax.codecs import image_vq, speech_codec


@dataclasses.dataclass(frozen=True)
class CodecKind:
  """A part of a model directory that turns a modality into codes and back.

  Attributes:
    name: of the part.
    modality: of `vocabulary.MODALITIES`.
    config, module: classes of its configuration and of itself, built as module(config, rngs=rngs).
    hint: how to get one.
  """

  name: str
  modality: str
  config: type
  module: type
  hint: str


CODECS = {
  kind.name: kind
  for kind in (
    CodecKind(
      "image_codec",
      "image",
      image_vq.ImageVQConfig,
      image_vq.ImageVQ,
      "Convert with --vqgan=vqgan.ckpt, or train one with aromni train_codec",
    ),
    CodecKind(
      "speech_codec",
      "speech",
      speech_codec.SpeechCodecConfig,
      speech_codec.SpeechCodec,
      "Convert with --wavtokenizer=FILE.ckpt, or train one with aromni train_codec",
    ),
  )
}
