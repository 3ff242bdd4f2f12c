"""Transformer: a diffusion transformer over the tokens of frames, with convolutions before and after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import DenoiserConfig, UserError
from .layers import AttentionContext, Condition, ConvLayer, DiTLayer, Positions, SigmaEncoder, modulated_norm


class Transformer(nn.Module):
    """Latents of frames (b, t, c, y, x), conditioned frame by frame → the same shape.

    A frame's tokens are one condition token and its patches. Convolutions at the latents' own resolution come
    before and after the tokens, with a skip connection past them (as in a U-Net, Ronneberger et al., 2015):
    convolutions handle fine detail nearby; attention over a few large tokens what is far away or long ago.
    """

    def __init__(self, config: DenoiserConfig, channels: int, rows: int, columns: int, scene: bool = False):
        """`scene`: whether frames come with a scene (scene.py). Raises UserError where latents do not divide
        into patches.
        """
        super().__init__()
        self.patch = config.patch
        if rows % self.patch or columns % self.patch:
            said = f"Latents of {columns}x{rows} do not divide into patches of {self.patch}"
            raise UserError(f"{said}; change model.denoiser.patch or the world's frame size.")
        self.rows, self.columns = rows // self.patch, columns // self.patch
        self.tokens = 1 + self.rows * self.columns  # of a frame
        width, fine = config.width, config.conv_width
        # channels that the condition draws, different at every place: a condition that is the same for all
        # places cannot tell a convolution where things are
        self.field = nn.Linear(width, config.field_channels * rows * columns)
        seen = (3 if scene else 2) * channels + config.field_channels
        self.read = nn.Conv2d(seen, fine, 3, padding=1)
        self.conv_in = nn.ModuleList(ConvLayer(fine, width) for _ in range(config.conv_in_layers))
        self.patch_in = nn.Linear(fine * self.patch**2, width)
        self.sigma = SigmaEncoder(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(
            DiTLayer(width, config.head_dim, config.mlp_ratio) for _ in range(config.layers)
        )
        self.last = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, fine * self.patch**2)
        self.conv_out = nn.ModuleList(ConvLayer(fine, width) for _ in range(config.conv_out_layers))
        self.write = nn.Conv2d(fine, channels, 3, padding=1)
        self.positions = Positions(config.head_dim, self.rows, self.columns)
        for zero in (self.modulation, self.last, self.patch_out, self.write):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        latents: Tensor,
        prev_frame: Tensor,
        sigma: Tensor,
        token: Tensor,
        scene: Tensor | None,
        frame: Tensor | int,
        memory: AttentionContext,
        mask: Tensor | None = None,
        context_only_frames: int = 0,
    ) -> Tensor | None:
        """latents and prev_frame, for each the finished frame that it is made from (b, t, c, y, x); sigma
        (b, t); condition tokens (b, t, d); scenes (b, t, c, y, x) or None; index of the first frame; memory;
        mask (t · n, m) added to the attention scores → (b, t - context_only_frames, c, y, x). Of the first
        `context_only_frames` frames only keys and values are written; None if these are all.
        """
        b, t = latents.shape[:2]
        condition = F.silu(self.sigma(sigma) + token)  # (b, t, d)
        field = self.field(F.silu(token)).view(b, t, -1, *latents.shape[3:])
        given = [latents, prev_frame, field.to(latents.dtype)]
        given += [] if scene is None else [scene.to(latents.dtype)]
        given = torch.cat(given, 2).flatten(0, 1)
        fine = self.read(given.contiguous(memory_format=torch.channels_last))  # (b t, f, y, x)
        for conv in self.conv_in:
            fine = conv(fine, condition)
        p = self.patch
        x = self.patch_in(rearrange(fine, "(b t) f (y p) (x q) -> b t (y x) (p q f)", b=b, p=p, q=p))
        x = torch.cat([token[:, :, None].to(x.dtype), x], 2)  # (b, t, n, d)
        parts, angles = self._conditions(condition), self.positions(frame, t)
        y = modulated_norm(x, parts[0].scale, parts[0].shift)
        following = [(part.scale, part.shift) for part in parts[1:]] + [self.last(condition).chunk(2, -1)]
        for index, layer in enumerate(self.layers):
            x, y = layer(x, y, parts[index], following[index], angles, memory, index, mask)
        if context_only_frames == t:
            return None
        fine = fine.unflatten(0, (b, t))[:, context_only_frames:].flatten(0, 1)
        condition, t = condition[:, context_only_frames:], t - context_only_frames
        out = self.patch_out(y[:, context_only_frames:, 1:])
        out = rearrange(out, "b t (y x) (p q f) -> (b t) (y p) (x q) f", y=self.rows, p=p, q=p)
        fine = fine + out.permute(0, 3, 1, 2)
        for conv in self.conv_out:
            fine = conv(fine, condition)
        return self.write(F.silu(fine)).unflatten(0, (b, t))

    def _conditions(self, condition: Tensor) -> list[Condition]:
        """Conditions of the frames (b, t, d) → each layer's modulation."""
        shared = self.modulation(condition)
        tables = torch.stack([layer.table for layer in self.layers]).to(shared.dtype)
        parts = (shared[:, :, None] + tables).unflatten(-1, (6, -1))  # (b, t, layers, 6, d)
        return [Condition(*part.unbind(2)) for part in parts.unbind(2)]
