"""RollingWindow: the frames in flight, what is known of them, and their actions."""

from __future__ import annotations

import torch
from torch import Tensor


def bind(actions: Tensor, commit_position: int) -> tuple[Tensor, Tensor]:
    """The rule of late binding: actions (b, w, k) of a window's frames → what its positions show, and known
    (b, w).

    Positions up to the commit position show their own, final action; those behind it cannot know theirs yet
    and show the newest one, marked as not known.
    """
    position = torch.arange(actions.shape[1], device=actions.device)
    shown = actions[:, position.clamp_max(commit_position)]
    return shown, (position <= commit_position).to(actions.dtype).expand(actions.shape[:2])


class RollingWindow:
    """Clean estimates of W frames and their actions, oldest first; position 0 leaves next."""

    def __init__(
        self,
        batch: int,
        window: int,
        keys: int,
        shape: tuple[int, ...],
        commit_position: int,
        device: torch.device,
    ):
        self.commit_position = commit_position
        self.clean = torch.zeros(batch, window, *shape, device=device)  # (b, w, c, y, x)
        self.actions = torch.zeros(batch, window, keys, device=device)  # (b, w, k)

    def reset(self, action: Tensor) -> None:
        """Empties the window; `action` (b, k) is held in all its frames."""
        self.clean.zero_()
        self.actions.copy_(action[:, None].expand_as(self.actions))

    def bind(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The newest keys (b, k) enter at the commit position → shown actions (b, w, k) and known (b, w)."""
        self.actions[:, self.commit_position :] = action[:, None]
        return bind(self.actions, self.commit_position)

    def update(self, clean: Tensor) -> None:
        """Takes a pass's estimates (b, w, c, y, x) in place; gradients stay behind."""
        self.clean.copy_(clean.detach())

    def roll(self) -> None:
        """The oldest frame leaves; an empty one enters at the noisy end, where its content has no weight."""
        self.clean.copy_(self.clean.roll(-1, 1))
        self.actions.copy_(self.actions.roll(-1, 1))
