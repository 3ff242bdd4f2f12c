"""Fidelity: generated frames against the true ones that came of the same keys."""

from __future__ import annotations

import numpy as np

from ..picture import grid, save_picture
from .generated import moved, roll
from .measures import psnr, sharpness, ssim
from .section import Scope, Section

HORIZONS = (1, 16, 64)  # frames after the start at which pictures are compared
EVERY = 4  # of the generated frames, for the Fréchet distance


def fidelity(scope: Scope) -> Section:
    """PSNR and SSIM against the true frames after 1, 16 and 64 frames, PSNR of doing nothing (the last frame
    repeated), both also where a key is held, and that of the autoencoder alone, which bounds it; sharpness in
    shares of the true frames' own; Fréchet distances to other true frames, of the generated and the true.
    """
    player, clips, start = scope.player, scope.clips, scope.history
    horizons = [h for h in HORIZONS if clips.places(start + h)] or HORIZONS[:1]  # episodes may be short
    length = start + horizons[-1]
    frames, actions = clips.choose(clips.places(length), scope.size.clips, length, scope.seed)
    made = roll(player, frames, actions, scope.seed, "fidelity")
    true = frames[:, start:]
    section = Section("Fidelity")
    figures = section.figures
    for horizon in horizons:
        pair = made[:, horizon - 1], true[:, horizon - 1]
        figures[f"psnr_{horizon}"], figures[f"ssim_{horizon}"] = psnr(*pair), ssim(*pair)
        figures[f"sharpness_{horizon}"] = sharpness(pair[0]) / sharpness(pair[1])
    figures["psnr_1_repeat"] = psnr(frames[:, start - 1], true[:, 0])
    figures["psnr_1_moved"] = psnr(moved(player, frames[:, :start], actions[:, : start + 1]), true[:, 0])
    moving = actions[:, start].any(-1).numpy()  # a still picture is easy to repeat
    if moving.any():
        figures["psnr_1_moving"] = psnr(made[moving, 0], true[moving, 0])
        figures["psnr_1_moving_repeat"] = psnr(frames[moving, start - 1], true[moving, 0])
    rebuilt = np.stack([player.decode(player.encode(clip[start : start + 1])[0])[0] for clip in frames])
    figures["psnr_autoencoder"] = psnr(rebuilt, true[:, 0])
    figures["ssim_autoencoder"] = ssim(rebuilt, true[:, 0])
    figures["sharpness_autoencoder"] = sharpness(rebuilt) / sharpness(true[:, 0])
    for name, some in (("frechet", made), ("frechet_true", true)):
        figures[name] = scope.features.distance(some[:, ::EVERY].reshape(-1, *some.shape[2:]))
    section.round(3)
    _tell(section, horizons, len(frames), len(scope.features.true))
    rows = [x[i, ::8] for i in range(min(4, len(made))) for x in (true, made)]
    save_picture(scope.folder / "rollout.png", grid(rows))
    section.show("rollout.png", "Every eighth frame of four clips: true, and generated below")
    return section


def _tell(section: Section, horizons: list[int], clips: int, reference: int) -> None:
    f = section.figures
    section.say(
        f"{clips} held-out clips; the network starts from their true frames and is given their keys. Fréchet "
        f"distances of autoencoder features are to {reference} other true frames; that of the clips' own "
        f"true frames is the floor: {f['frechet']:.3g} generated, {f['frechet_true']:.3g} true."
    )
    rows = [[f"after {h}", f[f"psnr_{h}"], f[f"ssim_{h}"], f[f"sharpness_{h}"]] for h in horizons]
    bound = [f"{name}_autoencoder" for name in ("psnr", "ssim", "sharpness")]
    rows.append(["autoencoder alone, which bounds it", *(f[name] for name in bound)])
    rows.append(["last frame repeated, after 1", f["psnr_1_repeat"], "", ""])
    rows.append(["last frame moved, nothing drawn, after 1", f["psnr_1_moved"], "", ""])
    section.table(["frames", "PSNR, dB", "SSIM", "sharpness, share of the true"], rows)
