import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aromni_jax.codecs import batching, seanet, speech_codec
from aromni_jax.convert import speech_codec_names
from aromni_jax.models import params as codec_params
from tests import parity, tiny

TINY = speech_codec.SpeechCodecConfig(
  num_filters=4, embed_dim=32, num_codes=64, dim=64, mlp_dim=96, num_layers=3
)
SMALL = tiny.SPEECH_CODEC


@pytest.fixture(scope="module")
def reference():
  tensors, meta = parity.load("wavtok_tiny")
  return tensors, meta["cases"], parity.weights(tensors)


@pytest.fixture(scope="module")
def codec(reference):
  return speech_codec.from_params(TINY, speech_codec_names.from_torch(reference[2]))


@pytest.mark.slow
@pytest.mark.parametrize("case", "abc")
def test_equals_the_reference(reference, codec, case):
  tensors, cases, _ = reference
  condition = cases[case]["bandwidth_id"]
  wav = tensors[f"{case}.in.wav"]
  latents, codes = nnx.jit(lambda c, w: (c.latents(w), c.encode(w)))(codec, wav)
  np.testing.assert_allclose(latents.swapaxes(1, 2), tensors[f"{case}.out.emb"], atol=1e-5)
  np.testing.assert_array_equal(codes, tensors[f"{case}.out.codes"][0])
  out = nnx.jit(lambda c, k: c.decode(k, condition=condition))(codec, codes)
  np.testing.assert_allclose(out, tensors[f"{case}.out.wav"], atol=1e-5)


@pytest.mark.slow
def test_released_size_equals_the_reference():
  """Both clips of the fixture in one padded batch; anything may stand in the padding."""
  tensors, _ = parity.load("wavtok_full_io")
  codec = speech_codec.from_params(
    speech_codec.PRESETS["wavtokenizer"],
    speech_codec_names.from_torch(parity.weights(tensors)),
  )
  wavs = [tensors[f"{case}.in.wav"][0] for case in "ab"]
  latents, codes = nnx.jit(lambda c, w, n: (c.latents(w, n), c.encode(w, n)))(codec, *padded(wavs))
  want = [tensors[f"{case}.out.codes"][0, 0] for case in "ab"]
  out = nnx.jit(lambda c, k, n: c.decode(k, n))(codec, *padded(want))
  for row, case in enumerate("ab"):
    frames, sound = len(want[row]), tensors[f"{case}.out.wav"][0]
    emb = tensors[f"{case}.out.emb"][0].T
    np.testing.assert_allclose(latents[row, :frames], emb, atol=1e-5)
    np.testing.assert_array_equal(codes[row, :frames], want[row])
    np.testing.assert_allclose(out[row, : len(sound)], sound, atol=1e-5)


def padded(rows):
  """Returns the rows with large noise to the right of their ends, and their lengths."""
  lengths = np.array([len(row) for row in rows], np.int32)
  noise = np.random.default_rng(0).integers(1, 9, (len(rows), lengths.max() + 50))
  out = noise.astype(rows[0].dtype)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out, lengths


@pytest.mark.parametrize(("left", "right", "extra"), [(3, 3, 0), (3, 2, 4), (1, 1, 0), (2, 2, 3)])
def test_rows_are_mirrored_at_their_own_ends(left, right, extra):
  """Against NumPy's reflection of each row alone, the short ones extended with zeros first."""
  rows = [np.arange(1, n + 1, dtype=np.float32) for n in range(1, 12)]
  x, lengths = padded(rows)
  needed = right + np.arange(len(rows)) % (extra + 1)
  out = seanet.mirror_ends(x[..., None], lengths, left, jnp.asarray(needed), right + extra)
  for got, row, after in zip(out, rows, needed, strict=True):
    short = max(0, max(left, after) + 1 - len(row))
    want = np.pad(np.pad(row, (0, short)), (left, after), mode="reflect")
    want = want[: len(want) - short]
    np.testing.assert_array_equal(got[: len(want), 0], want)


@pytest.mark.slow
def test_padded_rows_are_what_they_are_alone(codec):
  rng = np.random.default_rng(0)
  wavs = [0.3 * rng.normal(size=n).astype(np.float32) for n in (1, 430, 601, 6100)]
  encode = nnx.jit(lambda c, w, n=None: c.encode(w, n))
  decode = nnx.jit(lambda c, k, n=None: c.decode(k, n))
  together = encode(codec, *padded(wavs))
  alone = [np.asarray(encode(codec, wav[None])[0]) for wav in wavs]
  for row, codes in zip(together, alone, strict=True):
    np.testing.assert_array_equal(row[: len(codes)], codes)
  sounds = decode(codec, *padded(alone))
  for row, codes in zip(sounds, alone, strict=True):
    want = decode(codec, codes[None])[0]
    np.testing.assert_allclose(row[: len(want)], want, atol=1e-5)
    assert not row[len(want) :].any()


