"""The codecs that a model directory may have. A new kind of codec is one entry here.

Their modules are loaded when they are asked for, so that nothing loads a codec that it has no use
for.
"""

import dataclasses
import importlib
from collections.abc import Container


@dataclasses.dataclass(frozen=True)
class CodecKind:
  """A part of a model directory that turns a modality into codes and back.

  Attributes:
    name: of the part.
    modality: of `vocabulary.MODALITIES`.
    module: where its classes are.
    config_class, codec_class: names of its configuration and of itself.
    codebook: dotted name of its codes' vectors [codes, dimensions] among its parameters.
    hint: how to get one.
  """

  name: str
  modality: str
  module: str
  config_class: str
  codec_class: str
  codebook: str
  hint: str

  def classes(self) -> tuple[type, type]:
    """Returns the classes of the configuration and of the codec, which is built as
    codec_class(config, rngs=rngs)."""
    module = importlib.import_module(self.module)
    return getattr(module, self.config_class), getattr(module, self.codec_class)


CODECS = {
  kind.name: kind
  for kind in (
    CodecKind(
      name="image_codec",
      modality="image",
      module="aromni_jax.codecs.image_vq",
      config_class="ImageVQConfig",
      codec_class="ImageVQ",
      codebook="quantize.embedding",
      hint="Convert with --vqgan=vqgan.ckpt, or train one with aromni train_codec",
    ),
    CodecKind(
      name="speech_codec",
      modality="speech",
      module="aromni_jax.codecs.speech_codec",
      config_class="SpeechCodecConfig",
      codec_class="SpeechCodec",
      codebook="codebook",
      hint="Convert with --wavtokenizer=FILE.ckpt, or train one with aromni train_codec",
    ),
  )
}
CODED = tuple(dict.fromkeys(kind.modality for kind in CODECS.values()))  # modalities with codecs


def kind_of(modality: str, parts: Container[str]) -> CodecKind:
  """Returns the kind of codec that parts of a model have for a modality of `CODED`: the first that
  is among them, or the first of all if none is."""
  kinds = [kind for kind in CODECS.values() if kind.modality == modality]
  return next((kind for kind in kinds if kind.name in parts), kinds[0])
