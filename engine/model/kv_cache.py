"""KVCache: keys and values of the past frames: a ring of the last `context_frames`, the sink (the first
frames, kept for ever), and room for the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DenoiserConfig


class KVSlots(NamedTuple):
    """Where a pass writes one layer's keys and values, and to which it attends (kernels/reference.py)."""

    keys: Tensor  # (b, s, n, h, d)
    values: Tensor  # (b, s, n, h, d)
    slots: Tensor  # (t,) int32: where the pass's frames go
    pages: Tensor  # (g, p) int32: slots that each group of rows sees
    rows: tuple[int, ...]  # how many queries each group has
    lengths: Tensor  # (g,) int32: how many keys each group sees


class KVCache:
    """One buffer (layers, 2, b, [ring | sink | window] slots, n, h, d), allocated once and written in place.

    Nothing is moved when the ring advances: positions are rotated into the keys, so their order in memory
    does not matter, and lists of slots say which group of queries sees which frames. Only the sink follows
    the window: its keys are stored as first written, and rotated to their place at each step.

    The last finished frame is committed by the next pass: its queries see the ring and itself, the window's
    queries see sink, ring and window. The ring has one slot more than `context_frames`, so that the committed
    frame still sees the oldest one, which the window no longer does.

    All that changes from frame to frame (index, slots, lists) is on the device, so that one CUDA graph can
    play every step.
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
        self.frame = torch.zeros((), dtype=torch.int64, device=device)  # index of the window's first frame
        self._back = torch.arange(1, self.context + 1, device=device)
        fixed = torch.arange(self.ring, slots, dtype=torch.int32, device=device)  # sink | window
        self.slots = torch.cat([fixed[:1], fixed[self.sink :]])  # of the committed frame, then the window's
        seen = self.context + len(fixed)
        self.pages = torch.zeros(2, seen, dtype=torch.int32, device=device)
        self.pages[0, : self.ring] = torch.arange(self.ring, dtype=torch.int32, device=device)
        self.pages[1, self.context :] = fixed
        window = torch.arange(self.window + 1, dtype=torch.int32, device=device)
        both = torch.stack([torch.full_like(window, self.ring), self.context + self.sink + window], 1)
        self.lengths = both * tokens  # [f]: of both groups, for a pass over f frames of the window
        self._pass: tuple[Tensor, Tensor, tuple[int, ...], Tensor] | None = None

    def state(self) -> dict[str, Tensor]:
        """The tensors that change from frame to frame, by name; not copied."""
        parts = ("buffer", "unrotated_sink", "frame", "slots", "pages")
        return {name: getattr(self, name) for name in parts}

    def reset(self) -> None:
        """Empties the cache in place."""
        self.buffer.zero_()
        self.frame.zero_()
        self._pass = None

    def plan_pass(self, frames: int, pending: bool) -> None:
        """Sets what the next pass writes and sees: the first `frames` frames of the window, preceded by the
        last finished frame if that is `pending`.
        """
        groups = slice(0 if pending else 1, 2 if frames else 1)
        rows = (self.tokens, frames * self.tokens)[groups]
        slots = self.slots[0 if pending else 1 : 1 + frames]
        self._pass = slots, self.pages[groups], rows, self.lengths[frames, groups]

    def kv_slots(self, layer: int) -> KVSlots | None:
        """A layer's slots for the pass that `plan_pass` set; None where gradients are enabled, as writing in
        place would break them.
        """
        if torch.is_grad_enabled():
            return None
        slots, *seen = self._pass
        return KVSlots(self.buffer[layer, 0], self.buffer[layer, 1], slots, *seen)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window's keys and values (b, m, h, d), with gradients → the same after those of ring and sink,
        (b, m', h, d) each.
        """
        pages = self.pages[1, : self.context + self.sink].long()
        past = self.buffer[layer].index_select(2, pages).flatten(2, 3)  # (2, b, m, h, d)
        return torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)

    def append(self) -> None:
        """Advances by one finished frame, which the next pass commits."""
        self.frame += 1
        self._advance_ring()

    def prefill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores one layer's keys and values of the start's frames (b, frames · n, h, d): of the first ones
        as the sink, of the last ones in the ring. Raises ValueError for fewer frames than sink and ring have.
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
        """To be called after `prefill` of all layers, with the number of the start's frames."""
        self.frame.fill_(frames)
        self._advance_ring()

    def place_sink(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Writes the sink's keys, rotated by `turn` from the position at which they were made."""
        if self.sink:
            self.buffer[:, 0, :, self.ring : self.ring + self.sink] = turn(self.unrotated_sink)

    def _advance_ring(self) -> None:
        """Sets the slot of the last finished frame, and those that the window sees, from the frame's
        index.
        """
        ring = (self.frame - self._back) % self.ring
        self.slots[:1] = ring[:1]
        self.pages[1, : self.context] = ring


class KVRecorder:
    """The memory of a pass over given frames, which attend to each other; stores each layer's keys and values
    in `layers`, (b, m, h, d) each.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def kv_slots(self, layer: int) -> None:
        """None: nothing is written in place."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((k, v))
        return k, v


class KVContext:
    """The memory of a window that attends to given keys and values, (b, m, h, d) each, one pair a layer."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers

    def kv_slots(self, layer: int) -> None:
        """None: nothing is written in place."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.layers[layer]
        return torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
