"""The processes that train a network together, as torchrun starts them: who is who, what they agree on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, reason

PATIENCE = timedelta(days=7)  # a process may wait for another that collects, encodes or is paused


class Ranks:
    """This process among `count` of them, `rank` 0 being the first: the one that speaks and decides. `local`
    is its number on this machine, None where it is alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int | None = None):
        self.rank, self.count, self.local = rank, count, local
        self.first = rank == 0
        # for numbers that are read on the CPU in each step: NCCL would wait for the GPU
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes, the same on all of them."""
        told = torch.tensor(values, dtype=torch.float64)
        if self._control is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control)
        return told.tolist()

    def firsts(self, *values: float) -> list[float]:
        """The first process's values, on all of them."""
        told = torch.tensor(values, dtype=torch.float64)
        if self._control is not None:
            dist.broadcast(told, 0, group=self._control)
        return told.tolist()

    def summed(self, figures: dict[str, list[float]]) -> dict[str, list[float]]:
        """The figures of all processes, of which each may have others, added up."""
        if self._control is None:
            return figures
        told: list = [None] * self.count
        dist.all_gather_object(told, figures, group=self._control)
        total: dict[str, list[float]] = {}
        for one in told:
            for name, values in one.items():
                old = total.get(name, [0.0] * len(values))
                total[name] = [a + b for a, b in zip(old, values, strict=True)]
        return total

    def same(self, weights: list[Tensor]) -> bool:
        """Whether these are the same on all processes, bit for bit."""
        if self.count == 1:
            return True
        digest = hashlib.sha256()
        for value in weights:
            digest.update(value.detach().cpu().numpy().tobytes())
        number = float(int.from_bytes(digest.digest()[:6], "big"))  # exact in a float64
        largest, smallest = self.agree(number, -number)
        return largest == -smallest

    def share(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes."""
        if self.count == 1:
            return module
        # in turns some weights have no gradient; and buffers are each process's own, as its games are
        return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)

    def apart(self, runner: nn.Module, last: bool) -> AbstractContextManager:
        """A context in which gradients are only summed up here, but for the `last` batch before a step."""
        return nullcontext() if last or self.count == 1 else runner.no_sync()


def backend(device: str, has_cuda: bool) -> str:
    """What exchanges gradients for `device=`; what processes agree on never goes that way."""
    return "nccl" if has_cuda and (device == "auto" or device.startswith("cuda")) else "gloo"


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """The processes as torchrun describes them in the environment; alone without it."""
    try:
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", rank))
        if count > 1:
            dist.init_process_group(backend(device, torch.cuda.is_available()), timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        said = f"The processes that WORLD_SIZE and RANK tell of cannot be joined ({reason(error)})"
        raise UserError(f"{said}; start them with torchrun, or unset both for one alone.") from error
    if count == 1:
        yield Ranks()
        return
    try:
        yield Ranks(rank, count, local)
    finally:
        dist.destroy_process_group()
