"""gate_residual_norm_modulate in Triton, in one pass over the tokens (definition: reference.py).

One program for each token reads x and y once and writes both results. Gate, scale and shift, one for each
frame, are read with strides, so that a layer's six parts of modulation need not be copied out of their
tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import DTYPES
from .reference import EPS

CHUNK = 16  # tokens whose gradients one program sums up


@triton.jit
def forward_kernel(
    X, Y, GATE, SCALE, SHIFT, SUM, OUT, MEAN, RSTD,
    tokens, stride_gate, stride_scale, stride_shift, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X, Y, SUM, OUT (rows, D) contiguous; GATE, SCALE, SHIFT (frames, D) with row strides `stride_*`; MEAN,
    RSTD (rows,). Row r belongs to frame r // tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    at = tl.arange(0, BLOCK)
    inside = at < D
    x = tl.load(X + row * D + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(Y + row * D + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + frame * stride_gate + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + gate * y).to(SUM.dtype.element_ty)
    tl.store(SUM + row * D + at, rounded, mask=inside)
    x = rounded.to(tl.float32)  # normalise the rounded sum, as the next layer reads that
    mean = tl.sum(x, 0) / D
    off = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(off * off, 0) / D + eps)
    scale = tl.load(SCALE + frame * stride_scale + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + frame * stride_shift + at, mask=inside, other=0.0).to(tl.float32)
    out = off * rstd * (1 + scale) + shift
    tl.store(OUT + row * D + at, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@triton.jit
def backward_kernel(
    Y, GATE, SCALE, SUM, MEAN, RSTD, D_SUM, D_OUT, D_X, D_Y, D_GATE, D_SCALE, D_SHIFT,
    tokens, stride_gate, stride_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of CHUNK tokens of a frame; those of gate, scale and shift are summed over the tokens
    (frames, chunks, D), float32. Without atomics, so that the same input gives the same bits.
    """
    frame, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < D
    gate = tl.load(GATE + frame * stride_gate + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + frame * stride_scale + at, mask=inside, other=0.0).to(tl.float32)
    d_gate = tl.zeros([BLOCK], tl.float32)
    d_scale = tl.zeros([BLOCK], tl.float32)
    d_shift = tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = chunk * CHUNK + i
        here = inside & (token < tokens)
        row = frame * tokens + tl.minimum(token, tokens - 1)
        place = row * D + at
        mean, rstd = tl.load(MEAN + row), tl.load(RSTD + row)
        normal = tl.where(
            here, (tl.load(SUM + place, mask=here, other=0.0).to(tl.float32) - mean) * rstd, 0.0
        )
        d_out = tl.load(D_OUT + place, mask=here, other=0.0).to(tl.float32)
        d_normal = d_out * (1 + scale)
        along = tl.sum(d_normal * normal, 0) / D
        d_x = rstd * (d_normal - tl.sum(d_normal, 0) / D - normal * along)
        d_x += tl.load(D_SUM + place, mask=here, other=0.0).to(tl.float32)
        y = tl.load(Y + place, mask=here, other=0.0).to(tl.float32)
        tl.store(D_X + place, d_x.to(D_X.dtype.element_ty), mask=here)
        tl.store(D_Y + place, (d_x * gate).to(D_Y.dtype.element_ty), mask=here)
        d_gate += tl.where(here, d_x * y, 0.0)
        d_scale += d_out * normal
        d_shift += d_out
    place = (frame * tl.num_programs(1) + chunk) * D + at
    tl.store(D_GATE + place, d_gate, mask=inside)
    tl.store(D_SCALE + place, d_scale, mask=inside)
    tl.store(D_SHIFT + place, d_shift, mask=inside)


