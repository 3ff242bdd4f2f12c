"""Denoiser: (noisy latents, sigma, actions, memory) → clean estimate; its training loss stands beside it."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .actions import ActionEncoder
from .autoencoder import Autoencoder
from .config import DenoiserConfig
from .kv_cache import Context, KVCache, Written
from .layers import Memory
from .motion import Guess, Motion
from .sampler import add_noise, scalings, training_sigma
from .transformer import Transformer
from .window import bind

FARTHEST = 4.0  # doubts from the guess: a frame in flight that lies farther off is not believed


class Denoiser(nn.Module):
    """Estimates clean latents of a window of frames, each with its own noise level and action."""

    def __init__(
        self,
        config: DenoiserConfig,
        keys: int,
        channels: int,
        rows: int,
        columns: int,
        autoencoder: Autoencoder | None = None,
    ):
        super().__init__()
        self.config, self.keys, self.shape = config, keys, (channels, rows, columns)
        self.actions = ActionEncoder(keys, config.width)
        self.motion = make_motion(config, keys, channels, autoencoder).requires_grad_(False)
        self.transformer = Transformer(config, channels, rows, columns)
        self.register_buffer("ladder", torch.tensor(config.ladder), persistent=False)

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        actions: Tensor,
        known: Tensor,
        frame: Tensor | int,
        memory: Memory,
        dropped: Tensor | None = None,
        guess: Guess | None = None,
    ) -> Tensor:
        """noisy (b, t, c, y, x), its noise in units of the guess's doubt, sigma (b, t), actions (b, t, k),
        known (b, t), index of the first frame, memory → clean (b, t, c, y, x), float32. `guess`: what
        `self.guess` says, where that is known already. A pending frame of the memory is committed along.
        """
        guess, before = self.guess(actions, memory) if guess is None else guess, memory.last[:, 1:]
        guess, doubt = guess if dropped is None else guess.without(dropped, before)
        skip, out, scale = (x[..., None, None, None] for x in scalings(sigma))
        missed = (noisy - (1 - sigma[..., None, None, None]) * guess) / doubt  # just as noisy
        missed = missed.clamp(-FARTHEST, FARTHEST)
        action = self.actions(actions, known, dropped)
        shown = (scale * missed, guess, before.expand_as(missed), sigma, action)
        first = self._pending(memory) if memory.pending else None
        if first:
            shown, frame = [torch.cat(both, 1) for both in zip(first, shown, strict=True)], frame - 1
        made = self.transformer(*shown, frame, memory, unpainted=1 if first else 0)
        return guess + doubt * (skip * missed + out * made.float())

    def guess(self, actions: Tensor, memory: Memory, picture: Tensor | None = None) -> Guess:
        """First guesses (b, t, c, y, x) at the frames behind the memory, under the actions (b, t, k);
        `picture`: what the memory's last frame looks like, where that is known already.
        """
        return self.motion(memory.last, memory.held, actions, picture)

    def commit(
        self, clean: Tensor, actions: Tensor, frame: int, memory: Written, sigma: Tensor | None = None
    ) -> None:
        """Writes the keys and values of finished frames (b, t, c, y, x), the first of which has index
        `frame`, into an empty memory; each frame looks at the `recent` frames before it and at itself, never
        at the sink. sigma (b, t) tells how noisy the frames are, 0 unless given.
        """
        sigma = clean.new_zeros(clean.shape[:2]) if sigma is None else sigma
        before = torch.cat([clean[:, :1], clean[:, :-1]], 1)
        mask = self.history_mask(clean.shape[1], clean.device)
        shown = self._finished(clean, before, sigma, actions)
        self.transformer(*shown, frame, memory, mask, unpainted=clean.shape[1])
        memory.last = torch.cat([clean[:, :1], clean], 1)[:, -2:]
        idle = actions.new_zeros(len(actions), self.config.momentum, self.keys)
        memory.held = torch.cat([idle, actions], 1)[:, -self.config.momentum :]

    def commit_pending(self, memory: KVCache) -> None:
        """Writes the keys and values of the last finished frame, in a pass of its own."""
        memory.look(0)
        self.transformer(*self._pending(memory), memory.frame - 1, memory, unpainted=1)
        memory.pending = False

    def _pending(self, memory: Memory) -> tuple[Tensor, ...]:
        """What the transformer is shown of the last finished frame to commit it."""
        before, clean = memory.last.split(1, 1)
        return self._finished(clean, before, clean.new_zeros(len(clean), 1), memory.held[:, -1:])

    def _finished(self, clean: Tensor, before: Tensor, sigma: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        """What the transformer is shown of finished frames (b, t, c, y, x) and the ones before each: these
        stand in for the guess, as there is nothing to be guessed.
        """
        scale = scalings(sigma, self.config.spread)[2][..., None, None, None]
        missed = clean - (1 - sigma[..., None, None, None]) * before
        return scale * missed, before, before, sigma, self.actions(actions, torch.ones_like(sigma))

    def history_mask(self, frames: int, device: torch.device) -> Tensor:
        """(frames n, frames n): 0 where a token may look at a key of its own or of the `recent` frames
        before, -inf elsewhere.
        """
        index = torch.arange(frames, device=device)
        age = index[:, None] - index
        allowed = (age >= 0) & (age <= self.config.recent)
        n = self.transformer.tokens
        mask = torch.where(allowed, 0.0, -torch.inf).repeat_interleave(n, 0).repeat_interleave(n, 1)
        return mask.to(
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        )

    def make_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for games played side by side."""
        tokens = self.transformer.tokens
        return KVCache(self.config, tokens, self.keys, self.shape, batch, device, dtype)

    def loss(self, latents: Tensor, actions: Tensor, windows: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching on true frames: latents (b, t, c, y, x) and actions (b, t, k) of segments.

        One commit pass writes the keys and values of the frames before a random place; then `windows` windows
        with own noise and levels stand there, each seeing sink and recent frames just as in play. A fifth of
        the iterations has windows of a single frame (the mode that corrects a leaving frame). The binding of
        actions is that of play.
        """
        config, total = self.config, latents.shape[1]
        start = int(torch.randint(config.recent + config.sink, total - config.window + 1, ()))
        memory = Written()
        history, sigma = self._roughen(latents[:, :start])
        self.commit(history, actions[:, :start], 0, memory, sigma)
        size = 1 if torch.rand(()) < 0.2 else config.window
        span = slice(start, start + size)
        shown, known = bind(actions[:, span], config.commit_position)
        guess = self.guess(shown, memory)
        context = self._context(memory, start, windows)
        clean, shown, known, *guess = (
            x.repeat(windows, *(1,) * (x.ndim - 1)) for x in (latents[:, span], shown, known, *guess)
        )
        error = self._window_error(clean, shown, known, start, context, Guess(*guess))
        logs = {"head": error[:, 0].mean().detach()} if size > 1 else {"single": error.mean().detach()}
        return error.mean(), logs

    def _roughen(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Frames with a little noise on half of the segments, as play's own frames are never perfect →
        (latents, sigma).
        """
        b, t = latents.shape[:2]
        sigma = (
            0.3 * torch.rand(b, t, device=latents.device) * (torch.rand(b, 1, device=latents.device) < 0.5)
        )
        return add_noise(latents, torch.randn_like(latents), sigma), sigma

    def _context(self, memory: Written, start: int, windows: int) -> Context:
        """What a window at `start` looks at: the segment's first frames as the sink, moved to its place, and
        the ring.

        Half of the batch gets another segment's sink: in play the sink is from long ago and shows another
        view.
        """
        c, n = self.config, self.transformer.tokens
        place = start - c.recent - c.sink
        layers = []
        order = torch.arange(len(memory.layers[0][0]))
        order[: len(order) // 2] = order[: len(order) // 2].roll(1)
        for k, v in memory.layers:
            sink_k = self.transformer.positions.shift(k[order, : c.sink * n], place)
            ring = slice((start - c.recent) * n, start * n)
            seen_k = torch.cat([sink_k, k[:, ring]], 1)
            seen_v = torch.cat([v[order, : c.sink * n], v[:, ring]], 1)
            layers.append((seen_k.repeat(windows, 1, 1, 1), seen_v.repeat(windows, 1, 1, 1)))
        return Context(layers, memory.last.repeat(windows, 1, 1, 1, 1), memory.held.repeat(windows, 1, 1))

    def _window_error(
        self, clean: Tensor, shown: Tensor, known: Tensor, start: int, context: Context, guess: Guess
    ) -> Tensor:
        """Weighted squared error (b, t) of one noised window."""
        b, t = clean.shape[:2]
        sigma = training_sigma(self.ladder, b)[:, :t]
        dropped = (torch.rand(b, 1, device=clean.device) < 0.1).expand(b, t)
        guess = guess.without(dropped, context.last[:, 1:])
        noisy = add_noise(clean, guess.doubt * torch.randn_like(clean), sigma)
        made = self(noisy, sigma, shown, known, start, context, dropped, guess)
        return weighted_error(made, clean, sigma, self.config.spread)


def weighted_error(made: Tensor, clean: Tensor, sigma: Tensor, spread: float) -> Tensor:
    """Squared error (b, t) of clean estimates (b, t, c, y, x), in units of the network's output where the
    guess is as doubtful as `spread`, the usual case; sigma (b, t).
    """
    out = spread * scalings(sigma)[1].clamp_min(0.1)
    return rearrange((made - clean).square(), "b t c y x -> b t (c y x)").mean(-1) / out.square()


def make_motion(config: DenoiserConfig, keys: int, channels: int, autoencoder: Autoencoder | None) -> Motion:
    """The network of the first guess, with fresh weights."""
    size = config.window, config.momentum, config.motion, config.motion_layers
    return Motion(keys, channels, *size, autoencoder)
