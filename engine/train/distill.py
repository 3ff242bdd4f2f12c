"""Stage `distill`: the model's own games get the true games' distribution, and keep to the truth at large."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TRAINED, StageConfig
from ..data.segments import Clip
from ..model.checkpoint import Checkpoint
from ..model.denoiser import Denoiser
from ..model.kv_cache import KVRecorder
from ..model.networks import load_denoiser
from ..model.noise import add_noise, training_sigma
from ..model.state import StateModel
from ..model.state_reader import StateReader
from ..rollout.rollout import Rollout
from .denoiser import DenoiserStage
from .rollout import RolloutLoss, Windows


class DistillLoss(RolloutLoss):
    """Distribution matching (Yin et al., 2024, DMD) on self-generated history (Huang et al., 2025, Self
    Forcing): what the student makes of a window is noised; the teacher says what true windows look like from
    there, the critic, which learns along, what the student's do, and the student moves by the difference.

    Squared errors would have it draw the mean of all that may come, in which grass and bricks vanish. Only
    averages over a few latents are held against the true frames: where walls are is known from the state,
    where each blade stands is not.

    Teacher and critic see no frames before the last one, and that one with some noise: detail that the
    student's has lost is then nothing to hold on to.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        states: StateModel | None,
        stage: StageConfig,
        reader: StateReader | None,
        teacher: Denoiser,
    ):
        super().__init__(denoiser, states, stage, reader)
        self._teacher = (teacher.requires_grad_(False),)  # in a tuple, as it is not trained here
        self.critic = copy.deepcopy(teacher).requires_grad_(True)

    def forward(self, clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        self.told: dict[str, Tensor] = {}
        loss, logs = super().forward(clip)
        return loss, logs | self.told

    def _judged(self, rollout: Rollout, windows: Windows) -> tuple[Tensor, Tensor]:
        made, right, corrected, back, true, action = windows
        if corrected is not None:
            back = back[:, None]
            head = torch.where(back[..., None, None, None], corrected, made[:, :1])
            made = torch.cat([head, made[:, 1:]], 1)
            right = torch.cat([torch.where(back, 1, right[:, :1]), right[:, 1:]], 1)
        size = self.stage.coarse
        coarse = F.avg_pool2d((made - true).flatten(0, 1), size).square().mean((1, 2, 3))
        error = coarse.view(right.shape) * size
        matched, learnt = self._matched(rollout, made, action)
        self.told = {"coarse": error.mean().detach(), "critic": learnt.mean().detach()}
        return error + self.stage.distribution * matched + learnt, right

    def _matched(self, rollout: Rollout, made: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A window (b, w, c, y, x) under the keys (b, k) → the student's loss and the critic's, (b, w)."""
        b, w = made.shape[:2]
        shown = made.detach()
        (actions, features, has_state, ahead, _), _ = rollout.window_inputs(rollout.window.bind(action))
        before, level = self._roughened(rollout.last[:, 1:])
        inputs = actions, features, has_state, ahead, level.expand(b, w)
        sigma = training_sigma(self.denoiser.ladder, b, self.stage.jitter)
        noisy = add_noise(shown, torch.randn_like(shown), sigma)

        def guess(network: Denoiser) -> Tensor:
            return network(noisy, sigma, before, network.condition(*inputs), 0, KVRecorder())

        with torch.no_grad():
            real = guess(self._teacher[0])
        fake = guess(self.critic)
        scale = (shown - real).abs().mean((2, 3, 4), keepdim=True).clamp_min(0.05)
        target = shown - (fake.detach() - real) / scale
        matched = 0.5 * (made - target).square().mean((2, 3, 4))
        return matched, (fake - shown).square().mean((2, 3, 4))


class DistillStage(DenoiserStage):
    """Goes on from what stage `denoiser` made on its own history; the teacher stays what that is."""

    def segment(self) -> tuple[int, int]:
        sizes, stage = self.model.denoiser, self.config.pace()
        start = sizes.sink_frames + sizes.context_frames
        length = start + stage.game_frames + sizes.window_frames - 1
        return max(length, stage.clip), length - start

    def saved(self) -> None:
        """Games under way are not saved. They begin anew also where training goes on, so that a continued
        run is the uninterrupted one.
        """
        self.module.games.clear()

    def loss(self) -> DistillLoss:
        path = Path(self.config.out) / f"{TRAINED[self.config.stage].reads[0]}.safetensors"
        teacher = self.frozen(load_denoiser(Checkpoint(path)))
        return DistillLoss(self._denoiser(), self.states, self.config.pace(), self.reader, teacher)