@torch.library.custom_op("rollplay::gate_residual_norm_modulate", mutates_args=())
def fused(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the definition; also mean and 1 / standard deviation of each token (b, t, n), for the gradients."""
    b, t, n, d = x.shape
    x, y = x.contiguous(), y.contiguous()
    gate, scale, shift = (_rows(part) for part in (gate, scale, shift))
    kind = _widest(x, y, gate)
    added, out = torch.empty_like(x, dtype=kind), torch.empty_like(x, dtype=kind)
    mean, rstd = (x.new_empty(b, t, n, dtype=torch.float32) for _ in range(2))
    block = triton.next_power_of_2(d)
    forward_kernel[(b * t * n,)](
        x, y, gate, scale, shift, added, out, mean, rstd,
        n, gate.stride(0), scale.stride(0), shift.stride(0), EPS,
        D=d, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return added, out, mean, rstd


@fused.register_fake
def _(x, y, gate, scale, shift):
    small = x.new_empty(x.shape[:3], dtype=torch.float32)
    added = x.new_empty(x.shape, dtype=_widest(x, y, gate))
    return added, torch.empty_like(added), small, torch.empty_like(small)


@torch.library.custom_op("rollplay::gate_residual_norm_modulate_backward", mutates_args=())
def fused_backward(
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    added: Tensor,
    mean: Tensor,
    rstd: Tensor,
    d_added: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, scale and shift, from those of both results."""
    b, t, n, d = added.shape
    y, d_added, d_out = y.contiguous(), d_added.contiguous(), d_out.contiguous()
    chunks, block = triton.cdiv(n, CHUNK), triton.next_power_of_2(d)
    d_x, d_y = torch.empty_like(added), torch.empty_like(added)
    sums = added.new_empty(3, b * t, chunks, d, dtype=torch.float32)
    rows = _rows(gate), _rows(scale)
    backward_kernel[(b * t, chunks)](
        y, *rows, added, mean, rstd, d_added, d_out, d_x, d_y, *sums,
        n, rows[0].stride(0), rows[1].stride(0),
        D=d, BLOCK=block, CHUNK=CHUNK, num_warps=warps(block),
    )  # fmt: skip
    shared = sums.sum(2).view(3, b, t, d).to(gate.dtype)
    return d_x, d_y, shared[0].clone(), shared[1].clone(), shared[2].clone()


@fused_backward.register_fake
def _(y, gate, scale, added, mean, rstd, d_added, d_out):
    shared = gate.new_empty(gate.shape)
    return torch.empty_like(added), torch.empty_like(added), shared, shared.clone(), shared.clone()


def _keep(ctx, inputs, output) -> None:
    _, y, gate, scale, _ = inputs
    added, _, mean, rstd = output
    ctx.save_for_backward(y, gate, scale, added, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _back(ctx, d_added, d_out, d_mean, d_rstd):
    return fused_backward(*ctx.saved_tensors, d_added, d_out)


fused.register_autograd(_back, setup_context=_keep)


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """gate_residual_norm_modulate of reference.py, with gradients. Raises ValueError as `check` does."""
    check(x, y, gate, scale, shift)
    return fused(x, y, gate, scale, shift)[:2]


def check(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Raises ValueError for inputs that the kernel cannot take."""
    if x.ndim != 4 or y.shape != x.shape:
        raise ValueError(f"x and y must both be (b, t, n, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    per_frame = (x.shape[0], x.shape[1], x.shape[3])
    for name, part in (("gate", gate), ("scale", scale), ("shift", shift)):
        if part.shape != per_frame:
            raise ValueError(f"{name} must be (b, t, d) = {per_frame}, not {tuple(part.shape)}")
    for name, part in (("x", x), ("y", y), ("gate", gate), ("scale", scale), ("shift", shift)):
        if part.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, not {part.dtype}")
        if part.device != x.device:
            raise ValueError(f"{name} is on {part.device} and x on {x.device}")
    if not 1 <= x.shape[3] <= 8192 or not x.numel():
        raise ValueError(f"tokens must have 1 to 8192 channels and there must be some, not {tuple(x.shape)}")


def warps(block: int) -> int:
    """Warps for rows of `block` elements: eight elements a thread, at most eight warps."""
    return max(1, min(8, block // 256))


def _widest(x: Tensor, y: Tensor, gate: Tensor) -> torch.dtype:
    """The type of the results, by PyTorch's promotion."""
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)


def _rows(part: Tensor) -> Tensor:
    """(b, t, d) → (b · t, d), a view if frames are evenly spaced and channels contiguous."""
    part = part if part.stride(-1) == 1 else part.contiguous()
    return part.flatten(0, 1)
