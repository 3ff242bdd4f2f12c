"""StepGraph: a step of a game as CUDA graphs, so that the GPU does not wait for the host within a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Draw = Callable[[Tensor, bool], Tensor]

WARM_UP = 3  # eager steps before a capture, in which kernels are compiled and libraries choose plans


class StepGraph:
    """Two graphs of `draw(held, renoise)`, with `renoise` False and True (Rollout.step).

    draw takes keys (1, k) on the device and returns a frame on the device. Its memory must not move between
    calls, and its course on the host may depend on `renoise` alone. Frames are copied to the host through
    pinned memory; the host waits for that copy only.
    """

    def __init__(self, draw: Draw, keys: int, device: torch.device):
        self._draw = draw
        self._held = torch.zeros(1, keys, device=device)
        self._given = torch.zeros(1, keys, pin_memory=True)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._frames: dict[bool, Tensor] = {}
        self._shown: Tensor | None = None
        self._done = torch.cuda.Event()

    def capture(self) -> None:
        """Plays a few steps and captures both graphs. This changes the game: reset it afterwards."""
        side = torch.cuda.Stream()
        pool = torch.cuda.graph_pool_handle()
        for renoise in (False, True):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._draw(self._held, renoise)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                frame = self._draw(self._held, renoise)
            self._graphs[renoise], self._frames[renoise] = graph, frame
            self._shown = torch.empty(frame.shape, dtype=frame.dtype, pin_memory=True)

    @property
    def captured(self) -> bool:
        """Whether `capture` is done, so that steps can be played."""
        return bool(self._graphs)

    def __call__(self, action: np.ndarray, renoise: bool) -> np.ndarray:
        """Plays one frame under the keys `action` (k,) → the frame that draw returns, on the host."""
        self._given[0] = torch.from_numpy(np.asarray(action, np.float32))
        self._held.copy_(self._given, non_blocking=True)
        self._graphs[renoise].replay()
        self._shown.copy_(self._frames[renoise], non_blocking=True)
        self._done.record()
        self._done.synchronize()
        return self._shown.numpy().copy()
