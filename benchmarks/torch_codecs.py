"""The peers of the codecs in eager PyTorch: plain functions of a checkpoint's tensors.

`transformers` has the encoder of Chameleon's VQGAN (`ChameleonVQVAE`) but neither its decoder nor
WavTokenizer, so these are written here, the fastest plain way: weight norms folded, LSTM in one
call. Names and layouts are those of the released checkpoints.
"""

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def _conv(w: Tensors, name: str, x: torch.Tensor, **options) -> torch.Tensor:
  weight = w[f"{name}.weight"]
  function = F.conv2d if weight.ndim == 4 else F.conv1d
  return function(x, weight, w[f"{name}.bias"], **options)


def _group_norm(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
  return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def _res_block(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
  h = _conv(w, f"{name}.conv1", F.silu(_group_norm(w, f"{name}.norm1", x)), padding=1)
  h = _conv(w, f"{name}.conv2", F.silu(_group_norm(w, f"{name}.norm2", h)), padding=1)
  return h + (_conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in w else x)


def _attention(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
  h = _group_norm(w, f"{name}.norm", x)
  q, k, v = (_conv(w, f"{name}.{part}", h).flatten(2).mT[:, None] for part in "qkv")
  h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
  return x + _conv(w, f"{name}.proj_out", h)


def decode_picture(w: Tensors, codes: torch.Tensor) -> torch.Tensor:
  """Returns pixels float32[B, 3, 512, 512] of codes int64[B, 1024]."""
  z = F.embedding(codes, w["quantize.embedding.weight"]).mT.unflatten(2, (32, 32))
  x = _conv(w, "decoder.conv_in", _conv(w, "post_quant_conv", z), padding=1)
  x = _res_block(w, "decoder.mid.block_1", x)
  x = _attention(w, "decoder.mid.attn_1", x)
  x = _res_block(w, "decoder.mid.block_2", x)
  for level in reversed(range(5)):
    for block in range(3):
      x = _res_block(w, f"decoder.up.{level}.block.{block}", x)
    if level:
      x = F.interpolate(x, scale_factor=2.0, mode="nearest")
      x = _conv(w, f"decoder.up.{level}.upsample.conv", x, padding=1)
  return _conv(w, "decoder.conv_out", F.silu(_group_norm(w, "decoder.norm_out", x)), padding=1)


_ENCODER = "feature_extractor.encodec.encoder.model."
_CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"


def fold_weight_norms(w: Tensors) -> Tensors:
  """Returns WavTokenizer's tensors with every `weight_g`, `weight_v` as one `weight`."""
  out = {k: v for k, v in w.items() if not k.endswith(("weight_g", "weight_v"))}
  for name in (k.removesuffix("_g") for k in w if k.endswith("weight_g")):
    v = w[name + "_v"]
    out[name] = w[name + "_g"] * v / v.norm(dim=(1, 2), keepdim=True)
  return out


def make_lstm(w: Tensors) -> torch.nn.LSTM:
  """Returns the encoder's LSTM."""
  prefix = _ENCODER + "13.lstm."
  tensors = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
  lstm = torch.nn.LSTM(512, 512, num_layers=2, batch_first=True)
  lstm.load_state_dict(tensors)
  return lstm.eval()


def _same_conv(w: Tensors, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
  """Mirrored ends; for clips longer than a kernel."""
  total = w[f"{_ENCODER}{name}.conv.conv.weight"].shape[-1] - stride
  right = total // 2 + -x.shape[-1] % stride
  x = F.pad(x, (total - total // 2, right), mode="reflect") if total else x
  return _conv(w, f"{_ENCODER}{name}.conv.conv", x, stride=stride)


def encode_speech(w: Tensors, lstm: torch.nn.LSTM, wav: torch.Tensor) -> torch.Tensor:
  """Returns codes int64[B, ceil(n / 600)] of sound float32[B, n]; weight norms must be folded."""
  x = _same_conv(w, "0", wav[:, None])
  for i, stride in enumerate((4, 5, 5, 6)):
    unit = 1 + 3 * i
    h = F.elu(_same_conv(w, f"{unit}.block.1", F.elu(x)))
    x = _same_conv(w, f"{unit}.shortcut", x) + _same_conv(w, f"{unit}.block.3", h)
    x = _same_conv(w, f"{unit + 2}", F.elu(x), stride)
  x = x + lstm(x.mT)[0].mT
  z = _same_conv(w, "15", F.elu(x)).mT
  codebook = w[_CODEBOOK]
  distances = (z * z).sum(-1, keepdim=True) + (codebook * codebook).sum(-1) - 2 * z @ codebook.T
  return distances.argmin(-1)


def _adaptive_norm(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
  x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
  return x * w[f"{name}.scale.weight"][0] + w[f"{name}.shift.weight"][0]


def decode_speech(w: Tensors, codes: torch.Tensor) -> torch.Tensor:
  """Returns sound float32[B, L * 600] of codes int64[B, L]."""
  x = _conv(w, "backbone.embed", F.embedding(codes, w[_CODEBOOK]).mT, padding=3)
  for i in range(5):
    x = (_attention if i == 2 else _res_block)(w, f"backbone.pos_net.{i}", x)
  x = _group_norm(w, "backbone.pos_net.5", x)
  x = _adaptive_norm(w, "backbone.norm", x.mT).mT
  for i in range(12):
    name = f"backbone.convnext.{i}"
    h = _conv(w, f"{name}.dwconv", x, padding=3, groups=x.shape[1])
    h = _adaptive_norm(w, f"{name}.norm", h.mT)
    h = F.gelu(F.linear(h, w[f"{name}.pwconv1.weight"], w[f"{name}.pwconv1.bias"]))
    h = F.linear(h, w[f"{name}.pwconv2.weight"], w[f"{name}.pwconv2.bias"])
    x = x + (w[f"{name}.gamma"] * h).mT
  norm = "backbone.final_layer_norm"
  h = F.layer_norm(x.mT, x.shape[1:2], w[f"{norm}.weight"], w[f"{norm}.bias"], 1e-6)
  magnitude, phase = F.linear(h, w["head.out.weight"], w["head.out.bias"]).mT.chunk(2, dim=1)
  spectrum = torch.polar(magnitude.exp().clamp(max=100.0), phase)
  window = torch.hann_window(2400)
  frames = torch.fft.irfft(spectrum, 2400, dim=1) * window[:, None]
  size = 600 * (codes.shape[1] - 1) + 2400

  def overlap(x):
    return F.fold(x, (1, size), (1, 2400), stride=(1, 600)).flatten(1)[:, 900:-900]

  return overlap(frames) / overlap((window**2)[None, :, None].expand(1, 2400, codes.shape[1]))
