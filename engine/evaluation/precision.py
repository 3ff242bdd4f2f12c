"""Stage `precision`: how long a step of a checkpoint takes in each precision on this machine, and how far its
pictures are from those of float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import PRECISIONS, TrainConfig, UserError
from ..data.starts import Start, packed_starts
from ..rollout.player import Player
from ..rollout.session import Session

FRAMES = 16  # compared from each start; timed steps follow


def precision(config: TrainConfig) -> dict:
    """Plays `config.steps` frames (100 unless given) in every precision, with the same seeds and keys from
    the shipped starts → milliseconds of a step (p50), and the peak signal-to-noise ratio in dB of the first
    frame and of the first 16 against float32's, in which a game in another precision goes its own way.
    """
    steps, path = config.steps or 100, Path(config.checkpoint or "assets/doom_gathering.safetensors")
    figures: dict = {"checkpoint": str(path)}
    true: np.ndarray | None = None
    print("precision  step ms p50  first frame dB  16 frames dB")
    for name in tqdm(PRECISIONS[1:], desc="precision", unit="precision", disable=None):
        try:
            frames, p50 = _play(Player(path, config.device, name), path, steps, config.seed)
        except UserError as error:
            if true is None:  # float32 itself failed, so nothing can be compared
                raise
            print(f"{name:9s}  {error}")
            continue
        true = frames if true is None else true
        first, all_of_them = _psnr(frames[:, :1], true[:, :1]), _psnr(frames, true)
        print(f"{name:9s}  {p50:11.1f}  {first:14.1f}  {all_of_them:12.1f}")
        row = {"step_ms_p50": p50, "psnr_1": first, "psnr_16": all_of_them}
        figures[name] = {key: round(float(value), 2) for key, value in row.items()}
    return figures


def _play(player: Player, path: Path, steps: int, seed: int) -> tuple[np.ndarray, float]:
    """→ the first frames of each game, uint8 (games, frames, h, w, 3), and milliseconds of a step."""
    session = Session(player)
    space, games = session.action_space, []
    made = player.checkpoint
    starts = list(packed_starts(made.extras, made.model, made.world).values())
    blank = np.zeros((1, player.world.height, player.world.width, 3), np.uint8)
    starts = starts or [Start("blank", blank, np.zeros((1, len(space)), np.float32))]
    for number, start in enumerate(starts):
        random = np.random.default_rng(seed + number)
        session.begin(seed + number, start)
        count = max(FRAMES, steps) if number == len(starts) - 1 else FRAMES
        frames = []
        for frame in range(count):
            if frame % 4 == 0:
                keys = (random.random(len(space)) < 0.3).astype(np.float32)
            frames.append(session.step(keys))
        games.append(np.stack(frames[:FRAMES]))
    return np.stack(games), float(np.median(session.step_ms))


def _psnr(made: np.ndarray, true: np.ndarray) -> float:
    """PSNR of uint8 pictures in dB; 99 for equal ones."""
    error = np.square(made.astype(np.float64) - true).mean()
    return 10 * np.log10(255**2 / error) if error else 99.0
