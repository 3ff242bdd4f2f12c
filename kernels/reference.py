"""The definition of each operation in plain PyTorch: runs on CPUs, and tests compare the kernels with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-6  # added to variances
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v: q (b, h, n, d), k and v (b, h, m, d), mask (n, m) of 0 and -inf → (b, h,
    n, d).
    """
    if q.requires_grad and not q.is_cuda:
        # on CPUs, in bfloat16, the backward pass of the fused operation is three times slower than this
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1) @ v
    if q.is_cuda:  # in this order, as on Hopper PyTorch would choose the slowest
        with sdpa_kernel(BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) · (1 + scale) + shift: x (b, t, n, d), scale and shift of each frame (b, t, d) → (b, t, n, d).

    norm: layer normalisation (Ba et al., 2016) without parameters. In training on CPUs it takes a quarter of
    the time of RMS normalisation, which has no fused backward pass there.
    """
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, :, None], normal, 1 + scale[:, :, None])


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """x + gate · y, and modulated_norm of that: x and y (b, t, n, d), gate, scale and shift of each frame (b,
    t, d) → two tensors (b, t, n, d).
    """
    x = torch.addcmul(x, gate[:, :, None], y)
    return x, modulated_norm(x, scale, shift)


def qknorm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the merged projection qkv (b, m, 3 · h · d) into q, k and v (b, m, h, d); q and k are
    normalised, multiplied by their weights, and rotated by cos and sin (m, d / 2).

    With weights (d,) each head is normalised by itself, with weights (h · d,) all heads together: by RMS
    normalisation (Zhang & Sennrich, 2019) if `rms`, else by layer normalisation (Ba et al., 2016). The pair
    (x[i], x[i + d / 2]) is rotated by angle i of its token (Su et al., 2021, RoFormer).
    """
    d, over = 2 * cos.shape[-1], q_weight.shape[0]
    parts = qkv.unflatten(-1, (3, -1))  # (b, m, 3, h d)
    weight = torch.stack([q_weight, k_weight]).to(qkv.dtype)[:, None]  # (2, 1, over)
    qk = parts[:, :, :2].unflatten(-1, (-1, over))
    normal = F.rms_norm(qk, (over,), eps=EPS) if rms else F.layer_norm(qk, (over,), eps=EPS)
    qk = (normal * weight).flatten(-2).unflatten(-1, (-1, d))  # (b, m, 2, h, d)
    q, k = rotate(qk, cos[:, None, None], sin[:, None, None]).unbind(2)
    return q, k, parts[:, :, 2].unflatten(-1, (-1, d))


def qknorm_rope_write(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rms: bool = False,
) -> Tensor:
    """As qknorm_rope, for qkv (b, t · n, 3 · h · d) → q (b, t · n, h, d). k and v of frame i are written into
    slot `slots[i]` of a layer's buffers: keys and values (b, s, n, h, d), slots (t,) int32, all different.
    """
    q, k, v = qknorm_rope(qkv, q_weight, k_weight, cos, sin, rms)
    for buffer, new in ((keys, k), (values, v)):
        buffer.index_copy_(1, slots.long(), new.unflatten(1, (len(slots), -1)).to(buffer.dtype))
    return q


def window_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rows: tuple[int, ...],
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention, softmax(q kᵀ / √d) v, in which each group of queries sees its own pages of a layer's
    buffers: q (b, m, h, d); keys and values (b, s, n, h, d); pages (g, p) int32, the slots that each group
    sees; rows, how many of the m queries each group has → (b, m, h, d).

    lengths (g,) int32: how many keys each group sees, counted through its pages; all unless given. A step has
    two groups: the committed frame's queries see ring | itself, the window's see ring | sink | window.
    """
    out, size = [], keys.shape[2]
    for group, queries in enumerate(q.split(rows, 1)):
        length = size * pages.shape[1] if lengths is None else int(lengths[group])
        slots = pages[group, : -(-length // size)]
        seen = (buffer.index_select(1, slots).flatten(1, 2)[:, :length] for buffer in (keys, values))
        part = (x.transpose(1, 2) for x in (queries, *seen))
        out.append(F.scaled_dot_product_attention(*part).transpose(1, 2))
    return torch.cat(out, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + d / 2]) of x (..., d) by angles, given as cos and sin (..., d / 2),
    which are broadcast.
    """
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
