"""Stage `distill`: the model's own games get the true games' distribution, and keep to the truth at large."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError
from ..data.segments import Clip
from ..model.checkpoint import Checkpoint, weights_digest
from ..model.denoiser import Denoiser
from ..model.kv_cache import KVRecorder
from ..model.networks import load_autoencoder, load_denoiser
from ..model.noise import add_noise, training_sigma
from ..model.world_model import Generator
from ..rollout.rollout import Rollout
from ..stage_config import TRAINED, DistillStageConfig
from .denoiser import DenoiserStage
from .rollout import RolloutLoss, Windows
from .stage import DECODER


class DistillLoss(RolloutLoss):
    """Distribution matching (Yin et al., 2024, DMD) on self-generated history (Huang et al., 2025, Self
    Forcing): what the student makes of a window is noised; the teacher says what true windows look like from
    there, the critic, which learns along, what the student's do, and the student moves by the difference.

    Squared errors would have it draw the mean of all that may come, in which grass and bricks vanish. Only
    averages over a few latents are held against the true frames: where walls are is known from the state,
    where each blade stands is not. Where the true game stands still, each blade is known: the own one shall
    show what it showed when that began, as a step that draws it anew shows as flicker, and one that only
    keeps to the frame before hands its errors on to the next.

    Teacher and critic see no frames before the last one, and that one with some noise: detail that the
    student's has lost is then nothing to hold on to.
    """

    def __init__(self, generator: Generator, stage: DistillStageConfig, teacher: Denoiser):
        super().__init__(generator, stage)
        self.teacher = teacher.requires_grad_(False)
        self.critic = copy.deepcopy(teacher).requires_grad_(True)

    def forward(self, clip: Clip, turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.told: dict[str, Tensor] = {}
        loss, logs = super().forward(clip, turn)
        return loss, logs | self.told

    def judged(self, rollout: Rollout, windows: Windows) -> tuple[Tensor, Tensor]:
        made, right, corrected, back, true, still, shown, action = windows
        if corrected is not None:
            back = back[:, None]
            head = torch.where(back[..., None, None, None], corrected, made[:, :1])
            made = torch.cat([head, made[:, 1:]], 1)
            right = torch.cat([torch.where(back, 1, right[:, :1]), right[:, 1:]], 1)
        size = min(self.stage.coarse, *made.shape[-2:])
        coarse = F.avg_pool2d((made - true).flatten(0, 1), size).square().mean((1, 2, 3))
        error = coarse.view(right.shape) * size
        matched, learnt = self._matched(rollout, made, action)
        kept = (made - shown).square().mean((2, 3, 4))
        still = still * (kept < self.stage.lost)
        self.told = {"coarse": error.mean().detach(), "critic": learnt.mean().detach()}
        self.told["kept"] = (kept * still).sum().detach() / still.sum().clamp_min(1)
        self.told["still"] = still.mean().detach()
        matched = self.stage.distribution * (1 - still) * matched
        return error + self.stage.kept * still * kept + matched + learnt, right

    def _matched(self, rollout: Rollout, made: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A window (b, w, c, y, x) under the keys (b, k) → the student's loss and the critic's, (b, w)."""
        b, w = made.shape[:2]
        shown = made.detach()
        (actions, features, has_state, ahead, _), _ = rollout.window_inputs(rollout.window.bind(action))
        before, level = self._roughened(rollout.last[:, 1:])
        inputs = actions, features, has_state, ahead, level.expand(b, w)
        sigma = training_sigma(self.denoiser.ladder, b, self.stage.jitter, self.stage.lowest)
        noisy = add_noise(shown, torch.randn_like(shown), sigma)

        def guess(network: Denoiser) -> Tensor:
            return network(noisy, sigma, before, network.condition(*inputs), 0, KVRecorder())

        with torch.no_grad():
            real = guess(self.teacher)
        fake = guess(self.critic)
        scale = (shown - real).abs().mean((2, 3, 4), keepdim=True).clamp_min(0.05)
        target = shown - (fake.detach() - real) / scale
        matched = 0.5 * (made - target).square().mean((2, 3, 4))
        return matched, (fake - shown).square().mean((2, 3, 4))


class DistillStage(DenoiserStage):
    """Goes on from what stage `denoiser` made on its own history; the teacher stays what that is."""

    def segment(self) -> tuple[int, int]:
        sizes, stage = self.model.denoiser, self.config.stage_config()
        start = sizes.sink_frames + sizes.context_frames
        length = start + stage.game_frames + sizes.window_frames - 1
        return max(length, stage.clip), length - start

    def under_way(self) -> list:
        """Its games: where each step takes seconds they would hardly become old between two saves."""
        return self.module.under_way()

    def take_up(self, under_way: list) -> None:
        self.module.take_up(under_way)

    def loss(self) -> DistillLoss:
        path = Path(self.config.out) / f"{TRAINED[self.config.stage].reads[0]}.safetensors"
        teacher = Checkpoint(path)
        own, other = (weights_digest(load_autoencoder(one), DECODER) for one in (self.before, teacher))
        if own != other:
            said = f"{path}, the teacher, speaks of other latents than {self.before.path}"
            raise UserError(f"{said}; give weights= of the same encoder, or another out=DIR.")
        teacher = self.frozen(load_denoiser(teacher))
        return DistillLoss(self.generator(), self.config.stage_config(), teacher)
