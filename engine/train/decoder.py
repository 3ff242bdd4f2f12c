"""Stage `decoder`: trains the decoder on for crisp frames. The encoder does not change, so every network that
was trained on its latents still fits.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from ..data.dataset import load_frames, true_recordings
from ..data.picture import grid
from ..data.recording import Recording
from ..data.segments import Batches
from ..device import autocast
from ..model.autoencoder import Autoencoder, to_bytes, to_float
from ..model.discriminator import PatchDiscriminator
from ..model.world_model import WorldModel
from ..stage_config import DecoderStageConfig
from .denoiser import DenoiserStage


class DecoderLoss(nn.Module):
    """Pixel errors, an adversarial loss (hinge) against a conditional patch discriminator, and feature
    matching. Decoder and discriminator learn in the same step, each from its own loss alone.
    """

    def __init__(self, decoder: nn.Module, stage: DecoderStageConfig):
        super().__init__()
        self.decoder, self.stage = decoder, stage
        self.blurred = copy.deepcopy(decoder).requires_grad_(False)
        self.discriminator = PatchDiscriminator(stage.discriminator_width)

    def forward(self, batch: tuple[Tensor, Tensor], turn: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch: latents (n, c, y, x) and their true frames (n, 3, 8 y, 8 x), uint8; `turn`: the iteration's
        number → the sum of both losses, and figures to log.
        """
        latents, true = batch[0].contiguous(memory_format=torch.channels_last), to_float(batch[1])
        with torch.no_grad():
            blurred = self.blurred(latents).float()
        made = self.decoder(latents).float()
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        # the decoder's part: gradients pass through the discriminator, not into its weights
        made_scores, made_features = functional_call(self.discriminator, frozen, (made, blurred))
        # the discriminator's part: no gradients into the decoder
        pairs = torch.cat([true, made.detach()]), torch.cat([blurred, blurred])
        scores, features = self.discriminator(*pairs)
        of_true, of_made = scores.chunk(2)
        discriminator_loss = F.relu(1 - of_true).mean() + F.relu(1 + of_made).mean()
        feature_matching = sum(
            (f - both.chunk(2)[0].detach()).abs().mean()
            for f, both in zip(made_features, features, strict=True)
        )
        error = made - true
        pixels = error.abs().mean() + self.stage.squared_weight * error.square().mean()
        gan = self.stage.feature_matching_weight * feature_matching
        gan = gan - self.stage.adversarial_weight * made_scores.mean()
        gan_weight = self.stage.gan_weight * min(1.0, (turn + 1) / self.stage.gan_warmup)
        loss = pixels + gan_weight * gan + discriminator_loss
        psnr = 10 * torch.log10(4 / error.detach().square().mean())
        logs = {"discriminator": discriminator_loss.detach(), "psnr": psnr}
        return loss, logs | {"feature_matching": feature_matching.detach()}


