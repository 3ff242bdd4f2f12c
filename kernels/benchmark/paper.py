"""The paper's step at its own size, without its weights: Wan2.1-1.3B's widths under Rolling Forcing.

Two loops run it: the reference's, as its paper describes it (peerloop.py), and the project's (ourloop.py).
Both take the same weights, past and noise, which are defined here, and give the same frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (0.5556, 0.7692, 0.8824, 0.9524, 1.0)  # noise of the window's blocks, oldest first


@dataclass(frozen=True)
class Shape:
    """Sizes of the network and of its window, in frames unless stated otherwise."""

    heads: int = 12
    dim: int = 128
    layers: int = 30
    hidden: int = 8960
    rows: int = 30
    columns: int = 52
    text: int = 512  # tokens
    channels: int = 64  # channels of a token's patch
    block: int = 3  # frames that leave, and enter, at once
    blocks: int = len(LEVELS)  # blocks in the window
    sink: int = 3
    recent: int = 3  # clean frames that the window sees
    kept: int = 21  # clean frames that a committed block sees, itself included
    first: int = 27  # index of the window's first frame at the start

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def window(self) -> int:
        return self.block * self.blocks

    def flops(self) -> float:
        """Floating-point operations of one step: matrix products for the tokens of window and commit, and
        attention (2 for each multiplication; norms and the like are not counted).
        """
        c, n = self.width, self.tokens
        per_token = 2 * (6 * c * c + 2 * c * self.hidden) + 4 * self.text * c
        seen = self.window * (self.sink + self.recent + self.window) + self.block * self.kept
        ends = 2 * 2 * c * self.channels * n * (self.window + self.block)
        return self.layers * (per_token * n * (self.window + self.block) + 4 * n * n * seen * c) + ends


TOY = Shape(2, 32, 2, 96, rows=2, columns=3, text=5, channels=8)


@dataclass
class Layer:
    """One layer's weights; matrices (out, in) are paired with their biases."""

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    q_weight: Tensor  # of the norm over all heads
    k_weight: Tensor
    cross_norm: tuple[Tensor, Tensor]
    cross_q: tuple[Tensor, Tensor]
    cross_weight: Tensor
    cross_out: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]  # the prompt's keys and values (1, text, h, d), which never change
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    table: Tensor  # (6, c): shift, scale and gate of attention, then of the MLP


@dataclass
class Weights:
    """Random weights from a seed, and the past and the noise for the loops."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = torch.Generator(self.device).manual_seed(1)
        s, c = self.shape, self.shape.width
        self.patch_in, self.time_in = self._linear(s.channels, c), self._linear(256, c)
        self.time_out, self.time_parts = self._linear(c, c), self._linear(c, 6 * c)
        self.head, self.head_table = self._linear(c, s.channels), self._normal(2, c, scale=0.1)
        self.layers = [self._layer() for _ in range(s.layers)]

    def _layer(self) -> Layer:
        s, c = self.shape, self.shape.width
        square = [self._linear(c, c) for _ in range(6)]
        norms = [1 + self._normal(c, scale=0.1) for _ in range(4)]
        text = tuple(self._normal(1, s.text, s.heads, s.dim) for _ in range(2))
        shift, up, down = self._normal(c, scale=0.1), self._linear(c, s.hidden), self._linear(s.hidden, c)
        table = self._normal(6, c, scale=0.3)
        q, k, v, out, cross_q, cross_out = square
        cross_norm = norms[2], shift
        own = q, k, v, out, norms[0], norms[1]
        return Layer(*own, cross_norm, cross_q, norms[3], cross_out, text, up, down, table)

    def _linear(self, wide: int, out: int) -> tuple[Tensor, Tensor]:
        return self._normal(out, wide, scale=wide**-0.5), self._normal(out, scale=0.02)

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.draw, device=self.device, dtype=self.dtype)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys, not rotated, and values of the frames before the window: the sink, then the `kept` frames
        before the block to be committed (1, (sink + kept) · n, h, d). The same at each call.
        """
        s = self.shape
        draw = torch.Generator(self.device).manual_seed(1000 + layer)
        shape = 1, (s.sink + s.kept) * s.tokens, s.heads, s.dim
        made = (torch.randn(shape, generator=draw, device=self.device, dtype=self.dtype) for _ in range(2))
        keys, values = made
        return keys, values

    def start(self) -> tuple[Tensor, Tensor]:
        """The block to be committed (block, n, channels) and the window, noised (window, n, channels)."""
        s = self.shape
        draw = torch.Generator(self.device).manual_seed(2)
        shape = s.block + s.window, s.tokens, s.channels
        made = torch.randn(shape, generator=draw, device=self.device, dtype=self.dtype)
        return made[: s.block], made[s.block :]

    def noise(self) -> Iterator[Tensor]:
        """For each step, the noise of the next window (window, n, channels)."""
        s = self.shape
        draw = torch.Generator(self.device).manual_seed(3)
        while True:
            yield torch.randn(
                s.window, s.tokens, s.channels, generator=draw, device=self.device, dtype=self.dtype
            )

    def levels(self) -> Tensor:
        """sigma of each frame of the window, float64 (window,)."""
        of_blocks = torch.tensor(LEVELS, dtype=torch.float64, device=self.device)
        return of_blocks.repeat_interleave(self.shape.block)

    def condition(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma (t,) → the frames' conditions (t, c) and their share of each layer's modulation (t, 6, c)."""
        rate = torch.exp(-math.log(10000) * torch.arange(128, device=self.device, dtype=torch.float64) / 128)
        angle = 1000 * sigma.double()[:, None] * rate
        wave = torch.cat([angle.cos(), angle.sin()], 1).to(self.dtype)
        made = F.linear(F.silu(F.linear(wave, *self.time_in)), *self.time_out)
        return made, F.linear(F.silu(made), *self.time_parts).unflatten(-1, (6, -1))


def frequencies(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Radians for each frame, row and column, float64: of 64 pairs 22, 21 and 21 rotate with them."""
    place = dim // 2 // 3
    counts = dim // 2 - 2 * place, place, place
    made = (10000 ** (-torch.arange(n, dtype=torch.float64) / n) for n in counts)
    time, row, column = made
    return time, row, column
