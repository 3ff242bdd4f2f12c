"""Stage `evaluate`: the generated world held against the true one; a report with pictures, and figures.

Held-out recordings give true clips. Where the simulator is installed it gives what no recording can: the same
moment under other keys.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

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
from .parts import Parts, key_of
from .report import write_report
from .section import QUICK, Scope, Section, Size
from .speed import speed
from .turning import turning

FULL = Size()
SIMULATORS = {"doom": "vizdoom", "gym": "gymnasium"}
HELD_OUT = 100_000  # seed of recordings that are played for the evaluation alone
MEASURED: dict[str, Callable[[Scope], Section]] = {
    "fidelity": fidelity,
    "turning": turning,
    "drift": drift,
    "control": control,
    "latency": latency,
    "behaviour": behaviour,
    "endurance": endurance,
    "speed": speed,
}  # the parts, in the report's order
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
    """Measures a checkpoint against its world → figures; the report goes to out=DIR/evaluation. Parts that an
    earlier call has finished are taken over; with `max_minutes` some may be left for the next one, named in
    the figures, and there is no report yet.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(f"stage=evaluate needs {' and '.join(missing)}: pip install -e '.[evaluate]'.")
    begin = time.perf_counter()
    scope = open_scope(config)
    try:
        parts = Parts(scope.folder / "parts", key_of(scope))
        until = begin + 60 * config.max_minutes if config.max_minutes else float("inf")
        sections, seconds, left = _measure(scope, parts, until)
    finally:
        if scope.truth is not None:
            scope.truth.close()
    player = scope.player
    figures: dict = {"checkpoint": str(player.checkpoint.path), "world": player.world.name}
    every = {name: value for section in sections for name, value in section.figures.items()}
    figures |= {name: every[name] for name in HEADLINE if name in every} | every
    figures["seconds"] = round(sum(seconds.values()), 1)
    if left:
        print(
            f"The {config.max_minutes:g} minutes are spent; left are {', '.join(left)}. What is measured "
            f"lies in {parts.folder}: the same command goes on.",
            file=sys.stderr,
        )
        return figures | {"left": ", ".join(left)}
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    sections[-1].say(f"This evaluation took, in seconds: {took}.")
    headline = (
        f"`{player.checkpoint.path}` ({player.checkpoint.digest()}) in the world {player.world.name}, on "
        f"{player.device} in {player.precision}, seed {config.seed}, {'quick' if config.quick else 'full'}."
    )
    shown = [name for name in HEADLINE if name in figures]
    write_report(scope.folder, headline, sections, figures, shown)
    for name in seconds:
        parts.drop(name)
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


def _measure(scope: Scope, parts: Parts, until: float) -> tuple[list[Section], dict[str, float], list[str]]:
    """The parts one after the other, those that are found finished or can be begun before the clock reads
    `until`, but one at least → their sections, the seconds that each took, and the names of those left.
    """
    names = [name for name in MEASURED if name != "endurance" or scope.size.places]
    found = {name: part for name in names if (part := parts.find(name))}
    if found:
        print(f"Taken over from {parts.folder}: {', '.join(found)}.", file=sys.stderr)
    measured = 0
    for name in names:
        begin = time.perf_counter()
        if name in found or (measured and begin >= until):
            continue
        parts.drop(name)
        section = MEASURED[name](scope)
        found[name] = section, time.perf_counter() - begin
        parts.keep(name, *found[name])
        measured += 1
    done = {name: found[name] for name in names if name in found}
    seconds = {name: took for name, (_, took) in done.items()}
    return [section for section, _ in done.values()], seconds, [name for name in names if name not in done]
