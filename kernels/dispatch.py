"""Which implementation of an operation runs: the definition, or Triton's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .reference import gate_residual_norm_modulate as defined

HAS_TRITON = importlib.util.find_spec("triton") is not None
CHOICES = ("auto", "reference", "triton")
_chosen = "auto"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within it: `auto` takes Triton on GPUs, `reference` the definitions everywhere, `triton` Triton
    everywhere (on CPUs its interpreter, for tests).
    """
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"kernels must be one of {', '.join(CHOICES)}, not {name!r}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("kernels=triton needs Triton, which is not installed")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As in reference.py; in Triton in one pass."""
    if _takes_triton(x):
        # imported where it is needed, as importing Triton takes a while
        from .norm import gate_residual_norm_modulate as fused

        return fused(x, y, gate, scale, shift, eps)
    return defined(x, y, gate, scale, shift, eps)


def _takes_triton(x: Tensor) -> bool:
    return _chosen == "triton" or (_chosen == "auto" and x.is_cuda and HAS_TRITON)
