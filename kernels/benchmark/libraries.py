"""Attention as libraries offer it, all with one signature: what the project's own is measured against."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (b, m, h, d), k and v (b, n, h, d) → (b, m, h, d)
NAMES = ("cudnn", "flash", "varlen", "flex")


def library(name: str) -> Attend:
    """`cudnn` and `flash` (FlashAttention 2) are backends of PyTorch's SDPA and named, as its own choice on
    Hopper is the slow one; `varlen` is FlashAttention 2 as the peers call it; `flex` is FlexAttention,
    compiled; `sdpa` leaves the choice to PyTorch.
    """
    made = {
        "sdpa": lambda: _sdpa,
        "cudnn": lambda: functools.partial(_backend, SDPBackend.CUDNN_ATTENTION),
        "flash": lambda: functools.partial(_backend, SDPBackend.FLASH_ATTENTION),
        "varlen": lambda: _varlen,
        "flex": _flex,
    }
    if name not in made:
        raise ValueError(f"there is no attention {name!r}; choose one of {', '.join(made)}")
    return made[name]()


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(q, k, v)


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not in every PyTorch that there is

    if len(q) != 1:
        raise ValueError(f"one sequence at a time, not {len(q)}")
    ends = _ends(q.shape[1], q.device), _ends(k.shape[1], q.device)
    return varlen_attn(q[0], k[0], v[0], *ends, q.shape[1], k.shape[1])[None]


@functools.lru_cache(maxsize=64)
def _ends(count: int, device: torch.device) -> Tensor:
    """Where the one sequence begins and ends; kept, since making it anew would wait for the device."""
    return torch.tensor([0, count], dtype=torch.int32, device=device)


def _flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each shape is compiled for itself, and there is a limit to how many are kept
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
