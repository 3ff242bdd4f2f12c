"""The project's step at the paper's size: the three operations, a ring that never moves, one pass a step.

The finished block is committed in the next pass: its queries see the ring and itself, the window's queries
see sink, recent context and window. That gives the same as a second pass. Channels of q and k are permuted
within each head, so that rotated pairs are half a head apart instead of adjacent; scores do not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .. import reference
from .libraries import library
from .paper import Layer, Shape, Weights, frequencies
from .timing import capture


class OurLoop:
    """`start`, then one finished block (block, n, channels) a `step`.

    `attention`: `triton` (the operation itself, from pages) or a library's name. A library reads contiguous
    slots, in the order [older ring | committed | sink | window]: the committed block's queries see the first
    two parts, the window's the last three, and the committed block moves to the older ring before the next
    one.
    """

    def __init__(self, weights: Weights, ops, attention: str = "triton", kept: int = 0):
        s, device, dtype = weights.shape, weights.device, weights.dtype
        self.weights, self.shape, self.ops = weights, s, ops
        self.attend = None if attention == "triton" else library(attention)
        kept = kept or s.kept
        if s.recent != s.block or kept % s.block or kept < 2 * s.block:
            raise ValueError("the window sees one committed block, and a committed block one or more others")
        self.ring, self.frames = kept // s.block, s.block + s.window
        slots = kept + s.sink + s.window
        self.buffer = torch.zeros(s.layers, 2, 1, slots, s.tokens, s.heads, s.dim, device=device, dtype=dtype)
        self.anchor = torch.zeros_like(self.buffer[:, 0, :, kept : kept + s.sink])
        self.layers = [_merged(layer, s) for layer in weights.layers]
        self.sigma = weights.levels().to(torch.float32)[:, None, None]
        self._modulation()
        self._angles()
        self.first = torch.zeros((), dtype=torch.int64, device=device)
        self.latents = torch.zeros(self.frames, s.tokens, s.channels, device=device, dtype=dtype)
        self.noise = torch.zeros_like(self.latents[s.block :])
        self.done = torch.zeros_like(self.latents[: s.block])
        self._lists(kept)
        self.replay: Callable[[], None] | None = None

    def _modulation(self) -> None:
        """Computes each layer's modulation once, as noise levels never change: (layers, 6) tensors (1,
        t, c).
        """
        w, s = self.weights, self.shape
        sigma = torch.cat([torch.zeros(s.block, device=w.device), w.levels()])
        condition, parts = w.condition(sigma)
        self.parts = [(layer.table + parts).movedim(1, 0).contiguous()[:, None] for layer in w.layers]
        self.ends = (w.head_table + condition[:, None]).movedim(1, 0).contiguous()[:, None]
        one = torch.ones(1, 1, s.width, device=w.device, dtype=w.dtype)
        self.one = one.expand(1, self.frames, -1)

    def _angles(self) -> None:
        s, device = self.shape, self.weights.device
        time, row, column = frequencies(s.dim)
        y, x = torch.meshgrid(torch.arange(s.rows), torch.arange(s.columns), indexing="ij")
        place = torch.cat([y.reshape(-1, 1) * row, x.reshape(-1, 1) * column], 1)  # (n, pairs)
        self.time, self.place = time.to(device), place.to(device)

    def _lists(self, kept: int) -> None:
        """Sets the slots of a pass's frames (t,), and the pages of its two groups."""
        s, device = self.shape, self.weights.device
        self.within = torch.arange(s.block, dtype=torch.int32, device=device)
        window = torch.arange(kept + s.sink, kept + s.sink + s.window, dtype=torch.int32, device=device)
        self.slots = torch.cat([self.within, window])
        counts = kept, s.block + s.sink + s.window
        self.pages = torch.zeros(2, max(counts), dtype=torch.int32, device=device)
        self.pages[0, :kept] = torch.arange(kept, dtype=torch.int32, device=device)
        self.pages[1, s.block : counts[1]] = torch.arange(
            kept, kept + s.sink + s.window, dtype=torch.int32, device=device
        )
        lengths = [count * s.tokens for count in counts]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.rows = s.block * s.tokens, s.window * s.tokens

    @torch.no_grad()
    def start(self) -> None:
        """Starts from the common past; state is filled in place, as a captured graph needs it."""
        s, (pending, window) = self.shape, self.weights.start()
        kept, half = self.ring * s.block, _halves(s.dim)
        older = s.first - s.block - kept  # index of the first frame of the ring
        for layer in range(s.layers):
            k, v = self.weights.past(layer)
            k, v = (x.unflatten(1, (-1, s.tokens)) for x in (k[..., half], v))  # (1, frames, n, h, d)
            self.anchor[layer] = self._turned(k[:, : s.sink], 0)
            sink = slice(kept, kept + s.sink)
            self.buffer[layer, 0, :, sink], self.buffer[layer, 1, :, sink] = (
                self.anchor[layer],
                v[:, : s.sink],
            )
            turned = self._turned(k[:, -kept:], older)
            for number in range(self.ring):
                at = number * s.block
                to = self._slot(older // s.block + number) * s.block
                for buffer, x in ((self.buffer[layer, 0], turned), (self.buffer[layer, 1], v[:, -kept:])):
                    buffer[:, to : to + s.block] = x[:, at : at + s.block]
        self.latents[: s.block], self.latents[s.block :] = pending, window
        self.first.fill_(s.first)

    def _slot(self, block: int) -> int:
        """The place in the ring, at the start, of the block with this index; the newest one has just been
        committed.
        """
        if self.attend is None:
            return block % self.ring
        newest = self.shape.first // self.shape.block - 2
        return self.ring - 1 if block == newest else block % (self.ring - 1)

    def _turned(self, k: Tensor, first: int) -> Tensor:
        """k (1, t, n, h, d) rotated for frames from `first` on."""
        cos, sin = self._rotation(torch.arange(first, first + k.shape[1], device=k.device))
        return reference.rotate(k.flatten(1, 2).float(), cos[:, None], sin[:, None]).view_as(k).to(k.dtype)

    def _rotation(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 (t n, d / 2), of frames with these indices (t,)."""
        turn = (index[:, None] * self.time)[:, None].expand(-1, len(self.place), -1)
        angles = torch.cat([turn, self.place.expand(len(index), -1, -1)], -1).flatten(0, 1)
        return angles.cos().float(), angles.sin().float()

    @torch.no_grad()
    def step(self, noise: Tensor) -> Tensor:
        """`noise` (w, n, channels): of the next window → the finished block, overwritten by the next step."""
        self.noise.copy_(noise)
        if self.replay is None:
            self._step()
        else:
            self.replay()
        return self.done

    @torch.no_grad()
    def capture(self) -> bool:
        """Captures the step as one CUDA graph → whether that worked. Starts again from the common past."""
        self.replay = capture(self._step)
        self.start()
        return self.replay is not None

    def _step(self) -> None:
        s = self.shape
        self._place()
        flow = self._forward().float()
        noisy = self.latents[s.block :]
        clean = (noisy - self.sigma * flow).to(noisy.dtype)
        self.done.copy_(clean[: s.block])
        self.latents[: s.block] = self.done  # the next pass commits it
        lower = self.sigma[: -s.block].to(noisy.dtype)
        kept = (1 - lower) * clean[s.block :] + lower * self.noise[: -s.block]
        self.latents[s.block :] = torch.cat([kept, self.noise[-s.block :]])
        self.first += s.block

    def _place(self) -> None:
        """Sets the slots of this pass's block in the ring, and rotates the sink to the position right before
        it.
        """
        s, kept = self.shape, self.ring * self.shape.block
        block = self.first // s.block - 1  # the one that this pass commits
        if self.attend is None:
            slots = (block % self.ring * s.block + self.within).to(torch.int32)
            self.slots[: s.block] = slots
            self.pages[1, : s.block] = slots
        else:
            older = (block - 1) % (self.ring - 1) * s.block + self.within
            self.slots[: s.block] = kept - s.block + self.within
            self.buffer.index_copy_(3, older.long(), self.buffer[:, :, :, kept - s.block : kept].clone())
        turn = (self.first - s.recent - s.sink) * self.time
        cos, sin = turn.cos().float(), turn.sin().float()
        pairs, half = len(turn), s.dim // 2
        a, b = self.anchor[..., :pairs].float(), self.anchor[..., half : half + pairs].float()
        placed = self.buffer[:, 0, :, kept : kept + s.sink]
        placed[..., :pairs] = a * cos - b * sin
        placed[..., half : half + pairs] = a * sin + b * cos

    def _forward(self) -> Tensor:
        """Flow of the window (w, n, channels)."""
        w, s = self.weights, self.shape
        cos, sin = self._rotation(self.first - s.block + torch.arange(self.frames, device=w.device))
        x = F.linear(self.latents, *w.patch_in)[None]  # (1, t, n, c)
        y = reference.modulated_norm(x, self.parts[0][1], self.parts[0][0])
        ops = self.ops
        for number, layer in enumerate(self.layers):
            _, _, gate, shift, scale, gate_mlp = self.parts[number]
            last = number + 1 == len(self.layers)
            next_shift, next_scale = self.ends if last else self.parts[number + 1][:2]
            qkv = F.linear(y.flatten(1, 2), *layer["qkv"])
            keys, values = self.buffer[number].unbind(0)
            q = ops.qknorm_rope_write(qkv, *layer["norms"], cos, sin, keys, values, self.slots, rms=True)
            y = F.linear(self._attention(q, keys, values).flatten(2), *layer["out"]).view_as(x)
            x, y = ops.gate_residual_norm_modulate(x, y, gate, *layer["cross_norm"])
            y = self._cross(y.flatten(1, 2), layer["layer"]).view_as(x)
            x, y = ops.gate_residual_norm_modulate(x, y, self.one, scale, shift)
            y = F.gelu(F.linear(y, *layer["layer"].up), approximate="tanh")
            y = F.linear(y, *layer["layer"].down)
            x, y = ops.gate_residual_norm_modulate(x, y, gate_mlp, next_scale, next_shift)
        return F.linear(y[0, s.block :], *w.head)

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self.attend is None:
            return self.ops.window_attention(q, keys, values, self.pages, self.rows, self.lengths)
        s, kept = self.shape, self.ring * self.shape.block
        groups = slice(0, kept), slice(kept - s.block, None)
        made = []
        for queries, at in zip(q.split(self.rows, 1), groups, strict=True):
            made.append(self.attend(queries, keys[:, at].flatten(1, 2), values[:, at].flatten(1, 2)))
        return torch.cat(made, 1)

    def _cross(self, y: Tensor, layer: Layer) -> Tensor:
        q = F.rms_norm(F.linear(y, *layer.cross_q), y.shape[-1:], layer.cross_weight, eps=reference.EPS)
        q = q.unflatten(-1, (self.shape.heads, self.shape.dim))
        with sdpa_kernel(reference.BACKENDS, set_priority=True):
            made = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, *layer.text)))
        return F.linear(made.transpose(1, 2).flatten(2), *layer.cross_out)


def _halves(dim: int) -> Tensor:
    """Where each channel comes from: first the even ones of a head, then the odd ones."""
    return torch.arange(dim).view(-1, 2).T.flatten()


def _merged(layer: Layer, shape: Shape) -> dict:
    """A layer's weights as the operations take them."""
    order = (shape.dim * torch.arange(shape.heads)[:, None] + _halves(shape.dim)).flatten()
    order = order.to(layer.q_weight.device)
    parts = [x[order] for x in layer.q], [x[order] for x in layer.k], layer.v
    weight, bias = layer.cross_norm
    frames = shape.block + shape.window
    return {
        "qkv": tuple(torch.cat(x) for x in zip(*parts, strict=True)),
        "norms": (layer.q_weight[order], layer.k_weight[order]),
        "out": layer.out,
        "cross_norm": tuple(x.expand(1, frames, -1) for x in (weight - 1, bias)),
        "layer": layer,
    }
