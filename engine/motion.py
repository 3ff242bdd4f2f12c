"""Motion: the first guess at a frame, read off the last finished one and the held keys alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad, unfold


class Motion(nn.Module):
    """The last finished frame moved as the keys say: a linear map of each patch and its surroundings,
    with a matrix of its own for every key and for every number of frames ahead.

    Turning shifts and walking zooms the picture: both are nearly linear in the latents around a patch, so
    they are learnt within minutes, and a key pressed late moves every frame in flight at once. What the
    guess misses is the transformer's work.
    """

    def __init__(self, keys: int, channels: int, patch: int, ahead: int):
        super().__init__()
        self.patch, self.border = patch, patch // 2
        around = patch + 2 * self.border
        self.weight = nn.Parameter(
            torch.zeros(ahead, 1 + keys, channels * patch**2, channels * around**2), requires_grad=False
        )
        still = torch.zeros(channels, patch, patch, channels, around, around)
        c, y, x = torch.meshgrid(*(torch.arange(n) for n in (channels, patch, patch)), indexing="ij")
        still[c, y, x, c, y + self.border, x + self.border] = 1
        with torch.no_grad():  # without knowledge nothing moves
            self.weight[:, 0] = still.flatten(3).flatten(0, 2)

    def _around(self, frames: Tensor) -> Tensor:
        """Each patch with its surroundings: frames (b, t, c, y, x) → (b, t, patches, c · around²)."""
        edge, size = (self.border,) * 4, self.patch + 2 * self.border
        around = unfold(pad(frames.flatten(0, 1), edge, mode="replicate"), size, stride=self.patch)
        return rearrange(around, "(b t) p n -> b t n p", b=len(frames))

    def forward(self, before: Tensor, actions: Tensor, ahead: Tensor) -> Tensor:
        """The finished frame that each guess starts from (b, t or 1, c, y, x), actions (b, t, k), how many
        frames lie between (t,) → guesses (b, t, c, y, x).
        """
        b, t = actions.shape[:2]
        around = rearrange(self._around(before).expand(-1, t, -1, -1), "b t n p -> t (b n) p")
        matrices = rearrange(self.weight[ahead], "t f o p -> t p (f o)")
        moved = rearrange(around @ matrices, "t (b n) (f o) -> b t n f o", b=b, f=actions.shape[-1] + 1)
        held = torch.cat([torch.ones_like(actions[..., :1]), actions], -1)  # (b, t, f)
        guess = (moved.float() * held[:, :, None, :, None]).sum(3)
        grid = {"y": before.shape[3] // self.patch, "p": self.patch, "q": self.patch}
        return rearrange(guess, "b t (y x) (c p q) -> b t c (y p) (x q)", **grid)

    @torch.no_grad()
    def fit(self, clips: Iterable[tuple[Tensor, Tensor]], ridge: float = 1000.0) -> None:
        """Least squares over true clips, (b, 1 + ahead, c, y, x) and the keys of their second frame (b,
        k): the best linear guess in closed form, of which gradient descent would take hours.
        """
        ahead, keys, _, size = self.weight.shape
        sums: dict[tuple[float, ...], Tensor] = {}  # few combinations of keys are held, so one sum for each
        for latents, action in clips:
            around = self._around(latents[:, :1].float())[:, 0]  # (b, n, p)
            wanted = unfold(latents[:, 1:].flatten(0, 1).float(), self.patch, stride=self.patch)
            wanted = rearrange(wanted, "(b t) o n -> b n (t o)", b=len(latents))
            for held in action.unique(dim=0):
                mine = (action == held).all(1)
                x, y = around[mine].flatten(0, 1), wanted[mine].flatten(0, 1)
                name = (1.0, *held.tolist())
                sums[name] = sums.get(name, 0) + (x.T @ torch.cat([x, y], 1)).double()  # (p, p + t o)
        held = torch.tensor(list(sums), dtype=torch.float64, device=self.weight.device)  # (s, f)
        grams, crosses = torch.stack(list(sums.values())).tensor_split([size], -1)
        gram = torch.einsum("sf,sg,spq->fpgq", held, held, grams).flatten(2).flatten(0, 1)
        cross = torch.einsum("sf,spo->fpo", held, crosses).flatten(0, 1)
        gram.diagonal().add_(ridge)
        solved = torch.linalg.solve(gram, cross)
        self.weight.copy_(rearrange(solved, "(f p) (t o) -> t f o p", f=keys, t=ahead))
