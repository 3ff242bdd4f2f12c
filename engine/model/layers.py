"""The transformer's parts; the only file that imports the kernels."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.kernels import (
    choose,
    gate_residual_norm_modulate,
    masked_attention,
    modulated_norm,
    qknorm_rope,
    qknorm_rope_write,
    rotate,
    window_attention,
)

from ..config import UserError
from .kv_cache import KVSlots


def choose_kernels(name: str) -> None:
    """Sets which kernels run: auto, reference or triton (kernels/dispatch.py). Raises UserError for another
    name, and for triton where that is not installed.
    """
    try:
        choose(name)
    except ValueError as error:
        raise UserError(f"{error}.") from None


class AttentionContext(Protocol):
    """What a pass attends to besides itself: KVCache, KVRecorder or KVContext (kv_cache.py)."""

    def kv_slots(self, layer: int) -> KVSlots | None:
        """Where a layer's keys and values are written in place, and what it attends to; None without
        slots.
        """
        ...

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Without slots: the pass's own keys and values (b, n, h, d) → all that it attends to, its own ones
        last, (b, m, h, d) each.
        """
        ...


class Positions(nn.Module):
    """RoPE over (t, y, x): half of the pairs rotate with time, a quarter each with the token's row and
    column.

    Angles are computed in double precision for the given frames; there is no table, and so no last frame.
    """

    def __init__(self, head_dim: int, rows: int, columns: int):
        super().__init__()
        pairs = head_dim // 2
        self.time_pairs = pairs - 2 * (pairs // 4)
        time = torch.logspace(0, -2, self.time_pairs, dtype=torch.float64)  # 1 … 1/100 radians a frame
        place = torch.logspace(0, -1, pairs // 4, dtype=torch.float64) * (math.pi / max(rows, columns))
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        grid = torch.stack([y, x], -1).reshape(-1, 2).double()
        grid = torch.cat(
            [grid.new_full((1, 2), -1.0), grid]
        )  # the condition token stands outside of the picture
        angles = (grid[:, :, None] * place).flatten(1)  # (n, 2 · pairs/4)
        self.register_buffer("time", time, persistent=False)
        self.register_buffer("place", angles, persistent=False)

    def forward(self, frame: Tensor | int, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (count · n, pairs), of frames frame … frame + count - 1."""
        index = frame + torch.arange(count, device=self.time.device, dtype=torch.float64)
        turn = (index[:, None] * self.time)[:, None].expand(-1, len(self.place), -1)
        angles = torch.cat([turn, self.place.expand(count, -1, -1)], -1).flatten(0, 1)
        return angles.cos().float(), angles.sin().float()

    def shift(self, keys: Tensor, frames: Tensor | int) -> Tensor:
        """Rotated keys (..., d) → the same keys `frames` frames later (earlier where negative)."""
        turn = frames * self.time
        angles = torch.cat([turn, turn.new_zeros(self.place.shape[1])])
        return rotate(keys, angles.cos(), angles.sin())


class Attention(nn.Module):
    """Multi-head attention of a pass to its memory and itself, with normalised queries and keys."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_weight = nn.Parameter(torch.ones(head_dim))
        self.k_weight = nn.Parameter(torch.ones(head_dim))

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        memory: AttentionContext,
        layer: int,
        mask: Tensor | None,
    ) -> Tensor:
        """x (b, n, d), angles: cos and sin (n, head_dim / 2), mask (n, m) added to the scores → (b, n, d)."""
        qkv, weights, slots = self.qkv(x), (self.q_weight, self.k_weight), memory.kv_slots(layer)
        if slots is None:
            q, k, v = qknorm_rope(qkv, *weights, *angles)  # (b, n, h, d)
            seen = memory.extend(layer, k, v)
            y = masked_attention(*(z.transpose(1, 2) for z in (q, *seen)), mask).transpose(1, 2)
        else:
            q = qknorm_rope_write(qkv, *weights, *angles, slots.keys, slots.values, slots.slots)
            y = window_attention(q, slots.keys, slots.values, slots.pages, slots.rows, slots.lengths)
        return self.out(y.flatten(2))


class Condition(NamedTuple):
    """How the condition of each frame modulates a layer, each (b, t, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class DiTLayer(nn.Module):
    """Attention and MLP, each normalised, scaled, shifted and gated by the frame's condition (Peebles & Xie,
    2023).
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)
        self.table = nn.Parameter(torch.zeros(6 * width))  # this layer's own share of the modulation

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        condition: Condition,
        following: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        memory: AttentionContext,
        layer: int,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x (b, t, n, d); y, the same normalised and modulated for this layer; `following`: scale and shift
        (b, t, d) of the norm after this layer; angles, memory and mask as in Attention → x and y for the next
        layer. Each residual is computed in one pass with the norm that comes after it.
        """
        y = self.attention(y.flatten(1, 2), angles, memory, layer, mask).view_as(x)
        x, y = gate_residual_norm_modulate(x, y, condition.gate, condition.scale_mlp, condition.shift_mlp)
        y = self.mlp_out(F.silu(self.mlp_in(y)))
        return gate_residual_norm_modulate(x, y, condition.gate_mlp, *following)


class ConvLayer(nn.Module):
    """x + convolutions(x) at the latents' resolution, normalised over channels, scaled and shifted by the
    frame's condition.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.condition = nn.Linear(width, 2 * channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        for zero in (self.condition, self.second):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (b · t, f, y, x), channels last in memory, condition (b, t, d) → like x."""
        scale, shift = self.condition(condition).chunk(2, -1)
        rows = rearrange(x, "(b t) f y x -> b t (y x) f", b=len(condition))
        y = modulated_norm(rows, scale, shift).view_as(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.second(F.silu(self.first(F.silu(y))))


class SigmaEncoder(nn.Module):
    """Noise levels (b, t) in [0, 1] → conditioning (b, t, d), through sines of geometric frequencies."""

    def __init__(self, width: int, frequencies: int = 32):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 2, frequencies) * math.pi / 2, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma[..., None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))
