"""ActionEncoder: held keys → conditioning tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ActionEncoder(nn.Module):
    """Multi-hot keys (b, t, k) and whether they are certain → one conditioning token a frame (b, t, d)."""

    def __init__(self, keys: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(keys + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, actions: Tensor, known: Tensor, dropped: Tensor | None = None) -> Tensor:
        """actions (b, t, k); known (b, t) 1 where the frame's action is final, 0 where the newest keys stand
        in for it; dropped (b, t) True where the token says nothing (for guidance) → (b, t, d).
        """
        tokens = self.mlp(torch.cat([actions, known[..., None]], -1))
        if dropped is None:
            return tokens
        return torch.where(dropped[..., None], self.null.to(tokens.dtype), tokens)
