"""Stage `distill`: distribution matching on the model's own games."""

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
from .latents_stage import DECODER
from .rollout import RolloutLoss, Windows


class DistillLoss(RolloutLoss):
    """Distribution matching (Yin et al., 2024, DMD) on self-generated history (Huang et al., 2025, Self
    Forcing). The student's window is noised and denoised again by two networks: the teacher, which knows true
    windows, and the critic, which is trained along on the student's. The student moves along the difference
    of their estimates.

    A plain squared error would make the student draw the mean of all possible frames, in which grass and
    bricks vanish. So only means over small patches of latents are compared with the true frames: the state
    tells where walls are, but not where each blade of grass stands.

    Where the true game stands still, the student must keep showing the frame it showed when that began
    (`own_reference`). Drawing the detail anew would flicker; comparing with its previous frame would let
    errors add up.

    Teacher and critic see only the last frame, with some noise on it, so that they do not copy a lack of
    detail from the student's frames.
    """

    def __init__(self, generator: Generator, stage: DistillStageConfig, teacher: Denoiser):
        super().__init__(generator, stage)
        self.teacher = teacher.requires_grad_(False)
        self.critic = copy.deepcopy(teacher).requires_grad_(True)

    def forward(self, clip: Clip, turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.logs: dict[str, Tensor] = {}
        loss, logs = super().forward(clip, turn)
        return loss, logs | self.logs

    def window_errors(self, rollout: Rollout, windows: Windows) -> tuple[Tensor, Tensor]:
        """→ the sum of all losses for each frame of the window, and its weight, both (b, w). A corrected
        leaving frame takes the place of the predicted one.
        """
        made, valid, corrected, renoised, true, still, own_reference, action = windows
        if corrected is not None:
            renoised = renoised[:, None]
            head = torch.where(renoised[..., None, None, None], corrected, made[:, :1])
            made = torch.cat([head, made[:, 1:]], 1)
            valid = torch.cat([torch.where(renoised, 1, valid[:, :1]), valid[:, 1:]], 1)
        size = min(self.stage.coarse_size, *made.shape[-2:])
        coarse = F.avg_pool2d((made - true).flatten(0, 1), size).square().mean((1, 2, 3))
        coarse = coarse.view(valid.shape) * size
        matching, critic = self._distribution_matching(rollout, made, action)
        change = (made - own_reference).square().mean((2, 3, 4))
        still = still * (change < self.stage.lost_threshold)
        self.logs = {"coarse": coarse.mean().detach(), "critic": critic.mean().detach()}
        self.logs["still_change"] = (change * still).sum().detach() / still.sum().clamp_min(1)
        self.logs["still_share"] = still.mean().detach()
        matching = self.stage.distribution_weight * (1 - still) * matching
        return coarse + self.stage.still_weight * still * change + matching + critic, valid

    def _distribution_matching(self, rollout: Rollout, made: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A window made by the student (b, w, c, y, x), the keys (b, k) → distribution matching loss of the
        student, and denoising loss of the critic, both (b, w).
        """
        b, w = made.shape[:2]
        clean = made.detach()
        (actions, features, has_state, ahead, _), _ = rollout.window_inputs(rollout.window.bind(action))
        before, level = self._noised_context(rollout.last[:, 1:])
        inputs = actions, features, has_state, ahead, level.expand(b, w)
        sigma = training_sigma(self.denoiser.ladder, b, self.stage.jitter, self.stage.lowest)
        noisy = add_noise(clean, torch.randn_like(clean), sigma)

        def estimate(network: Denoiser) -> Tensor:
            return network(noisy, sigma, before, network.condition(*inputs), 0, KVRecorder())

        with torch.no_grad():
            real = estimate(self.teacher)
        fake = estimate(self.critic)
        scale = (clean - real).abs().mean((2, 3, 4), keepdim=True).clamp_min(0.05)
        target = clean - (fake.detach() - real) / scale  # its squared error has the gradient of DMD
        matching = 0.5 * (made - target).square().mean((2, 3, 4))
        return matching, (fake - clean).square().mean((2, 3, 4))


class DistillStage(DenoiserStage):
    """Trains the denoiser of stage `denoiser` on its own games; the teacher is that denoiser, unchanged."""

    def segment(self) -> tuple[int, int]:
        sizes, stage = self.model.denoiser, self.config.stage_config()
        start = sizes.sink_frames + sizes.context_frames
        length = start + stage.game_frames + sizes.window_frames - 1
        return max(length, stage.clip), length - start

    def resume_state(self) -> list:
        """The games. Without them every resumed run would begin with young ones, and where a step takes
        seconds they would hardly grow old between two stops.
        """
        return self.module.resume_state()

    def load_resume_state(self, saved: list) -> None:
        self.module.load_resume_state(saved)

    def loss(self) -> DistillLoss:
        path = Path(self.config.out) / f"{TRAINED[self.config.stage].reads[0]}.safetensors"
        teacher = Checkpoint(path)
        own, other = (weights_digest(load_autoencoder(one), DECODER) for one in (self.before, teacher))
        if own != other:
            said = f"{path}, the teacher, was trained on other latents than {self.before.path}"
            raise UserError(f"{said}; give weights= of the same encoder, or another out=DIR.")
        teacher = self.frozen(load_denoiser(teacher))
        return DistillLoss(self.generator(), self.config.stage_config(), teacher)
