"""qknorm_rope and qknorm_rope_write in Triton (definition: reference.py; kernels: rope_triton.py).

Each number is read once and written once: 6 · h · d numbers a token, besides the rotation's cosines and
sines.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .dispatch import DTYPES
from .reference import EPS
from .rope_triton import backward_kernel, forward_kernel

CHUNK = 16  # tokens over which one program sums the gradients of the weights


@torch.library.custom_op("rollplay::qknorm_rope", mutates_args=())
def fused(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition."""
    b, m, width = qkv.shape
    d = 2 * cos.shape[1]
    q, k, v = (qkv.new_empty(b, m, width // 3 // d, d) for _ in range(3))
    slots = torch.zeros(1, dtype=torch.int32, device=qkv.device)  # one slot with room for all tokens
    _launch(qkv, q_weight, k_weight, cos, sin, slots, q, k[:, None], v[:, None], rms)
    return q, k, v


@fused.register_fake
def _(qkv, q_weight, k_weight, cos, sin, rms):
    b, m, width = qkv.shape
    d = 2 * cos.shape[1]
    return tuple(qkv.new_empty(b, m, width // 3 // d, d) for _ in range(3))


@torch.library.custom_op("rollplay::qknorm_rope_write", mutates_args=("keys", "values"))
def fused_write(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rms: bool,
) -> Tensor:
    """As the definition."""
    q = qkv.new_empty(*qkv.shape[:2], *keys.shape[3:])
    _launch(qkv, q_weight, k_weight, cos, sin, slots, q, keys, values, rms)
    return q


@fused_write.register_fake
def _(qkv, q_weight, k_weight, cos, sin, keys, values, slots, rms):
    return qkv.new_empty(*qkv.shape[:2], *keys.shape[3:])


@torch.library.custom_op("rollplay::qknorm_rope_backward", mutates_args=())
def fused_backward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and of both weights, from those of q, k and v."""
    b, m, width = qkv.shape
    d, over, qkv = 2 * cos.shape[1], q_weight.shape[0], _rows(qkv)
    sizes, warps = blocks(width // 3 // d, d, over)
    chunks, groups = triton.cdiv(m, CHUNK), triton.cdiv(width // 3 // d, sizes["H"])
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = qkv.new_empty(b * chunks, 2, width // 3, dtype=torch.float32)
    backward_kernel[(chunks, groups, b)](
        qkv, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
        d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), d_qkv, sums,
        m, qkv.stride(0), qkv.stride(1), EPS,
        heads=width // 3 // d, D=d, OVER=over, RMS=rms, CHUNK=CHUNK, num_warps=warps, **sizes,
    )  # fmt: skip
    of_q, of_k = sums.sum(0).unflatten(-1, (-1, over)).sum(1).unbind(0)
    return d_qkv, of_q.to(q_weight.dtype, copy=True), of_k.to(k_weight.dtype, copy=True)


@fused_backward.register_fake
def _(qkv, q_weight, k_weight, cos, sin, d_q, d_k, d_v, rms):
    return qkv.new_empty(qkv.shape), torch.empty_like(q_weight), torch.empty_like(k_weight)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.rms = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx, d_q, d_k, d_v):
    return (*fused_backward(*ctx.saved_tensors, d_q, d_k, d_v, ctx.rms), None, None, None)


fused.register_autograd(_back, setup_context=_keep)


def qknorm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """qknorm_rope of reference.py, with gradients, but none for cos and sin. Raises ValueError as `check`
    does.
    """
    check(qkv, q_weight, k_weight, cos, sin)
    return fused(qkv, q_weight, k_weight, cos, sin, rms)


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
    """qknorm_rope_write of reference.py, without gradients, as it writes in place; qknorm_rope has them.
    Raises ValueError as `check` and `check_slots` do.
    """
    check(qkv, q_weight, k_weight, cos, sin)
    check_slots(qkv, 2 * cos.shape[1], keys, values, slots)
    given = (qkv, q_weight, k_weight, keys, values)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("qknorm_rope_write has no gradients; take qknorm_rope, or torch.no_grad()")
    return fused_write(qkv, q_weight, k_weight, cos, sin, keys, values, slots, rms)


def check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError for inputs that the kernel cannot take."""
    if cos.ndim != 2 or sin.shape != cos.shape or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must both be (m, d/2) float32, not {tuple(cos.shape)}, {cos.dtype}")
    d = 2 * cos.shape[1]
    if d not in (8, 16, 32, 64, 128, 256):
        raise ValueError(f"heads must have 8, 16, 32, 64, 128 or 256 channels, not {d}")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * d) or qkv.shape[1] != len(cos) or not qkv.numel():
        raise ValueError(f"qkv must be (b, {len(cos)}, 3 h {d}) and not empty, not {tuple(qkv.shape)}")
    if q_weight.shape != k_weight.shape or q_weight.shape not in ((d,), (qkv.shape[2] // 3,)):
        said = f"{tuple(q_weight.shape)} and {tuple(k_weight.shape)}"
        raise ValueError(f"weights must both be ({d},) or ({qkv.shape[2] // 3},), not {said}")
    if qkv.shape[2] // 3 > 8192:
        raise ValueError(f"a token may have 8192 channels at most, not {qkv.shape[2] // 3}")
    for name, x in (("qkv", qkv), ("q_weight", q_weight), ("k_weight", k_weight)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, not {x.dtype}")
    for name, x in (("q_weight", q_weight), ("k_weight", k_weight), ("cos", cos), ("sin", sin)):
        if x.device != qkv.device:
            raise ValueError(f"{name} is on {x.device} and qkv on {qkv.device}")


def check_slots(qkv: Tensor, d: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Raises ValueError for buffers that the kernel cannot write to."""
    heads = qkv.shape[2] // 3 // d
    for name, x in (("keys", keys), ("values", values)):
        if x.ndim != 5 or x.shape[0] != len(qkv) or x.shape[3:] != (heads, d):
            raise ValueError(f"{name} must be ({len(qkv)}, s, n, {heads}, {d}), not {tuple(x.shape)}")
        if not x[0].is_contiguous():
            raise ValueError(f"the slots of {name} must lie densely in memory, not at strides {x.stride()}")
        if x.dtype not in DTYPES or x.device != qkv.device:
            raise ValueError(f"{name} must be floating and on {qkv.device}, not {x.dtype} on {x.device}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError("keys and values must be of one shape and type")
    if slots.dtype != torch.int32 or slots.ndim != 1 or slots.device != qkv.device:
        raise ValueError(f"slots must be (t,) int32 on {qkv.device}, not {slots.dtype} on {slots.device}")
    if len(slots) * keys.shape[2] != qkv.shape[1]:
        said = f"{len(slots)} slots of {keys.shape[2]} tokens"
        raise ValueError(f"{said} do not take {qkv.shape[1]} tokens")


def blocks(heads: int, d: int, over: int) -> tuple[dict[str, int], int]:
    """Block sizes of a program, and its warps. A program has all heads if they are normalised together, else
    as many as have about 512 numbers, for loads of 16 bytes.
    """
    count = triton.next_power_of_2(heads if over > d else min(heads, max(1, 512 // d)))
    half = triton.next_power_of_2(d // 2)
    return {"H": count, "HALF": half}, max(1, min(8, count * half // 256))


def _launch(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rms: bool,
) -> None:
    b, m, width = qkv.shape
    d, over, qkv = 2 * cos.shape[1], q_weight.shape[0], _rows(qkv)
    heads = width // 3 // d
    sizes, warps = blocks(heads, d, over)
    forward_kernel[(m, triton.cdiv(heads, sizes["H"]), b)](
        qkv, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), slots,
        q, keys, values,
        m, keys.shape[2], qkv.stride(0), qkv.stride(1), keys.stride(0), values.stride(0), EPS,
        heads=heads, D=d, OVER=over, RMS=rms, num_warps=warps, **sizes,
    )  # fmt: skip


def _rows(qkv: Tensor) -> Tensor:
    """qkv with contiguous channels."""
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()
