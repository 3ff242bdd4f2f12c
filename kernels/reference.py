"""Each operation's definition in plain PyTorch: the CPU path, and the oracle for faster implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v: q (b, h, n, d), k and v (b, h, m, d), mask (n, m) added, 0 or -inf → (b,
    h, n, d).
    """
    if q.requires_grad and not q.is_cuda:
        # On CPUs the backward pass of the fused operation is three times slower in bfloat16 than the written-
        # out one.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """norm(x) · (1 + scale) + shift: x (b, t, n, d), one scale and shift a frame (b, t, d) → (b, t, n, d).

    norm is that of Ba et al. (2016) without parameters; it costs a quarter of a root-mean-square norm in
    training on CPUs, where only the former has a fused backward pass.
    """
    normal = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, :, None], normal, 1 + scale[:, :, None])


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x + gate · y, and that, normalised and modulated as above: x and y (b, t, n, d), one gate, scale and
    shift a frame (b, t, d) → two of (b, t, n, d).
    """
    x = torch.addcmul(x, gate[:, :, None], y)
    return x, modulated_norm(x, scale, shift, eps)


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6) -> Tensor:
    """norm(x) · weight, rotated: x (b, n, h, d), weight (d,), cos and sin (n, d/2) → (b, n, h, d).

    The pair (x[i], x[i + d/2]) turns by angle i of its token (Su et al., 2021, RoFormer).
    """
    return rotate(F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), eps=eps), cos[:, None], sin[:, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + d/2]) of (..., d) by angles whose cos and sin (..., d/2) broadcast against
    them.
    """
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
