"""The diffusion transformer over frame tokens: one action token and the patches of every frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import DenoiserConfig, UserError
from .layers import DiTLayer, Memory, Positions, SigmaEncoder, modulated_norm


class Transformer(nn.Module):
    """Latents of some frames (b, t, c, y, x), conditioned frame by frame → as many of the same shape."""

    def __init__(self, config: DenoiserConfig, channels: int, rows: int, columns: int):
        super().__init__()
        self.patch = config.patch
        if rows % self.patch or columns % self.patch:
            said = f"Latents of {columns}x{rows} do not divide into patches of {self.patch}"
            raise UserError(f"{said}; change model.denoiser.patch or the world's frame size.")
        self.rows, self.columns = rows // self.patch, columns // self.patch
        self.tokens = 1 + self.rows * self.columns  # a frame
        width, flat = config.width, channels * self.patch**2
        self.patch_in = nn.Linear(2 * flat, width)
        self.place = nn.Parameter(0.02 * torch.randn(self.tokens - 1, width))
        self.sigma = SigmaEncoder(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(
            DiTLayer(width, config.head_dim, config.mlp_ratio) for _ in range(config.layers)
        )
        self.last = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, flat)
        self.positions = Positions(config.head_dim, self.rows, self.columns)
        for zero in (self.modulation, self.last, self.patch_out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        latents: Tensor,
        guess: Tensor,
        sigma: Tensor,
        action: Tensor,
        frame: int,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """latents and a first guess at them (b, t, c, y, x), sigma (b, t), action tokens (b, t, d), index
        of the first frame, memory, mask (t n, m) added to the scores → (b, t, c, y, x).
        """
        both = torch.cat([latents, guess], 2)
        p = self.patch
        x = self.patch_in(rearrange(both, "b t c (y p) (x q) -> b t (y x) (c p q)", p=p, q=p))
        x = torch.cat([action[:, :, None].to(x.dtype), x + self.place.to(x.dtype)], 2)  # (b, t, n, d)
        condition = F.silu(self.sigma(sigma) + action)  # (b, t, d)
        modulation = self.modulation(condition)
        angles = self.positions(frame, x.shape[1])
        for index, layer in enumerate(self.layers):
            x = layer(x, modulation, angles, memory, index, mask)
        scale, shift = self.last(condition).chunk(2, -1)
        out = self.patch_out(modulated_norm(x[:, :, 1:], scale, shift))
        shape = {"y": self.rows, "x": self.columns, "p": self.patch, "q": self.patch}
        return rearrange(out, "b t (y x) (c p q) -> b t c (y p) (x q)", **shape)
