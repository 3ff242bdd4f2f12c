"""The past as keys and values: the sink for ever, the recent frames as a ring, and room for the window behind
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class KVCache:
    """One buffer (layers, 2, b, heads, [sink | ring | window] tokens, head_dim), allocated once and written
    in place.

    A ring needs no unrolling, since attention does not care for the order of keys whose positions are rotated
    into them. Only the sink moves along with the window: it is kept as it was written and turned to its place
    each step. The count of frames stays on the host, so nothing here waits for a device.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        tokens: int,
        sink: int,
        recent: int,
        window: int,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.tokens, self.sink, self.recent = tokens, sink, recent
        shape = (layers, 2, batch, heads, (sink + recent + window) * tokens, head_dim)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.anchor = torch.zeros_like(
            self.buffer[:, 0, :, :, : sink * tokens]
        )  # the sink's keys as first written
        self.frames = 0  # committed so far
        self.first = 0  # token from which on a pass may look
        self.last: Tensor | None = None  # the last two committed frames (b, 2, c, y, x)
        self.held: Tensor | None = None  # the actions of the last few (b, m, k)

    def reset(self) -> None:
        """Forgets everything; no memory is given back or taken."""
        self.buffer.zero_()
        self.frames, self.last, self.held = 0, None, None

    def look(self, sink: bool) -> None:
        """Chooses what the next pass sees: sink | ring | itself, or ring | itself (as a commit does)."""
        self.first = 0 if sink else self.sink * self.tokens

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The pass's own keys and values (b, h, n, d) behind the remembered ones → both (b, h, m, d)."""
        past = (self.sink + self.recent) * self.tokens
        if torch.is_grad_enabled() and k.requires_grad:
            kept = self.buffer[layer, :, :, :, self.first : past]
            return torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        end = past + k.shape[2]
        self.buffer[layer, 0, :, :, past:end] = k
        self.buffer[layer, 1, :, :, past:end] = v
        kept = self.buffer[layer, :, :, :, self.first : end]
        return kept[0], kept[1]

    def push(self) -> None:
        """Takes the pass's first frame, which a commit has just written behind the ring, into the ring."""
        past, n = (self.sink + self.recent) * self.tokens, self.tokens
        slot = (self.sink + self.frames % self.recent) * n
        self.buffer[..., slot : slot + n, :] = self.buffer[..., past : past + n, :]
        self.frames += 1

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Takes the start frames' keys and values (b, h, frames · tokens, d): the first are the sink, the
        last the ring.
        """
        count, n = k.shape[2] // self.tokens, self.tokens
        if count < self.sink + self.recent:
            raise ValueError(f"a game starts from {self.sink + self.recent} frames or more, not {count}")
        self.anchor[layer] = k[:, :, : self.sink * n]
        for which, x in enumerate((k, v)):
            self.buffer[layer, which, :, :, : self.sink * n] = x[:, :, : self.sink * n]
            for frame in range(count - self.recent, count):
                slot = (self.sink + frame % self.recent) * n
                self.buffer[layer, which, :, :, slot : slot + n] = x[:, :, frame * n : (frame + 1) * n]
        self.frames = count

    def place_sink(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Writes the sink's keys turned from where they were made to where they belong now."""
        self.buffer[:, 0, :, :, : self.sink * self.tokens] = turn(self.anchor)


class Written:
    """A memory for a pass over given frames: each layer's keys and values are kept; they see each other."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.last: Tensor | None = None
        self.held: Tensor | None = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((k, v))
        return k, v


class Context:
    """A memory for a window over given frames: per layer the keys and values (b, h, m, d) it may look at."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], last: Tensor, held: Tensor):
        self.layers, self.last, self.held = layers, last, held

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.layers[layer]
        return torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
