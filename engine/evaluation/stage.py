"""Stage `evaluate`: compares the generated world with the true one; a report with pictures, and figures.

With a simulator no recordings are needed. Without one, held-out recordings give true clips, and parts that
need the true world are left out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..config import TrainConfig, UserError
from ..data.about_world import agreed
from ..data.dataset import true_recordings
from ..data.recording import Recording
from ..data.sight import wall_views
from ..rollout.player import Player
from ..stage_config import TRAINED
from .behaviour import behaviour
from .build_routes import FRAMES, KINDS, Builder
from .clips import Clips
from .control import control
from .drift import POLICIES, drift, long_drift
from .features import Reference
from .fidelity import fidelity
from .latency import latency
from .probe import WallProbe
from .report import write_report
from .returning import returning
from .route import RETURN, Route, load_routes, shipped_routes
from .section import QUICK, STATELESS, Scope, Section, Size
from .section_cache import SectionCache, key_of
from .speed import speed
from .truth import Truth

FULL = Size()
SAMPLE = 7000  # seed of the true frames with which generated ones are compared
MEASURED: dict[str, Callable[[Scope], Section]] = {
    "fidelity": fidelity,
    "returning": returning,
    "control": control,
    "latency": latency,
    "behaviour": behaviour,
    "speed": speed,
    "drift": drift,
    "long_drift": long_drift,
}  # the parts, in the report's order
LIBRARIES = ("torchmetrics", "matplotlib")
HEADLINE = (
    *(f"psnr_{h}" for h in (1, 8, 16, 64)),
    *(f"sharpness_{h}" for h in (1, 8, 16, 64)),
    *(f"octave1_{h}" for h in (1, 8, 16, 64)),
    *(f"highpass_{h}" for h in (1, 8)),
    *(f"psnr_{h}{STATELESS}" for h in (1, 8, 16, 64)),
    "frechet",
    "wall_ratio",
    "drift_wall_ratio",
    "flicker_idle",
    "control",
    "control_low",
    "control_high",
    *(f"return_psnr_{s}" for s in (5, 10, 20)),
    *(f"return_psnr_{s}{STATELESS}" for s in (5, 10, 20)),
    *(f"drift_{m}min_{policy}" for m in (1, 2, 10) for policy in POLICIES),
    *(f"motion_{m}min_{policy}" for m in (1, 2, 10) for policy in POLICIES[:2]),
    "latency_first_frames",
    "latency_half_frames",
    "latency_ms",
    "fps_p50",
    "real_time",
    "collapses",
)


def evaluate(config: TrainConfig) -> dict:
    """Compares a checkpoint with its world → figures; the report is written to out=DIR/evaluation. Parts that
    an earlier call has finished are not measured again. With `max_minutes` some parts may be left for the
    next call; the figures name them, and there is no report yet.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(f"stage=evaluate needs {' and '.join(missing)}: pip install -e '.[evaluate]'.")
    begin = time.perf_counter()
    scope = open_scope(config)
    try:
        cache = SectionCache(scope.folder / "parts", key_of(scope))
        until = begin + 60 * config.max_minutes if config.max_minutes else float("inf")
        sections, seconds, left = _measure(scope, cache, until)
    finally:
        if scope.truth is not None:
            scope.truth.close()
    player = scope.player
    figures: dict = {"checkpoint": str(player.checkpoint.path), "world": player.world.name}
    figures |= {"held_out": not scope.learnt} if scope.clips else {}
    every = {name: value for section in sections for name, value in section.figures.items()}
    figures |= {name: every[name] for name in HEADLINE if name in every} | every
    figures["seconds"] = round(sum(seconds.values()), 1)
    if left:
        print(
            f"The {config.max_minutes:g} minutes are spent; left are {', '.join(left)}. What is measured "
            f"lies in {cache.folder}: the same command goes on.",
            file=sys.stderr,
        )
        return figures | {"left": ", ".join(left)}
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    sections[-1].say(f"This evaluation took, in seconds: {took}.")
    headline = (
        f"`{player.checkpoint.path}` ({player.checkpoint.digest()}) in the world {player.world.name}, on "
        f"{player.device} in {player.precision}, seed {config.seed}, {'quick' if config.quick else 'full'}."
    )
    headline += f"\n\n**{scope.learnt}**" if scope.learnt else ""
    shown = [name for name in HEADLINE if name in figures]
    write_report(scope.folder, headline, sections, figures, shown)
    for name in seconds:
        cache.drop(name)
    return figures


