"""Which device, which precision: decided once, by measuring where that is asked, before a program begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch

from .config import UserError

LOGGER = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda", "mps")
AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def pick_device(name: str = "auto", local: int | None = None) -> torch.device:
    """auto takes CUDA where there is one; `local`: the number of this process's GPU where several train
    together. It becomes the calling thread's own, which streams, graphs and Triton take without being asked.
    Raises UserError where the device is not to be had.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in DEVICES or (device.type == "cuda" and not torch.cuda.is_available()):
            raise RuntimeError(f"no {device.type} here")
        if device.type == "cuda":
            if local is not None and device.index is not None:
                raise UserError(f"Each process takes a GPU of its own; give device=cuda instead of {name}.")
            device = torch.device("cuda", (device.index or 0) if local is None else local)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = f"The device {name!r} cannot be used here"
        if local:
            said += f" by process {local} of this machine (one GPU each)"
        raise UserError(f"{said}; try device=cpu.") from error
    if device.type == "mps":
        LOGGER.warning("device=mps is untested; where something fails or looks wrong, take device=cpu.")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """auto · fp32 · fp16 · bf16 · fp8 → one of the last four; AUTOCAST has their types.

    auto measures: bfloat16 is several times faster on GPUs and on CPUs with units for it (AMX, AVX512_BF16),
    and several times slower on CPUs without. On other devices auto is fp32. Raises UserError for fp8 on a GPU
    that has none.
    """
    if name == "auto" and device.type in ("cpu", "cuda"):
        plain, half = _matmul_seconds(device, (torch.float32, torch.bfloat16))
        name = "bf16" if half < 0.6 * plain else "fp32"
    elif name == "auto":
        name = "fp32"
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("precision=fp8 needs a GPU of compute capability 8.9 or more; try precision=bf16.")
    return name


def _matmul_seconds(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[float]:
    """Best of some matrix products in each type, by turns, so that other work on the machine hits all alike.
    They are as small as a transformer layer's at play, and on a GPU so large that it is not their launches
    that take the time.
    """
    side = 2048 if device.type == "cuda" else 256
    given = [[torch.ones(side, side, device=device, dtype=dtype) for _ in range(2)] for dtype in dtypes]
    best = [float("inf")] * len(dtypes)
    for _ in range(16):
        for number, (a, b) in enumerate(given):
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says; on a CPU torch has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A context in which torch computes with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, dtype: torch.dtype | None, cache: bool = True) -> torch.autocast:
    """A context in which matrix products run in `dtype`; `cache` keeps weights that it casts."""
    chosen = dtype or torch.bfloat16
    return torch.autocast(device.type, chosen, enabled=dtype is not None, cache_enabled=cache)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What keys and values are kept in: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def exact(method: Callable) -> Callable:
    """A module's method that computes in float32 whatever autocast says around it: where a state adds up over
    a game, so would the rounding of every frame. The last argument is a tensor of the device.
    """

    @wraps(method)
    def computed(self, *given):
        with torch.autocast(given[-1].device.type, enabled=False):
            return method(self, *given)

    return computed
