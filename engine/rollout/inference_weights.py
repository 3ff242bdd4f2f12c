"""Weights as play needs them: cast to the precision of products, or laid out for oneDNN on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from ..device import AUTOCAST

SMALLEST = 128  # input channels from which a linear layer is faster in 8 bits
PACKED = 64  # input and output channels from which packing a linear layer's weights is faster


def cast_weights(module: nn.Module, precision: str) -> None:
    """Casts the weights of linear layers and convolutions to `precision`, in place, so that autocast need not
    cast them at each step. With fp8 the large linear layers of the transformer are replaced by Float8Linear,
    and all others are bfloat16.
    """
    dtype = AUTOCAST[precision]
    for part in module.modules():
        if dtype and isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)
    if precision == "fp8":
        _replace(module, lambda name, x: Float8Linear(x) if ".layers." in name and _is_large(x) else None)


def pack_weights(module: nn.Module, precision: str) -> None:
    """Replaces linear layers and convolutions, for play on a CPU, by ones whose weights have oneDNN's own
    layout, which need not be made at every call; a PixelUnshuffle before a convolution becomes part of it.
    There are no gradients. Does nothing where oneDNN does not support `precision` on this CPU.
    """
    if _is_served(precision):
        for part in module.modules():
            if isinstance(part, nn.Sequential):
                _fold(part)
        _replace(module, lambda name, part: _packed(part))


def _is_served(precision: str) -> bool:
    if precision == "bf16":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return precision == "fp32" and torch.backends.mkldnn.is_available()


def _fold(parts: nn.Sequential) -> None:
    """Replaces PixelUnshuffle and the convolution after it by one convolution with a larger stride."""
    for index, (moves, conv) in enumerate(pairwise(parts)):
        if isinstance(moves, nn.PixelUnshuffle) and isinstance(conv, nn.Conv2d):
            step, (height, width) = moves.downscale_factor, conv.kernel_size
            weight = rearrange(conv.weight, "o (c p q) y x -> o c (y p) (x q)", p=step, q=step)
            size = (step * height, step * width)
            padding = tuple(step * side for side in conv.padding)
            whole = nn.Conv2d(weight.shape[1], len(weight), size, step, padding, device="meta")
            whole.weight, whole.bias = nn.Parameter(weight, requires_grad=False), conv.bias
            parts[index], parts[index + 1] = nn.Identity(), whole


def _replace(module: nn.Module, change: Callable[[str, nn.Module], nn.Module | None]) -> None:
    for name, part in list(module.named_modules()):
        made = change(name, part)
        if made is not None:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, made)


def _is_large(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.in_features >= SMALLEST


def _packed(part: nn.Module) -> nn.Module | None:
    if isinstance(part, nn.Conv2d):
        return PackedConv(part)
    if isinstance(part, nn.Linear) and min(part.weight.shape) >= PACKED:
        return PackedLinear(part)
    return None


class PackedLinear(nn.Module):
    """A linear layer with weights in oneDNN's layout."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


class PackedConv(nn.Module):
    """A convolution with weights in oneDNN's layout. The best layout depends on the input's size, and another
    one halves the speed, so there is one for each size.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.place = conv.padding, conv.stride, conv.dilation, conv.groups
        self.packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, y, x) → (n, out, y', x')."""
        if x.shape not in self.packed:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.place, list(x.shape))
            self.packed[x.shape] = weight
        x, weight = x.to(self.weight.dtype), self.packed[x.shape]
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.place, "none", [], "")


class Float8Linear(nn.Module):
    """A linear layer whose weights and inputs are 8-bit floats (e4m3), with a scale for each row
    (Micikevicius et al., 2022); sums are float32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = rows_in_8_bits(linear.weight.detach().float())
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale.t().contiguous())  # (1, out)
        self.register_buffer("bias", linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), bfloat16."""
        rows, scale = rows_in_8_bits(x.flatten(0, -2))
        scales = {"scale_a": scale, "scale_b": self.scale}
        made = torch._scaled_mm(rows, self.weight.t(), **scales, bias=self.bias, out_dtype=torch.bfloat16)
        return made.unflatten(0, x.shape[:-1])


def rows_in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) → the same as 8-bit floats (n, m), and each row's scale (n, 1), float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale
