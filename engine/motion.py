"""Motion: the first guess at a frame, the finished picture before it moved as the keys say."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .layers import ConvLayer

FLOW_UNIT = 0.2  # of half a picture's side: what the network's output of 1 moves
STILL = 0.2  # pixels: what moves by less stays as it is
ROUGH = 0.5  # most noise on the frames that are read in training, latents having 1
SCALES = (1, 2, 4)  # at which pictures are compared: far moves are found on the small ones
LOG_DOUBT = math.log(0.02), math.log(2)  # least and most, standard deviations; latents have about 1
FAR = 3.0  # doubts: misses beyond count by their size, not its square, in training


class Guess(NamedTuple):
    """First guesses at frames (b, t, c, y, x), and the standard deviation of what they miss at each place."""

    mean: Tensor
    doubt: Tensor

    def part(self, span: slice) -> Guess:
        """That of some of the frames."""
        return Guess(self.mean[:, span], self.doubt[:, span])

    def without(self, dropped: Tensor, before: Tensor) -> Guess:
        """Where keys are dropped (b, t) nobody knows what moves: the frame before (b, 1, c, y, x)."""
        where = dropped[..., None, None, None]
        return Guess(torch.where(where, before, self.mean), torch.where(where, 1.0, self.doubt))


class Bounded(torch.autograd.Function):
    """Logarithms of doubts within bounds. Beyond one only such gradients pass as lead back: without any, a
    doubt would stay there for ever; with all of them, weights would grow for ever.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(*LOG_DOUBT)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        least, most = LOG_DOUBT
        outward = (x < least) & (gradient > 0) | (x > most) & (gradient < 0)  # a step goes against a gradient
        return gradient.masked_fill(outward, 0)