class DecoderStage(DenoiserStage):
    """Trains the decoder on true frames and their latents with a little noise. The generator is used only to
    measure and to show decoded games.
    """

    def segment(self) -> tuple[int, int]:
        sizes = self.model.denoiser
        start = sizes.sink_frames + sizes.context_frames
        return start + sizes.window_frames, sizes.window_frames

    def loss(self) -> DecoderLoss:
        self.frozen_generator = self.frozen(self.generator())
        stage = self.config.stage_config()
        self.frames = load_frames(
            true_recordings(self.config.data, self.config.world)[0], stage.frames, self.config.seed
        )
        self.recordings: dict[str, Recording] = {}  # those that are open, by directory
        decoder = copy.deepcopy(self.autoencoder.decoder).requires_grad_(True)
        return DecoderLoss(decoder, stage)

    @torch.no_grad()
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Noisy latents (n, c, y, x) and true frames (n, 3, 8 y, 8 x) of iteration `step`."""
        random = torch.Generator().manual_seed(self.config.seed + 7919 * step + self.rank)
        count = self.config.stage_config().batch
        picked = torch.randint(len(self.frames), (count,), generator=random)
        frames = self.frames[picked].to(self.device)
        with autocast(self.device, self.dtype):
            latents = self.autoencoder.encode(frames).float()
        level = self.config.stage_config().noise * torch.rand(count, 1, 1, 1, generator=random)
        noise = level * torch.randn(latents.shape, generator=random)
        return self._cropped(latents + noise.to(self.device), frames, random)

    def _true_pictures(self, batches: Batches, turn: int, count: int) -> list[Tensor]:
        """The recorded frames after the start of each segment of a batch: what a game with the same keys
        should show, uint8 (count, 3, h, w) each.
        """
        c, segments = self.model.denoiser, batches.segments
        pictures = []
        for number, first in segments.places[batches.indices(turn)].tolist():
            directory = segments.cache.directories[number]
            if directory not in self.recordings:
                self.recordings[directory] = Recording(directory)
            start = first + c.sink_frames + c.context_frames
            frames = self.recordings[directory].frames(start, start + count)
            pictures.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
        return pictures

    def _cropped(self, latents: Tensor, frames: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same random crop of all frames and of their latents: many small crops teach more than a few
        whole frames.
        """
        (rows, columns), share = latents.shape[2:], self.config.stage_config().crop
        height, width = max(2, round(rows * share)), max(2, round(columns * share))
        y = int(torch.randint(rows - height + 1, (), generator=random))
        x = int(torch.randint(columns - width + 1, (), generator=random))
        size = frames.shape[2] // rows
        part = frames[:, :, y * size : (y + height) * size, x * size : (x + width) * size]
        return latents[:, :, y : y + height, x : x + width], part

    def trained_autoencoder(self, module: DecoderLoss) -> Autoencoder:
        """The autoencoder with the decoder in training."""
        autoencoder = copy.deepcopy(self.autoencoder)
        autoencoder.decoder.load_state_dict(module.decoder.state_dict())
        return autoencoder

    def world_model(self, module: DecoderLoss) -> WorldModel:
        return WorldModel(self.trained_autoencoder(module), self.frozen_generator)

    @torch.no_grad()
    def held_out(self, module: DecoderLoss) -> dict[str, Tensor]:
        """Held-out frames (b, t, 3, h, w), float: "true"; "read": these encoded and decoded; "own": decoded
        from the latents of the model's own games.
        """
        made = self.play(self.frozen_generator, self.shown)[1]
        true = torch.stack(self._true_pictures(self.shown, 0, made.shape[1])).to(self.device)
        autoencoder = self.frozen(self.trained_autoencoder(module))
        with autocast(self.device, self.dtype):
            read = [autoencoder.encode(x) for x in true]
            pictures = {
                name: [autoencoder.decode_pixels(z) for z in x] for name, x in (("read", read), ("own", made))
            }
        return {"true": to_float(true), **{name: torch.stack(x) for name, x in pictures.items()}}

    @torch.no_grad()
    def picture(self, module: DecoderLoss) -> np.ndarray:
        """Rows of three held-out games: true frames, the same encoded and decoded, the model's own."""
        shown = {name: x[:3, ::7] for name, x in self.held_out(module).items()}
        rows = [rearrange(to_bytes(x), "b t c h w -> b t h w c").cpu().numpy() for x in shown.values()]
        return grid([row for triple in zip(*rows, strict=True) for row in triple])

    @torch.no_grad()
    def validate(self, module: DecoderLoss) -> dict[str, float]:
        """PSNR, and sharpness and finest octave as shares of the true frames', of held-out frames: decoded
        from true latents (`read_…`) and from the model's own games (`own_…`).
        """
        shown, scores = self.held_out(module), {}
        true = shown["true"].flatten(0, 1)
        for name in ("read", "own"):
            made = shown[name].flatten(0, 1).clamp(-1, 1)
            psnr = (10 * torch.log10(4 / (made - true).square().mean((1, 2, 3)))).mean()
            scores[f"{name}_psnr"] = float(psnr)
            scores[f"{name}_sharpness"] = float(sharpness(made) / sharpness(true))
            scores[f"{name}_finest_octave"] = float(finest_octave(made) / finest_octave(true))
        return scores


def sharpness(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) → mean absolute difference of neighbouring pixels, across plus down."""
    across = (pictures[..., 1:] - pictures[..., :-1]).abs().mean()
    return across + (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean()


def finest_octave(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) → mean square of what their grey versions lose when halved and enlarged again."""
    grey = pictures.mean(1, keepdim=True)
    coarse = F.interpolate(F.avg_pool2d(grey, 2), scale_factor=2, mode="bilinear")
    return (grey - coarse).square().mean()
