"""Figures of a training: JSON lines, a progress bar, and TensorBoard if wanted."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import TrainConfig, UserError
from ..files import write_whole
from .parallel import Ranks
from .stop import GONE


class Metrics:
    """Means of figures over `log_every` steps and all processes, written by the first process.

    `per_step`: samples in a step of all processes together. `step`: where training continues; lines of later
    steps in the file are removed, as these steps will be done again.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, per_step: int, step: int):
        self.every, self.per_step, self.ranks, self.loud = config.log_every, per_step, ranks, ranks.first
        self.last: dict[str, float] = {}
        self.unheard = 0  # GONE once what is told could not be written
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}  # not every step has every figure
        self._steps, self._since = 0, time.perf_counter()
        self._skipped_before = 0  # steps whose gradients were not finite, up to the last figures
        self._file = self._board = None
        if self.loud:
            path = Path(config.out) / f"{config.stage}.jsonl"
            _cut(path, step)
            self._file = open(path, "a")  # noqa: SIM115
            self._board = _tensorboard(config) if config.tensorboard else None
        self.bar = tqdm(
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}",
            **{"desc": config.stage, "unit": "%", "total": 100, "disable": not self.loud},
        )

    def add(self, logs: dict[str, torch.Tensor], step: int, seconds: float, progress: float) -> int:
        """Takes the figures of one step, after which `step` steps are done; they are ignored where
        `logs["finite"]` is False. Every `log_every` steps, the only ones that wait for the device, the means
        are written → then: how many steps in a row were not finite, at least; else 0.
        """
        finite = logs.pop("finite")
        for name, value in (logs | {"finite": finite}).items():
            value = torch.where(finite, value.detach().float(), 0)
            self._sums[name] = self._sums.get(name, 0) + value
            self._counts[name] = self._counts.get(name, 0) + finite.float()
        self._steps += 1
        if self._steps < self.every:
            return 0
        now = time.perf_counter()
        names = sorted(self._sums)
        table = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in names]).tolist()
        sums = self.ranks.summed(dict(zip(names, table, strict=True)))
        skipped = self._steps - int(sums["finite"][0] / self.ranks.count)
        means = {n: total / count for n, (total, count) in sums.items() if count and n != "finite"}
        means["rate"] = self._steps * self.per_step / (now - self._since)
        self.last = rounded(means | {"skipped": skipped})
        in_a_row = self._skipped_before + skipped
        self._skipped_before = in_a_row if skipped == self._steps else 0
        self._sums, self._counts, self._steps, self._since = {}, {}, 0, now
        if self.loud:
            self._write(step, seconds, progress)
        return in_a_row

    def _write(self, step: int, seconds: float, progress: float) -> None:
        line = {"step": step, "minutes": round(seconds / 60, 2)} | self.last
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board:
            for name, value in self.last.items():
                self._board.add_scalar(name, value, step)
        self.bar.n = 100 * progress
        shown = (f"{name} {value:.4g}" for name, value in self.last.items() if name != "skipped" or value)
        try:
            self.bar.set_postfix_str(" ".join(shown))
        except OSError:
            self.unheard, self.bar.disable = GONE, True

    def measured(self, figures: dict[str, float], step: int, seconds: float) -> None:
        """Writes a line of figures that were measured on held-out data with the averaged weights."""
        figures = rounded(figures)
        line = {"step": step, "minutes": round(seconds / 60, 2), "held_out": figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in figures.items() if self._board else ():
            self._board.add_scalar(f"held_out/{name}", value, step)

    def waited(self, seconds: float) -> None:
        """Leaves a pause of so many seconds out of the rate."""
        self._since += seconds

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """The figures with five significant digits."""
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def _cut(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and broken ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # half a line, from a kill
    write_whole(path, "".join(kept))


def _tensorboard(config: TrainConfig):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard=true needs the extra: pip install -e '.[train]'.") from error
    return SummaryWriter(str(Path(config.out) / "tensorboard" / config.stage))
