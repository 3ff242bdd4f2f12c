"""Stage `evaluate`: the generated world held against the true one; a report with pictures, and figures.

Held-out recordings give true clips. Where the simulator is installed it gives what no recording can: the same
moment under other keys.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..collection import collect
from ..config import TrainConfig, UserError
from ..dataset import split
from ..recording import Recording, find_recordings
from ..session import Player
from .behaviour import behaviour
from .branches import Truth
from .clips import Clips
from .control import control
from .drift import drift
from .endurance import endurance
from .features import Features
from .fidelity import fidelity
from .latency import latency
from .report import write_report
from .section import QUICK, Scope, Section, Size
from .turning import turning

FULL = Size()
SIMULATORS = {"doom": "vizdoom", "gym": "gymnasium"}
HELD_OUT = 100_000  # seed of recordings that are played for the evaluation alone
LIBRARIES = ("torchmetrics", "matplotlib")
HEADLINE = (
    *(f"psnr_{h}" for h in (1, 16, 64)),
    "ssim_1",
    "frechet",
    *(f"drift_{m}min" for m in (1, 2, 10)),
    "motion_ratio",
    "control",
    "latency_first_frames",
    "latency_half_frames",
    "latency_ms",
    "fps_p50",
)


def evaluate(config: TrainConfig) -> dict:
    """Measures a checkpoint against its world → figures; the report goes to out=DIR/evaluation."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(f"stage=evaluate needs {' and '.join(missing)}: pip install -e '.[evaluate]'.")
    begin = time.perf_counter()
    with _threads(config):
        scope = open_scope(config)
        try:
            sections = _measure(scope)
        finally:
            if scope.truth is not None:
                scope.truth.close()
    player = scope.player
    figures: dict = {"checkpoint": str(player.checkpoint.path), "world": player.world.name}
    every = {name: value for section in sections for name, value in section.figures.items()}
    figures |= {name: every[name] for name in HEADLINE if name in every} | every
    figures["seconds"] = round(time.perf_counter() - begin, 1)
    headline = (
        f"`{player.checkpoint.path}` ({player.checkpoint.digest()}) in the world {player.world.name}, on "
        f"{player.device} in {player.precision}, seed {config.seed}, {'quick' if config.quick else 'full'}."
    )
    shown = [name for name in HEADLINE if name in figures]
    write_report(scope.folder, headline, sections, figures, shown)
    return figures


def open_scope(config: TrainConfig) -> Scope:
    out = Path(config.out)
    newest = [out / f"{stage}.safetensors" for stage in ("distill", "rollout", "denoiser")]
    player = Player(
        config.checkpoint or next((p for p in newest if p.exists()), newest[0]),
        config.device,
        config.precision,
    )
    size = QUICK if config.quick else FULL
    folder = out / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    clips = Clips([Recording(path) for path in _held_out(config, player, folder, size)], player)
    features = Features(player, clips.sample(size.reference, config.seed))
    geometry = player.denoiser.config
    try:
        truth, missing = Truth.open(player.world, geometry.sink + geometry.recent, config.seed), ""
    except UserError as error:
        truth, missing = None, str(error)
    return Scope(player, clips, features, truth, missing, folder, config.seed, size, config.frames)


def _held_out(config: TrainConfig, player: Player, folder: Path, size: Size) -> list[Path]:
    """Recordings that the network was not trained on; where data=DIR holds none at all, new ones are
    played, if the simulator is there.
    """
    try:
        recordings = find_recordings(config.data)
    except UserError:
        if find_spec(SIMULATORS[player.world.kind]) is None:
            raise
        fresh = folder / "held_out"
        print(f"There is no recording in {config.data}: new ones are played into {fresh}.", file=sys.stderr)
        collect(
            replace(
                config, world=player.world, data=str(fresh), frames=size.held, seed=HELD_OUT + config.seed
            )
        )
        return find_recordings(fresh)
    return recordings if config.unseen else split(recordings)[1] or recordings


def _measure(scope: Scope) -> list[Section]:
    """All parts, one after the other."""
    clock, seconds = time.perf_counter(), {}

    def took(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    sections = [fidelity(scope), turning(scope)]
    took("fidelity and turning")
    section, games = drift(scope)
    took("drift")
    p50, p99 = np.percentile([ms for game in games.values() for ms in game.step_ms], (50, 99))
    sections += [section, control(scope)]
    took("control")
    sections.append(latency(scope))
    took("latency")
    sections.append(behaviour(scope, games["idle"]))
    took("behaviour")
    if scope.size.places:
        sections.append(endurance(scope))
        took("endurance")
    speed = Section("Speed", {"step_ms_p50": p50, "step_ms_p99": p99, "fps_p50": 1000 / p50})
    speed.round(1)
    speed.say(
        f"A step, decoding included, takes {p50:.1f} ms at the median of the long games and {p99:.1f} ms at "
        f"the 99th percentile: {1000 / p50:.0f} frames a second. This evaluation took, in seconds: "
        f"{', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}."
    )
    return [*sections, speed]


@contextmanager
def _threads(config: TrainConfig) -> Iterator[None]:
    """One torch thread unless told otherwise, as in play: steps are small, and another thread slows them."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
