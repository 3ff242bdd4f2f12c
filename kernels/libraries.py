"""Attention as libraries offer it, all with one signature: what the project's own is measured against, and
what runs instead where a GPU's table says that it is faster.
"""

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


def preferred(q: Tensor, rows: tuple[int, ...], lengths: Tensor | None) -> str | None:
    """The library that the tables of q's device prefer for these queries, if any. Libraries need to know on
    the host what is seen, so with lengths there is none.
    """
    if lengths is not None:
        return None
    from .attention import names, read_table  # which needs Triton, and the libraries do not

    case = {"head_dim": q.shape[3], "dtype": str(q.dtype).removeprefix("torch.")}
    for rule in (rule for name in names(q.device) for rule in read_table(name).get("libraries", ())):
        same = all(value in rule.get(key, [value]) for key, value in case.items())
        if same and max(rows) >= rule.get("rows", 0):
            return rule["provider"]
    return None


def over_pages(
    name: str, q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, rows: tuple[int, ...]
) -> Tensor:
    """window_attention (reference.py) by a library: pages are gathered, and each group is a call."""
    attend, made = library(name), []
    for group, queries in enumerate(q.split(rows, 1)):
        seen = (buffer.index_select(1, pages[group]).flatten(1, 2) for buffer in (keys, values))
        made.append(attend(queries, *seen))
    return torch.cat(made, 1)


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
