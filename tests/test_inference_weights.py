"""Weights in 8 bits, and weights laid out for a CPU's library, give what the plain ones give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from engine.config import AutoencoderConfig
from engine.model.autoencoder import Autoencoder
from engine.rollout.inference_weights import (
    Float8Linear,
    PackedConv,
    PackedLinear,
    cast_weights,
    pack_weights,
)

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


def test_a_product_in_8_bits_is_near_the_true_one():
    """Rows of very different sizes, each with its own scale: as near as four bits of mantissa allow."""
    linear = nn.Linear(256, 96)
    x = torch.randn(2, 5, 256) * torch.logspace(-3, 3, 5)[:, None]
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 2, 96)[:, None]
        true, made = linear(x), Float8Linear(linear)(x)
    assert made.shape == true.shape and made.dtype == torch.bfloat16
    off = (made - true).norm(dim=-1) / true.norm(dim=-1)  # of each row
    assert 0.005 < off.mean() < 0.05 and off.max() < 0.1


def test_only_large_products_of_layers_are_in_8_bits():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(256, 128)
            self.part = nn.Module()
            self.part.layers = nn.ModuleList([nn.Linear(128, 256), nn.Linear(64, 64)])

    network = Network()
    cast_weights(network, "fp8")
    big, small = network.part.layers
    assert isinstance(big, Float8Linear) and big.weight.dtype == torch.float8_e4m3fn
    assert small.weight.dtype == network.first.weight.dtype == torch.bfloat16


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_numbers(dtype):
    """For sizes that alternate, as the window's and the correction's do; inputs of another type are cast."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    far = 1e-5 if dtype == torch.float32 else 0  # there PyTorch takes another library
    linear, conv = nn.Linear(96, 128).to(dtype), nn.Conv2d(24, 40, 3, padding=1).to(dtype)
    for x in (torch.randn(5, 7, 96), torch.randn(2, 96)):
        made, true = PackedLinear(linear)(x), linear(x.to(dtype))
        assert made.dtype == dtype and torch.allclose(made, true, atol=far)
    packed = PackedConv(conv)
    for count in (4, 1, 5, 4, 1):
        x = torch.randn(count, 24, 12, 16).contiguous(memory_format=torch.channels_last)
        made, true = packed(x), conv(x.to(dtype))
        assert made.dtype == dtype and torch.allclose(made, true, atol=far)
        assert made.is_contiguous(memory_format=torch.channels_last)
    assert len(packed.packed) == 3


@needs_onednn
@torch.no_grad()
def test_a_packed_autoencoder_is_the_same_one():
    """Its pixels are not moved into channels any more: the convolutions behind read them where they are."""
    autoencoder = Autoencoder(AutoencoderConfig(widths=[8, 16, 72])).eval().requires_grad_(False)
    for parameter in autoencoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    packed = copy.deepcopy(autoencoder)
    pack_weights(packed, "fp32")
    kinds = [type(part) for part in packed.modules()]
    assert nn.PixelUnshuffle not in kinds and nn.Conv2d not in kinds and PackedConv in kinds
    pictures = 2 * torch.rand(2, 3, 64, 96) - 1
    latents = autoencoder.encode_pixels(pictures)
    assert torch.allclose(packed.encode_pixels(pictures), latents, atol=1e-4)
    assert torch.allclose(packed.decode_pixels(latents), autoencoder.decode_pixels(latents), atol=1e-5)


def test_what_is_not_for_the_library_stays():
    network = nn.Sequential(nn.Linear(128, 32), nn.Linear(128, 64))
    pack_weights(network, "fp16")
    assert not any(isinstance(part, PackedLinear) for part in network)
    pack_weights(network, "fp32")
    assert isinstance(network[0], nn.Linear), "too small to be worth it"


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_can_be_packed_on_every_cpu(precision):
    """Where the library cannot serve it, weights stay as they are, and the numbers are near all the same."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 8)
    true = network(x)
    cast_weights(network, precision)
    pack_weights(network, precision)
    with torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16, precision != "fp32"):
        assert (network(x).float() - true).abs().max() < 0.05
