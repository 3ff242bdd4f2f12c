"""Chooses for each operation between the definition in PyTorch and the kernel in Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .reference import gate_residual_norm_modulate as defined_gate
from .reference import qknorm_rope as defined_qkv
from .reference import qknorm_rope_write as defined_write
from .reference import window_attention as defined_attention

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # types that the Triton kernels take
HEAD_DIMS = (16, 32, 64, 128)  # channels of a head that attention in Triton takes
CHOICES = ("auto", "reference", "triton")
_chosen = "auto"


def choose(name: str) -> None:
    """Sets what runs from now on: `auto`, Triton on GPUs where it fits; `reference`, the definitions;
    `triton`, Triton everywhere (on CPUs its interpreter, for tests). Raises ValueError for another name, or
    without Triton.
    """
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"kernels must be one of {', '.join(CHOICES)}, not {name!r}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("kernels=triton needs Triton, which is not installed")
    _chosen = name


@contextmanager
def use(name: str) -> Iterator[None]:
    """A context in which `choose(name)` is in force."""
    before = _chosen
    choose(name)
    try:
        yield
    finally:
        choose(before)


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """As in reference.py; in Triton in one pass."""
    if takes_triton(x):
        # imported here, as importing Triton takes a while
        from .norm import gate_residual_norm_modulate as fused

        return fused(x, y, gate, scale, shift)
    return defined_gate(x, y, gate, scale, shift)


def qknorm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As in reference.py; in Triton in one pass."""
    if takes_triton(qkv, 2 * cos.shape[-1]):
        from .rope import qknorm_rope as fused

        return fused(qkv, q_weight, k_weight, cos, sin, rms)
    return defined_qkv(qkv, q_weight, k_weight, cos, sin, rms)


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
    """As in reference.py; in Triton in one pass that writes into the slots."""
    if takes_triton(qkv, 2 * cos.shape[-1]):
        from .rope import qknorm_rope_write as fused

        return fused(qkv, q_weight, k_weight, cos, sin, keys, values, slots, rms)
    return defined_write(qkv, q_weight, k_weight, cos, sin, keys, values, slots, rms)


def window_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rows: tuple[int, ...],
    lengths: Tensor | None = None,
) -> Tensor:
    """As in reference.py; in Triton without copying pages and without reading `lengths` on the host."""
    q = q.to(keys.dtype)  # the cache may have another type than autocast
    if takes_triton(q, q.shape[-1]):
        from .attention import window_attention as fused

        return fused(q, keys, values, pages, rows, lengths)
    return defined_attention(q, keys, values, pages, rows, lengths)


def takes_triton(x: Tensor, head_dim: int = 64) -> bool:
    """Whether the kernel in Triton runs: always if `triton` was chosen, which raises for what it cannot take;
    with `auto` on a GPU for types and head sizes that it takes.
    """
    fits = x.dtype in DTYPES and head_dim in HEAD_DIMS
    return _chosen == "triton" or (_chosen == "auto" and x.is_cuda and HAS_TRITON and fits)
