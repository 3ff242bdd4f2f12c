"""RollingWindow: the frames in flight and their actions."""

from __future__ import annotations

import torch
from torch import Tensor


class RollingWindow:
    """Clean estimates of the `window_frames` frames in flight, oldest first; position 0 leaves next.

    Late binding: all frames in flight get the newest keys, as it is not known which keys will be held when
    the later ones leave. A frame's action is final when it leaves.
    """

    def __init__(self, batch: int, window: int, shape: tuple[int, ...], device: torch.device):
        self.frames = window
        self.clean = torch.zeros(batch, window, *shape, device=device)  # (b, w, c, y, x)

    def reset(self) -> None:
        """Sets all estimates to zero."""
        self.clean.zero_()

    def bind(self, action: Tensor) -> Tensor:
        """The newest keys (b, k) → actions (b, w, k) of the frames in flight."""
        return action[:, None].expand(-1, self.frames, -1)

    def update(self, clean: Tensor) -> None:
        """Stores a pass's estimates (b, w, c, y, x) in place, detached."""
        self.clean.copy_(clean.detach())

    def roll(self) -> None:
        """Removes the oldest frame and appends one, whose content does not matter: its level is pure
        noise.
        """
        self.clean.copy_(self.clean.roll(-1, 1))
