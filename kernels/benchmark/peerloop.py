"""The reference loop of Rolling Forcing, emulated from a description of it, for comparison.

It does the same as the published loop at the same cost, but is written independently: rotations in complex
double precision; RMS norms from elementary operations for q and k; separate projections, modulation and
gates; indices and sizes read on the host in each layer; a cache shifted by cloning; a sink stored unrotated
and rotated in each pass; sink, recent keys and window concatenated for each attention; and a second pass over
the finished block, only to cache it. Where the description leaves a choice, the cheaper one is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import EPS
from .libraries import library
from .paper import Layer, Weights, frequencies

LONGEST = 1024  # frames that the table of rotations has


class PeerLoop:
    """`start`, then one finished block (block, n, channels) a `step`."""

    def __init__(self, weights: Weights, attention: str = "sdpa"):
        self.weights, self.shape, self.attend = weights, weights.shape, library(attention)
        s, device = self.shape, weights.device
        self.rotations = _table(s.dim).to(device)
        frames = s.sink + s.kept
        shape = s.layers, 1, frames * s.tokens, s.heads, s.dim
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=weights.dtype) for _ in range(2))
        # per layer: how many tokens were committed in all, and where those in the cache end
        self.total, self.end = (torch.zeros(s.layers, dtype=torch.int64, device=device) for _ in range(2))
        self.sigma = weights.levels()  # (w,)
        self.first = s.first
        self.window = torch.zeros(0)
        self.draw = torch.Generator(device)
        self.sink_grid = self._grid(s.sink)

    @torch.no_grad()
    def start(self) -> None:
        """Starts from the common past."""
        s, (pending, window) = self.shape, self.weights.start()
        grid = self._grid(s.kept)
        sink = s.sink * s.tokens
        for layer in range(s.layers):
            k, v = self.weights.past(layer)
            self.keys[layer, :, :sink] = k[:, :sink]  # as it came out of the norm
            self.keys[layer, :, sink:] = rotate(k[:, sink:], grid, self.rotations, s.first - s.block - s.kept)
            self.values[layer] = v
        self.total.fill_((s.first - s.block) * s.tokens)
        self.end.fill_((s.sink + s.kept) * s.tokens)
        self.first, self.window = s.first, window.clone()
        self._commit(pending, s.first - s.block)

    @torch.no_grad()
    def step(self, noise: Tensor) -> Tensor:
        """`noise` (w, n, channels): of the next window → the finished block."""
        s = self.shape
        flow = self._forward(self.window, self.sigma, self.first, commit=False)
        clean = (self.window.double() - self.sigma[:, None, None] * flow.double()).to(flow.dtype)
        done = clean[: s.block]
        noisy = torch.empty_like(clean)
        for block in range(1, s.blocks):
            torch.empty_like(clean).normal_(generator=self.draw)  # for the whole window, once a block of it
            lower = self.sigma[(block - 1) * s.block].to(clean.dtype)
            at = slice((block - 1) * s.block, block * s.block)
            noisy[at] = (1 - lower) * clean[block * s.block : (block + 1) * s.block] + lower * noise[at]
        noisy[-s.block :] = noise[-s.block :]
        self._commit(done, self.first)
        self.window, self.first = noisy, self.first + s.block
        return done

    def _commit(self, clean: Tensor, first: int) -> None:
        self._forward(clean, torch.zeros(len(clean), device=clean.device), first, commit=True)

    def _grid(self, frames: int) -> Tensor:
        """Numbers of frames, rows and columns of a pass, on the device, where the reference has them."""
        s = self.shape
        return torch.tensor([[frames, s.rows, s.columns]], device=self.weights.device)

    def _forward(self, latents: Tensor, sigma: Tensor, first: int, commit: bool) -> Tensor:
        """latents (t, n, channels) → flow (t, n, channels)."""
        w, t = self.weights, len(latents)
        grid = self._grid(t)
        x = F.linear(latents, *w.patch_in).flatten(0, 1)[None]  # (1, t n, c)
        condition, parts = w.condition(sigma)
        for number, layer in enumerate(w.layers):
            modulation = (layer.table + parts)[None].chunk(6, 2)  # six of (1, t, 1, c)
            x = self._layer(x, layer, number, modulation, grid, first, commit)
        shift, scale = (w.head_table + condition[:, None])[None].chunk(2, 2)
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), scale, shift)
        return F.linear(y, *w.head)[0].unflatten(0, (t, -1))

    def _layer(
        self,
        x: Tensor,
        layer: Layer,
        number: int,
        modulation: tuple[Tensor, ...],
        grid: Tensor,
        first: int,
        commit: bool,
    ) -> Tensor:
        width = x.shape[-1:]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        y = modulate(F.layer_norm(x, width, eps=EPS), scale, shift)
        y = self._attention(y, layer, number, grid, first, commit)
        x = x + gated(y, gate)
        y = F.layer_norm(x, width, *layer.cross_norm, eps=EPS)
        x = x + self._cross(y, layer)
        y = modulate(F.layer_norm(x, width, eps=EPS), scale_mlp, shift_mlp)
        y = F.linear(F.gelu(F.linear(y, *layer.up), approximate="tanh"), *layer.down)
        return x + gated(y, gate_mlp)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.heads, self.shape.dim))

    def _cross(self, y: Tensor, layer: Layer) -> Tensor:
        q = self._heads(norm(F.linear(y, *layer.cross_q), layer.cross_weight))
        return F.linear(self.attend(q, *layer.text).flatten(2), *layer.cross_out)

    def _attention(
        self, y: Tensor, layer: Layer, number: int, grid: Tensor, first: int, commit: bool
    ) -> Tensor:
        q = self._heads(norm(F.linear(y, *layer.q), layer.q_weight))
        k = self._heads(norm(F.linear(y, *layer.k), layer.k_weight))
        v = self._heads(F.linear(y, *layer.v))
        turned = rotate(q, grid, self.rotations, first), rotate(k, grid, self.rotations, first)
        see = self._see_commit if commit else self._see_window
        seen = see(number, turned[1], v, first)
        return F.linear(self.attend(turned[0], *seen).flatten(2), *layer.out)

    def _see_window(self, number: int, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values of sink, recent frames and window, concatenated."""
        s, keys, values = self.shape, self.keys[number], self.values[number]
        end, total = int(self.end[number].item()), int(self.total[number].item())
        recent = min(s.recent, total // s.tokens - s.sink)
        sink = s.sink * s.tokens
        placed = rotate(keys[:, :sink], self.sink_grid, self.rotations, first - recent - s.sink)
        at = slice(end - recent * s.tokens, end)
        return torch.cat([placed, keys[:, at], k], 1), torch.cat([values[:, :sink], values[:, at], v], 1)

    def _see_commit(self, number: int, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Shifts the cache, appends the block → the keys and values that the block sees."""
        s, keys, values = self.shape, self.keys[number], self.values[number]
        end, total = int(self.end[number].item()), int(self.total[number].item())
        sink, new = s.sink * s.tokens, k.shape[1]
        for cache in (keys, values):
            if end + new > cache.shape[1]:
                cache[:, sink : end - new] = cache[:, sink + new : end].clone()
        end = min(end, keys.shape[1] - new)
        keys[:, end : end + new], values[:, end : end + new] = k, v
        self.end[number].fill_(end + new)
        self.total[number].fill_(total + new)
        at = slice(max(sink, end + new - s.kept * s.tokens), end + new)
        return keys[:, at], values[:, at]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS normalisation over all heads, in float32, from elementary operations."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return wide.to(x.dtype) * weight


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1, t n, c), scale and shift (1, t, 1, c)."""
    return (x.unflatten(1, (scale.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


def _table(dim: int) -> Tensor:
    """Rotations of each index by each frequency, complex128 (LONGEST, dim / 2)."""
    angle = torch.arange(LONGEST, dtype=torch.float64)[:, None] * torch.cat(frequencies(dim))
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, grid: Tensor, table: Tensor, first: int) -> Tensor:
    """Rotates x (1, t · n, h, d), in which x[2 i], x[2 i + 1] are a complex number, for frames from `first`
    on.
    """
    t, rows, columns = grid[0].tolist()
    time, row, column = table.split([len(part) for part in frequencies(x.shape[-1])], 1)
    turn = torch.cat(
        [
            time[first : first + t, None, None].expand(t, rows, columns, -1),
            row[None, :rows, None].expand(t, rows, columns, -1),
            column[None, None, :columns].expand(t, rows, columns, -1),
        ],
        -1,
    ).reshape(t * rows * columns, 1, -1)
    pairs = torch.view_as_complex(x[0].double().unflatten(-1, (-1, 2)))
    return torch.stack([torch.view_as_real(pairs * turn).flatten(-2)]).to(x.dtype)