@pytest.mark.slow
def test_minutes_of_sound(codec):
  """200 seconds, padded: codes as those of a piece before it ends, and sound as without padding."""
  wav = 0.3 * np.random.default_rng(0).normal(size=24_000 * 200).astype(np.float32)
  (codes,) = batching.encode_speech(codec, [wav])
  (piece,) = batching.encode_speech(codec, [wav[: 24_000 * 10]])
  assert len(codes) == 8000 and len(piece) == 400
  unpadded = nnx.jit(lambda c, w: c.encode(w))(codec, wav[None, : 24_000 * 10])[0]
  np.testing.assert_array_equal(piece, unpadded)
  np.testing.assert_array_equal(codes[:395], piece[:395])  # the last five hear the mirrored end
  (sound,) = batching.decode_speech(codec, [codes])
  want = nnx.jit(lambda c, k: c.decode(k))(codec, codes[None])[0]
  np.testing.assert_allclose(sound, want, atol=1e-5)


def test_unknown_encoder_tensor_is_named(reference):
  name = "feature_extractor.encodec.encoder.model.2.alpha"
  with pytest.raises(ValueError, match="model.2.alpha"):
    speech_codec_names.from_torch(reference[2] | {name: np.zeros(1)})


def test_released_size():
  config = speech_codec.PRESETS["wavtokenizer"]
  codec = nnx.eval_shape(lambda: speech_codec.SpeechCodec(config, rngs=nnx.Rngs(0)))
  sizes = {
    name: sum(x.size for x in jax.tree.leaves(nnx.state(part)))
    for name, part in {"encoder": codec.encoder, "decoder": codec.decoder}.items()
  }
  weight_norm_gains = 2_704  # one per output channel of every SEANet convolution, folded away
  second_biases = 2 * 4 * 512  # of the two LSTM layers, folded away too
  assert sizes["encoder"] + second_biases + weight_norm_gains == 8_303_104
  assert sizes["decoder"] == 61_961_472 + 1_847_138


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 399, 400, 401, 4000])
def test_small_preset_takes_any_length(samples):
  graphdef, params = codec_params.init(lambda r: speech_codec.SpeechCodec(SMALL, rngs=r), 0)

  @jax.jit
  def run(params, wav):
    codec = nnx.merge(graphdef, params)
    codes = codec.encode(wav)
    return codes, codec.decode(codes)

  codes, wav = run(params, jnp.ones((2, samples)))
  frames = SMALL.num_frames(samples)
  assert codes.shape == (2, frames) and wav.shape == (2, frames * SMALL.hop)
  assert jnp.isfinite(wav).all()


@pytest.mark.slow
def test_small_decoder_is_local():
  """Without the position net a far code changes nothing, so the small codec can stream exactly."""
  graphdef, params = codec_params.init(lambda r: speech_codec.SpeechCodec(SMALL, rngs=r), 0)
  decode = jax.jit(lambda codes: nnx.merge(graphdef, params).decode(codes))
  codes = jnp.arange(40)[None]
  changed = decode(codes.at[0, -1].set(7)) != decode(codes)
  reach = 3 + SMALL.num_layers * 3 + SMALL.n_fft // (2 * SMALL.hop)
  assert changed.any() and not changed[0, : (39 - reach) * SMALL.hop].any()


def test_wrong_shapes_are_named(codec):
  with pytest.raises(ValueError, match=r"\[B, n\] with n >= 1"):
    codec.encode(jnp.zeros((1, 0)))
  with pytest.raises(ValueError, match=r"\[B, L\] with L >= 1"):
    codec.decode(jnp.zeros(5, jnp.int32))
  with pytest.raises(ValueError, match=r"lengths int32\[2\] for 3 rows; expected int32\[3\]"):
    codec.decode(jnp.zeros((3, 5), jnp.int32), jnp.ones(2, jnp.int32))
  with pytest.raises(ValueError, match=r"lengths float32\[1\] for 1 rows"):
    codec.encode(jnp.zeros((1, 5)), jnp.ones(1))
  with pytest.raises(ValueError, match="do not multiply"):
    dataclasses.replace(TINY, hop=601)
  with pytest.raises(ValueError, match="not a multiple of 600"):
    dataclasses.replace(TINY, n_fft=1024)
  with pytest.raises(ValueError, match="codebook"):
    params = speech_codec.to_params(codec)
    speech_codec.from_params(TINY, {k: v for k, v in params.items() if k != "codebook"})
