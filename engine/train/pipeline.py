"""Stage `all`: every stage in turn, each with its share of the time, resumable as a whole."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig, UserError
from ..data.collection import collect
from ..data.dataset import recorded_world
from ..files import write_whole
from ..stage_config import TRAINED
from .loop import train_stage
from .parallel import Ranks
from .resume import Standing
from .stop import Stop, Stopped

PLAN = "all.json"  # in out=DIR: minutes given to each stage, and minutes spent
LEAST = 0.01  # minutes: a stage gets no less, even if no time is left


def train_all(config: TrainConfig, ranks: Ranks, stop: Stop) -> dict[str, Any]:
    """Collects `config.frames` frames (0: none), then trains every stage to which the preset gives minutes →
    the figures of all.

    `max_minutes` is for all of it, collecting and encoding included. Whenever a stage begins, the time that
    is left is divided among it and the later ones in proportion to the preset's minutes. Finished stages are
    not trained again. Raises UserError for options that do not fit, Stopped after a signal.
    """
    names = [name for name in TRAINED if getattr(config.stages, name).max_minutes]
    if not names:
        raise UserError(f"preset={config.preset} gives no stage any minutes, so there is nothing to train.")
    if config.weights:
        said = "stage=all trains every stage from the one before it"
        raise UserError(f"{said}; weights=FILE is for a single stage, as in stage={names[0]}.")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    plan = Plan(config, names)
    if ranks.first:
        print(plan.table(), flush=True)
    with plan.clock("collect", ranks, stop):
        if config.frames and ranks.first:
            collect(replace(config, stage="collect"))
        ranks.agree(0)  # the others wait for the data
    # what only the opened game knows, such as its rate, is in its recordings
    config = replace(config, world=recorded_world(config.data, config.world, config.given))
    figures: dict[str, Any] = {"stage": "all", "checkpoint": ""}
    for name in names:
        own = replace(config, stage=name, max_minutes=0)
        standing = Standing(own)
        own = replace(own, max_minutes=ranks.firsts(plan.minutes(name, standing))[0])
        with plan.clock(name, ranks, stop):
            made = train_stage(own, ranks, stop, standing)
        if stop.signal:  # it came while the stage's last files were written
            raise Stopped(stop.signal, f"stopped after {name}, which is saved; the same command continues.")
        figures["checkpoint"] = made.pop("checkpoint")
        figures[name] = {key: value for key, value in made.items() if key != "stage"}
        gc.collect()  # frees networks, data and optimiser of the stage
    return figures | {"minutes": {name: round(value, 2) for name, value in plan.spent.items()}}


class Plan:
    """How many minutes each stage gets. `given`: minutes by stage, for those that have begun; `spent`:
    minutes by stage, over all calls of the command. Both are kept in the file PLAN.
    """

    def __init__(self, config: TrainConfig, names: list[str]):
        self.config, self.names, self.path = config, names, Path(config.out) / PLAN
        kept = _read(self.path)
        self.spent: dict[str, float] = kept.get("spent", {})
        self.given: dict[str, float] = kept.get("given", {})

    def table(self) -> str:
        """The plan, a line a stage."""
        preset = {name: getattr(self.config.stages, name).max_minutes for name in self.names}
        scale = self.config.max_minutes / sum(preset.values()) if self.config.max_minutes else 1.0
        rows = [("collect", f"{self.config.frames:,} frames")]
        rows += [
            (name, f"{self.given.get(name, minutes * scale):.4g} minutes") for name, minutes in preset.items()
        ]
        rows.append(("together", f"{self.config.max_minutes or sum(preset.values()):.4g} minutes"))
        world = self.config.world
        head = f"stage=all: {world.id or world.name}, preset={self.config.preset}, into {self.config.out}"
        return "\n".join([head, *(f"  {name:12s} {text}" for name, text in rows)])

    def minutes(self, name: str, standing: Standing) -> float:
        """Minutes of training for stage `name`. One that is continued or finished gets at least what it was
        given before.
        """
        own = getattr(self.config.stages, name).max_minutes
        if standing.state is None:
            self.spent.pop(name, None)
            self.given.pop(name, None)
        if not self.config.max_minutes:
            return self.given.setdefault(name, own)
        before = self.given.get(name, 0.0)
        if not (before and standing.finished(replace(getattr(self.config.stages, name), max_minutes=before))):
            later = self.names[self.names.index(name) :]
            left = self.config.max_minutes - sum(v for k, v in self.spent.items() if k not in later)
            shares = sum(getattr(self.config.stages, stage).max_minutes for stage in later)
            self.given[name] = max(LEAST, before, left * own / shares)
        return self.given[name]

    @contextmanager
    def clock(self, name: str, ranks: Ranks, stop: Stop) -> Iterator[None]:
        """A context whose time, without pauses, counts as spent by stage `name`."""
        begin, waited = time.perf_counter(), stop.waited
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin - (stop.waited - waited)
            self.spent[name] = self.spent.get(name, 0.0) + seconds / 60
            if ranks.first:
                self._write()

    def _write(self) -> None:
        write_whole(self.path, json.dumps({"given": self.given, "spent": self.spent}) + "\n")


def _read(path: Path) -> dict[str, dict[str, float]]:
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        return {part: {str(k): float(v) for k, v in kept[part].items()} for part in ("given", "spent")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; delete it, and finished stages stay finished.") from error