def open_scope(config: TrainConfig) -> Scope:
    """Opens a checkpoint and its world, and samples true frames. Raises UserError for what cannot be
    evaluated.
    """
    out = Path(config.out)
    names = list(TRAINED)
    newest = [out / f"{name}.safetensors" for name in names[: names.index("denoiser") - 1 : -1]]
    chosen = config.checkpoint or next((path for path in newest if path.exists()), newest[0])
    player = Player(chosen, config.device, config.precision, state=config.state)
    agreed(
        {player.checkpoint.path: asdict(player.world)}, config.world, config.given
    )  # refuses world= of another one
    stateless = Player(chosen, config.device, config.precision, state=False) if player.states else None
    size = QUICK if config.quick else FULL
    folder = out / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    file = config.routes or shipped_routes(player.world.name, player.world.keys)
    routes = load_routes(file, player.world.name, player.world.keys) if file else []
    try:
        truth, missing = Truth.open(player.world, player.known_frames, config.seed), ""
    except UserError as error:
        truth, missing = None, str(error)
    what = {"player": player, "stateless": stateless, "truth": truth, "missing": missing}
    what |= {"routes": routes, "folder": folder, "seed": config.seed, "size": size, "most": config.frames}
    if truth is None:
        return _without_truth(config, what)
    with ExitStack() as stack:  # closes the simulator if this fails
        stack.callback(truth.close)
        lines = truth.world.map_lines()
        what["routes"] = routes or _drawn_routes(truth, lines, player.world.fps, config.seed, size)
        if all(route.kind.startswith(RETURN) for route in what["routes"]):
            if routes:
                raise UserError(
                    f"{file} holds only routes back to their start; add others, or choose another."
                )
            said = f"its episodes end before a route of {FRAMES} frames does."
            return _without_truth(config, what | {"truth": None, "missing": said})
        frames, told = truth.sample(size.reference, SAMPLE + config.seed)
        walls = wall_views(told, lines)
        both = walls is not None and 0 < walls.mean() < 1
        probe = WallProbe(frames, walls) if both else None
        scope = Scope(**what, clips=None, reference=Reference(frames), probe=probe, lines=lines)
        stack.pop_all()
        return scope


def _drawn_routes(truth: Truth, lines: np.ndarray, fps: float, seed: int, size: Size) -> list[Route]:
    """Routes drawn for a world without shipped ones."""
    share = size.routes / sum(KINDS.values())
    kinds = {kind: math.ceil(share * count) for kind, count in KINDS.items()}
    returns = {seconds: size.returns for seconds in size.return_seconds}
    return list(Builder(truth, lines, fps, seed).build(kinds, returns))


def _without_truth(config: TrainConfig, what: dict) -> Scope:
    """A scope with recordings in place of the true world, those on which the network was not trained."""
    train, held_out = true_recordings(config.data, what["player"].world)
    recordings = train + held_out if config.unseen else held_out or train
    if not (config.unseen or held_out):
        what["learnt"] = (
            f"{config.data} holds a single recording, of which nothing was held out: the network may have "
            "learned what it is measured on, and then the figures are better than they should be."
        )
        print(what["learnt"], file=sys.stderr)
    clips = Clips([Recording(path) for path in recordings], what["player"])
    reference = Reference(clips.sample(what["size"].reference, config.seed))
    return Scope(**what, clips=clips, reference=reference, probe=None, lines=np.zeros((0, 4)))


def _measure(
    scope: Scope, cache: SectionCache, until: float
) -> tuple[list[Section], dict[str, float], list[str]]:
    """Measures the parts in turn. None is begun after the clock reads `until`, except for a first one;
    finished ones are taken from the cache → sections, seconds by part, and names of the parts that are left.
    """
    names = [name for name in MEASURED if name != "long_drift" or scope.size.long_minutes]
    found = {name: part for name in names if (part := cache.find(name))}
    if found:
        print(f"Taken over from {cache.folder}: {', '.join(found)}.", file=sys.stderr)
    measured = 0
    for name in names:
        begin = time.perf_counter()
        if name in found or (measured and begin >= until):
            continue
        cache.drop(name)
        section = MEASURED[name](scope)
        found[name] = section, time.perf_counter() - begin
        cache.keep(name, *found[name])
        measured += 1
    done = {name: found[name] for name in names if name in found}
    seconds = {name: took for name, (_, took) in done.items()}
    return [section for section, _ in done.values()], seconds, [name for name in names if name not in done]
