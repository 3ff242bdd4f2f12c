"""Ranks: the processes that train a network together, as torchrun starts them, and what they exchange."""

from __future__ import annotations

import hashlib
import os
import warnings
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
    """This process among `count` of them. Rank 0, the first, prints, writes and decides. `local`: its number
    on this machine, None where it is the only process.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int | None = None):
        self.rank, self.count, self.local = rank, count, local
        self.first = rank == 0
        # gloo for numbers that the host reads in each step: NCCL would wait for the GPU
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None

    def agree(self, *values: float) -> list[float]:
        """The maximum of each value over all processes."""
        table = torch.tensor(values, dtype=torch.float64)
        if self._control is not None:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._control)
        return table.tolist()

    def firsts(self, *values: float) -> list[float]:
        """The first process's values, in every process."""
        table = torch.tensor(values, dtype=torch.float64)
        if self._control is not None:
            dist.broadcast(table, 0, group=self._control)
        return table.tolist()

    def summed(self, figures: dict[str, list[float]]) -> dict[str, list[float]]:
        """Sums over all processes of each figure's numbers; a process may lack some of the figures."""
        if self._control is None:
            return figures
        gathered: list = [None] * self.count
        dist.all_gather_object(gathered, figures, group=self._control)
        total: dict[str, list[float]] = {}
        for one in gathered:
            for name, values in one.items():
                old = total.get(name, [0.0] * len(values))
                total[name] = [a + b for a, b in zip(old, values, strict=True)]
        return total

    def same(self, weights: list[Tensor]) -> bool:
        """Whether the weights are the same in all processes, bit for bit."""
        if self.count == 1:
            return True
        digest = hashlib.sha256()
        for value in weights:
            digest.update(value.detach().cpu().numpy().tobytes())
        number = float(int.from_bytes(digest.digest()[:6], "big"))  # exact in a float64
        largest, smallest = self.agree(number, -number)
        return largest == -smallest

    def share(self, module: nn.Module) -> nn.Module:
        """The module wrapped so that gradients are averaged over all processes."""
        if self.count == 1:
            return module
        # not every iteration uses every weight; and each process has buffers of its own, like its games
        with warnings.catch_warnings():
            # of a new name, under which all would begin with the buffers of the first process
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)

    def apart(self, runner: nn.Module, last: bool) -> AbstractContextManager:
        """A context for the backward pass of one of several batches of a step: gradients are exchanged only
        with the `last` of them.
        """
        return nullcontext() if last or self.count == 1 else runner.no_sync()


def backend(device: str, has_cuda: bool) -> str:
    """The backend of torch.distributed that exchanges gradients, for the option `device=`."""
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
