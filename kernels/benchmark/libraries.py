"""Attention of libraries, all with one signature, with which the project's own is compared."""

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
    """The attention of this name. `cudnn`, `flash` (FlashAttention 2): backends of PyTorch's SDPA; `sdpa`:
    PyTorch's own choice, which on Hopper is a slow one; `varlen`: FlashAttention 2 as peers call it; `flex`:
    FlexAttention, compiled.
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
    from torch.nn.attention.varlen import varlen_attn  # missing in some versions of PyTorch

    if len(q) != 1:
        raise ValueError(f"one sequence at a time, not {len(q)}")
    ends = _ends(q.shape[1], q.device), _ends(k.shape[1], q.device)
    return varlen_attn(q[0], k[0], v[0], *ends, q.shape[1], k.shape[1])[None]


@functools.lru_cache(maxsize=64)
def _ends(count: int, device: torch.device) -> Tensor:
    """Begin and end of the only sequence; cached, as making it waits for the device."""
    return torch.tensor([0, count], dtype=torch.int32, device=device)


def _flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each shape is compiled, and the number of compiled ones is limited
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