class Motion(nn.Module):
    """Reads a flow off the last two finished frames and the keys of these and the coming ones, and moves the
    last picture by it.

    A game's next picture is its last one moved, but for what comes into view. Decoded pictures can be moved
    by fractions of a pixel, latents hardly: the best smooth flow leaves 0.05 of the variance of the pictures
    and 0.48 of that of the latents (docs/log.md). So the picture is decoded, moved and encoded again. Without
    an autoencoder the latents themselves are moved.

    It also tells for each place how far off the guess will be: little where all was in sight, much where
    something comes into view. Noise and all that is drawn are in these units, so what was seen stays.
    """

    def __init__(
        self,
        keys: int,
        channels: int,
        ahead: int,
        momentum: int,
        width: int,
        layers: int,
        autoencoder: Autoencoder | None = None,
    ):
        super().__init__()
        self.ahead, self.momentum = ahead, momentum
        self._autoencoder = (autoencoder,)  # in a tuple, as its weights are not this module's own
        told = (momentum + 1) * keys + ahead
        self.told = nn.Sequential(nn.Linear(told, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.read = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.layers = nn.ModuleList(ConvLayer(width, 2 * width) for _ in range(layers))
        self.flow_out = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.zeros_(self.flow_out.weight)  # without knowledge nothing moves
        nn.init.zeros_(self.flow_out.bias)
        self.doubt = ConvLayer(width, 2 * width)
        self.doubt_out = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.doubt_out.weight)
        nn.init.constant_(self.doubt_out.bias, -0.7)  # half of the latents' own
        self.calm = nn.Parameter(torch.zeros(channels))  # logit: share of the doubt left where nothing moves

    def picture(self, latents: Tensor) -> Tensor:
        """Latents (n, c, y, x) → pictures that can be moved (n, 3, h, w), float32."""
        (autoencoder,) = self._autoencoder
        return latents.float() if autoencoder is None else autoencoder.paint(latents)

    def latents(self, pictures: Tensor) -> Tensor:
        """The way back: (n, 3, h, w) → (n, c, y, x)."""
        (autoencoder,) = self._autoencoder
        return pictures if autoencoder is None else autoencoder.read(pictures)

    def flow(
        self, last: Tensor, held: Tensor, actions: Tensor, ahead: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The last two frames (b, 2, c, y, x), the actions of the last ones (b, m, k), and those of the
        coming ones (b, t, k) → where each place of the coming frames lies in the last one, less its own
        place, (b, t, y, x, 2) in units of half a picture's sides; and the doubt (b, t, c, y, x). `ahead` (t,)
        numbers the coming frames, from 0 on unless given.
        """
        b, t = actions.shape[:2]
        ahead = torch.arange(t, device=last.device) if ahead is None else ahead
        now = ahead[:, None] == torch.arange(self.ahead, device=last.device)
        now = now.to(actions.dtype).expand(b, -1, -1)
        told = torch.cat([held.flatten(1)[:, None].expand(-1, t, -1), actions, now], -1)
        condition = F.silu(self.told(told))  # (b, t, 2 width)
        given = torch.cat([last[:, 1], last[:, 1] - last[:, 0]], 1)
        x = self.read(given.contiguous(memory_format=torch.channels_last))  # (b, width, y, x)
        x = x[:, None].expand(-1, t, -1, -1, -1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x, condition)
        flow = FLOW_UNIT * self.flow_out(F.silu(x)).float()
        # what is read off for the doubt leaves the flow alone
        doubt = self.doubt_out(F.silu(self.doubt(x.detach(), condition.detach()))).float()
        doubt = Bounded.apply(doubt).exp()
        return rearrange(flow, "(b t) two y x -> b t y x two", b=b), doubt.unflatten(0, (b, t))

    def warp(self, picture: Tensor, flow: Tensor) -> Tensor:
        """Pictures (b, c, h, w) moved by flows (b, t, y, x, 2) → (b, t, c, h, w); borders are repeated."""
        b, t = flow.shape[:2]
        (h, w), c = picture.shape[2:], picture.shape[1]
        # enlarging takes three times as long in another layout
        coarse = rearrange(flow, "b t y x two -> (b t) two y x").contiguous()
        fine = F.interpolate(coarse, (h, w), mode="bilinear")
        still = F.affine_grid(torch.eye(2, 3, device=flow.device)[None], [1, c, h, w], align_corners=False)
        where = rearrange(still + fine.permute(0, 2, 3, 1), "(b t) h w two -> b (t h) w two", b=b)
        moved = F.grid_sample(picture, where, "bicubic", padding_mode="border", align_corners=False)
        return rearrange(moved, "b c (t h) w -> b t c h w", t=t)

    @property
    def shrink(self) -> int:
        """By what pictures are shrunk in training, which says as much about motion in less time."""
        return 1 if self._autoencoder[0] is None else 2

    @torch.no_grad()
    def forward(self, last: Tensor, held: Tensor, actions: Tensor, picture: Tensor | None = None) -> Guess:
        """The last two finished frames (b, 2, c, y, x), the actions of the last ones (b, m, k), those of the
        coming ones (b, t, k), the picture of the last frame where that is at hand → guesses at the coming
        frames (b, t, c, y, x), float32.
        """
        picture = self.picture(last[:, 1]) if picture is None else picture
        return self._moved(last[:, 1:], picture, *self.flow(last, held, actions))

    def _moved(self, last: Tensor, picture: Tensor, flow: Tensor, doubt: Tensor) -> Guess:
        """The last frame (b, 1, c, y, x) and its picture (b, 3, h, w), moved by flows (b, t, y, x, 2), with
        doubts (b, t, c, y, x).

        Where nothing moves the latents stay as they are: decoded and encoded a thousand times, as standing
        still would have it, they would be others. And little is doubted there: what is drawn over a picture
        a thousand times, be it ever so faint, becomes another picture (docs/log.md).
        """
        with torch.no_grad():
            moved = self.warp(picture, flow)
            latents = self.latents(moved.flatten(0, 1)).float().unflatten(0, moved.shape[:2])
            right, down = (
                flow[..., 0] * (picture.shape[3] / 2),
                flow[..., 1] * (picture.shape[2] / 2),
            )  # pixels
            still = torch.exp(-((right / STILL).square() + (down / STILL).square()))[:, :, None]
        gone = still * (1 - self.calm.sigmoid()[:, None, None])
        return Guess(latents.lerp(last, still), doubt * (1 - gone))

    def loss(
        self, last: Tensor, held: Tensor, actions: Tensor, true: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the moved pictures are from the true ones: as in forward, and the frames that came (b, t,
        c, y, x). Absolute differences at several scales, in grey of [-1, 1].
        """
        # the next frame and, as decoding is dear, one more
        ahead = torch.randperm(actions.shape[1] - 1)[:1] + 1
        ahead = torch.cat([ahead.new_zeros(1), ahead]).to(last.device)
        # the model's own frames flicker, which must not be taken for motion
        level = ROUGH * torch.rand(len(last), 1, 1, 1, 1) * (torch.rand(len(last), 1, 1, 1, 1) < 0.7)
        read = last + level.to(last.device) * torch.randn_like(last)
        flow, doubt = self.flow(read, held, actions[:, ahead], ahead)
        with torch.no_grad():
            pictures = self.picture(torch.cat([last[:, 1:], true[:, ahead]], 1).flatten(0, 1))
            picture = pictures.unflatten(0, (len(last), -1))[:, 0]
            pictures = F.avg_pool2d(pictures, self.shrink).unflatten(0, (len(last), -1))
        one = int(torch.randint(len(ahead), ()))  # frame, as encoding is dear, too
        which = slice(one, one + 1)
        guess, doubt = self._moved(last[:, 1:], picture, flow[:, which], doubt[:, which])
        off = (guess - true[:, ahead[which]]) / doubt
        # a Gaussian's, but for what lies far off
        unlikely = F.huber_loss(off, torch.zeros_like(off), delta=FAR) + doubt.log().mean()
        missed = self.warp(pictures[:, 0], flow) - pictures[:, 1:]  # (b, 1 or 2, c, h, w)
        error = missed.detach().square().mean((0, 2, 3, 4))
        still = (pictures[:, 0] - pictures[:, 1]).square().mean()
        parts = [
            F.avg_pool2d(missed.flatten(0, 1), scale).abs().mean((1, 2, 3)).view(len(last), -1).mean(0)
            for scale in SCALES
            if scale <= min(missed.shape[3:])
        ]
        weight = 0.5**ahead  # later frames move as keys say that come later
        logs = {"next": error[0], "later": error[-1], "still": still, "unlikely": unlikely.detach()}
        # little of it: its own layers learn at the same pace, and gradients are clipped by their common norm
        return (sum(parts) * weight).sum() + 0.01 * unlikely, logs
