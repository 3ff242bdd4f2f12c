"""RollingWindow: the frames in flight and their actions."""

from __future__ import annotations

import torch
from torch import Tensor


class RollingWindow:
    """Clean estimates of W frames, oldest first; position 0 leaves next.

    Late binding: the newest keys stand in all its positions, as nobody knows yet which will be held when the
    later ones leave; a frame's action is final when it leaves.
    """

    def __init__(self, batch: int, window: int, shape: tuple[int, ...], device: torch.device):
        self.frames = window
        self.clean = torch.zeros(batch, window, *shape, device=device)  # (b, w, c, y, x)

    def reset(self) -> None:
        """Empties the window."""
        self.clean.zero_()

    def bind(self, action: Tensor) -> Tensor:
        """The newest keys (b, k) → actions (b, w, k) of the frames in flight."""
        return action[:, None].expand(-1, self.frames, -1)

    def update(self, clean: Tensor) -> None:
        """Takes a pass's estimates (b, w, c, y, x) in place; gradients stay behind."""
        self.clean.copy_(clean.detach())

    def roll(self) -> None:
        """The oldest frame leaves; an empty one enters at the noisy end, where its content has no weight."""
        self.clean.copy_(self.clean.roll(-1, 1))
