"""Stage `ablate`: measures variants of the method, a row of figures for each, in a file of its own.

The table in docs/rolling-forcing.md is made from these files (table.py).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ..config import TrainConfig, UserError
from ..data.cache import content_of
from ..files import write_whole
from .control import control
from .drift import drift
from .fidelity import fidelity
from .latency import latency
from .section import Scope, Size
from .speed import speed
from .stage import LIBRARIES, open_scope
from .variants import VARIANTS, open_variant

ROW = replace(Size(), routes=48, states=32, flips=8, settings=False, rounds=1, steps=200)
SHORT = replace(ROW, routes=24, states=8, starts=1)  # quick=true
PICTURES = "pictures"  # in out=DIR: a folder for each row, which git ignores
TOLD = ("stage", "steps", "minutes", "seed", "device")  # fields of a checkpoint's header that a row repeats


def ablate(config: TrainConfig) -> dict:
    """Measures variants of a checkpoint in turn and writes the figures of each to out=DIR/ROW.json → what was
    done with each. Rows that exist already, of the same checkpoint, seed and size, are skipped.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(f"stage=ablate needs {' and '.join(missing)}: pip install -e '.[evaluate]'.")
    rows, out, begin = _rows(config), Path(config.out), time.perf_counter()
    scope = open_scope(replace(config, out=str(out / PICTURES)))
    scope.size = SHORT if config.quick else ROW
    done: dict[str, list[str]] = {"measured": [], "skipped": [], "left": []}
    longest = 0.0
    try:
        for number, (row, variant) in enumerate(rows.items()):
            key, file, clock = key_of(scope, row, variant), out / f"{row}.json", time.perf_counter()
            if known(file, key):
                done["skipped"].append(row)
                continue
            if config.max_minutes and clock + longest > begin + 60 * config.max_minutes:
                done["left"].append(row)
                continue
            print(f"{number + 1} of {len(rows)} rows: {row}", file=sys.stderr)
            figures = measure(scope, row, variant)
            longest = max(longest, time.perf_counter() - clock)
            made = {name: value for name, value in scope.player.checkpoint.about.items() if name in TOLD}
            seconds = round(time.perf_counter() - clock, 1)
            kept = {**key, "made": made, "machine": machine(scope), "seconds": seconds, "figures": figures}
            write_whole(file, json.dumps(kept, indent=1) + "\n")
            done["measured"].append(row)
    finally:
        if scope.truth is not None:
            scope.truth.close()
    return {**done, "out": str(out), "seconds": round(time.perf_counter() - begin, 1)}


def _rows(config: TrainConfig) -> dict[str, str]:
    """Names of the rows to measure → each one's variant."""
    names = list(config.variants) or ["full"] if config.row else list(config.variants) or list(VARIANTS)
    if not config.checkpoint:
        raise UserError("stage=ablate needs checkpoint=FILE, of which it measures variants.")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"There is no variant {unknown[0]!r}; choose of {', '.join(VARIANTS)}.")
    if not config.row:
        return {name: name for name in names}
    if len(names) > 1 or not config.row.isidentifier():
        raise UserError("row=NAME, a name of letters and digits, calls the row of a single variant so.")
    return {config.row: names[0]}


def key_of(scope: Scope, row: str, variant: str) -> dict:
    """What a row was measured on, as JSON values; a row with the same key is not measured again."""
    size, player = json.loads(json.dumps(asdict(scope.size))), scope.player
    about = {"row": row, "variant": variant, "checkpoint": player.checkpoint.digest()}
    if scope.clips:
        about["recordings"] = [content_of(recording.directory) for recording in scope.clips.recordings]
    return {**about, "seed": scope.seed, "precision": player.precision, "size": size, "frames": scope.most}


def known(file: Path, key: dict) -> bool:
    """Whether the file holds a row with this key; False for a damaged file."""
    try:
        row = json.loads(file.read_text("utf-8"))
        return all(row[name] == value for name, value in key.items()) and "figures" in row
    except (OSError, ValueError, KeyError, TypeError):
        return False


def measure(scope: Scope, row: str, variant: str) -> dict[str, float]:
    """A row's figures. Features of true frames are the scope's, as all variants have the same autoencoder."""
    own = scope.player
    player = open_variant(variant, own.checkpoint.path, own.device.type, own.precision)
    scope = replace(scope, player=player, stateless=None, folder=scope.folder.parent / row)
    scope.folder.mkdir(parents=True, exist_ok=True)
    sections = [speed(scope), fidelity(scope), control(scope), latency(scope), drift(scope)]
    return {name: value for section in sections for name, value in section.figures.items()}


def machine(scope: Scope) -> str:
    """The name of the device."""
    if scope.player.device.type == "cuda":
        return torch.cuda.get_device_name(scope.player.device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
