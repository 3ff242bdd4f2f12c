"""Which device, which precision, how many threads: decided once by measuring, before a program starts its
work.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from .config import UserError


def pick_device(name: str = "auto") -> torch.device:
    """auto takes CUDA where there is one. Raises UserError where the named device is not to be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {name!r} cannot be used here; try device=cpu.") from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """auto · fp32 · bf16 → the dtype for autocast, None for plain float32.

    auto measures: bfloat16 is several times faster on GPUs and on CPUs with matrix units (AMX), and several
    times slower on CPUs without.
    """
    if name == "auto":
        name = (
            "bf16"
            if _matmul_seconds(device, torch.bfloat16) < 0.6 * _matmul_seconds(device, torch.float32)
            else "fp32"
        )
    return torch.bfloat16 if name == "bf16" else None


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Best of a few small matrix products, the shape of a transformer layer at play."""
    a, b = (torch.ones(s, s, device=device, dtype=dtype) for s in (256, 256))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def cast_weights(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Stores the weights of products and convolutions in `dtype`, lest autocast casts them each step."""
    for part in module.modules():
        if dtype and isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
