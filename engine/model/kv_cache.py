"""KVCache: the past as keys and values: the ring of the last `context_frames`, the sink (the first ones, for
ever), and room for the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DenoiserConfig


class KVSlots(NamedTuple):
    """Where a pass writes one layer's keys and values, and what it then looks at (kernels/reference.py)."""

    keys: Tensor  # (b, s, n, h, d)
    values: Tensor  # (b, s, n, h, d)
    slots: Tensor  # (t,) int32: where the pass's frames go
    pages: Tensor  # (g, p) int32: slots that each group of rows sees
    rows: tuple[int, ...]  # of each group
    lengths: Tensor  # (g,) int32: keys that each group sees


class KVCache:
    """One buffer (layers, 2, b, [ring | sink | window] slots, n, h, d), allocated once and written in place.

    Neither is a ring unrolled nor anything moved, since attention does not care for the order of keys whose
    positions are rotated into them: lists of slots tell who sees what. Only the sink moves along with the
    window: it is kept as it was written and turned to its place each step.

    The last finished frame is committed by the next pass: its rows see the ring and itself, the window's rows
    see sink, ring and window. The ring has room for one frame more than `context_frames`, so the committed
    frame still sees the oldest one, which the window no longer does.

    What changes with the frames (index, slots, lists) lies on the device: a captured step plays all frames.
    """

    def __init__(
        self, config: DenoiserConfig, tokens: int, batch: int, device: torch.device, dtype: torch.dtype
    ):
        c, heads = config, config.width // config.head_dim
        self.tokens, self.sink, self.context, self.window = (
            tokens,
            c.sink_frames,
            c.context_frames,
            c.window_frames,
        )
        self.ring = self.context + 1
        slots = self.ring + self.sink + self.window
        self.buffer = torch.zeros(
            c.layers, 2, batch, slots, tokens, heads, c.head_dim, device=device, dtype=dtype
        )
        self.unrotated_sink = torch.zeros_like(self.buffer[:, 0, :, : self.sink])  # keys as first written
        self.frame = torch.zeros((), dtype=torch.int64, device=device)  # index of the window's first
        self._back = torch.arange(1, self.context + 1, device=device)
        fixed = torch.arange(self.ring, slots, dtype=torch.int32, device=device)  # sink | window
        self.slots = torch.cat([fixed[:1], fixed[self.sink :]])  # of the committed frame, of the window's
        seen = self.context + len(fixed)
        self.pages = torch.zeros(2, seen, dtype=torch.int32, device=device)
        self.pages[0, : self.ring] = torch.arange(self.ring, dtype=torch.int32, device=device)
        self.pages[1, self.context :] = fixed
        window = torch.arange(self.window + 1, dtype=torch.int32, device=device)
        both = torch.stack([torch.full_like(window, self.ring), self.context + self.sink + window], 1)
        self.lengths = both * tokens  # of both groups for passes over 0 … w frames of the window
        self._pass: tuple[Tensor, Tensor, tuple[int, ...], Tensor] | None = None

    def state(self) -> dict[str, Tensor]:
        """What changes from frame to frame, by name."""
        parts = ("buffer", "unrotated_sink", "frame", "slots", "pages")
        return {name: getattr(self, name) for name in parts}

    def reset(self) -> None:
        """Forgets everything; no memory is given back or taken."""
        self.buffer.zero_()
        self.frame.zero_()
        self._pass = None

    def plan_pass(self, frames: int, pending: bool) -> None:
        """Chooses what the next pass writes and sees: `frames` of the window, in front of them the pending
        one where there is one.
        """
        groups = slice(0 if pending else 1, 2 if frames else 1)
        rows = (self.tokens, frames * self.tokens)[groups]
        slots = self.slots[0 if pending else 1 : 1 + frames]
        self._pass = slots, self.pages[groups], rows, self.lengths[frames, groups]

    def kv_slots(self, layer: int) -> KVSlots | None:
        """A layer's part of what `plan_pass` chose; None where gradients are wanted, which nothing written in
        place can have.
        """
        if torch.is_grad_enabled():
            return None
        slots, *seen = self._pass
        return KVSlots(self.buffer[layer, 0], self.buffer[layer, 1], slots, *seen)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window's own keys and values (b, m, h, d) with gradients, behind sink and ring → both."""
        pages = self.pages[1, : self.context + self.sink].long()
        kept = self.buffer[layer].index_select(2, pages).flatten(2, 3)  # (2, b, m, h, d)
        return torch.cat([kept[0], k], 1), torch.cat([kept[1], v], 1)

    def append(self) -> None:
        """A frame more is finished; the next pass commits it."""
        self.frame += 1
        self._advance_ring()

    def prefill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Takes the start frames' keys and values (b, frames · n, h, d): the first are the sink, the last the
        ring.
        """
        k, v = (x.unflatten(1, (-1, self.tokens)) for x in (k, v))
        count = k.shape[1]
        if count < self.sink + self.context:
            raise ValueError(f"a game starts from {self.sink + self.context} frames or more, not {count}")
        self.unrotated_sink[layer] = k[:, : self.sink]
        for buffer, x in zip(self.buffer[layer], (k, v), strict=True):
            buffer[:, self.ring : self.ring + self.sink] = x[:, : self.sink]
            for frame in range(count - self.context, count):
                buffer[:, frame % self.ring] = x[:, frame]

    def finish_prefill(self, frames: int) -> None:
        """After `prefill`: how many frames there were."""
        self.frame.fill_(frames)
        self._advance_ring()

    def place_sink(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Writes the sink's keys turned from where they were made to where they belong now."""
        if self.sink:
            self.buffer[:, 0, :, self.ring : self.ring + self.sink] = turn(self.unrotated_sink)

    def _advance_ring(self) -> None:
        """The ring by one frame: where the last one goes, and which ones the window sees."""
        ring = (self.frame - self._back) % self.ring
        self.slots[:1] = ring[:1]
        self.pages[1, : self.context] = ring


class KVRecorder:
    """A memory for a pass over given frames: each layer's keys and values are kept; they see each other."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def kv_slots(self, layer: int) -> None:
        """None of its own: what is written is kept as it comes."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((k, v))
        return k, v


class KVContext:
    """A memory for a window over given frames: per layer the keys and values (b, m, h, d) it may look at."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers

    def kv_slots(self, layer: int) -> None:
        """None: nothing is written."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.layers[layer]
        return torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
