"""The training loop: one stage until its steps or minutes are spent, resumed exactly, saved when stopped."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PRECISIONS, TrainConfig, UserError
from ..data.cache import stable_hash
from ..data.lock import alone
from ..data.picture import save_picture
from ..device import AUTOCAST, autocast, pick_device, pick_precision
from ..model.checkpoint import read_about
from . import optim
from .metrics import Metrics, rounded
from .parallel import Ranks
from .provenance import checkpoint_of
from .resume import UNREADABLE, Standing, read_state, state_file, unfit, write_state
from .stages import make_stage
from .stop import Stop, Stopped, paused, say_paused

PATIENCE = 100  # training gives up after so many steps in a row without finite gradients


class Training:
    """One stage in training: networks, optimiser, moving average and progress, saved and resumed together."""

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None, standing: Standing | None = None):
        self.config, self.ranks, self.stage_config = config, ranks or Ranks(), config.stage_config()
        standing = standing or Standing(config)
        state, self.origin = standing.state, standing.origin
        self.device = pick_device(config.device, self.ranks.local)
        self.precision = self._precision(state)
        self.dtype = AUTOCAST[self.precision]
        self._seed(0)
        self.stage = make_stage(config, self.device, self.dtype, self.ranks.rank, self.ranks.count)
        self.module = self.stage.module.to(self.device)
        self.optimiser = optim.Optimiser(self.module, self.stage_config)
        self.average = optim.MovingAverage(self.module, self.stage_config.ema)
        self.step, self.seconds = 0, 0.0
        self.scores: dict[str, float] = {}  # the last figures on held-out data
        if state:
            self._restore(state)
        self.runner = self.ranks.share(self.module)

    def _precision(self, state: dict[str, Any] | None) -> str:
        """The saved state's; else chosen by the first process for all: `auto` measures, and a second
        measurement may come out differently.
        """
        if state:
            return state["precision"]
        chosen = pick_precision(self.config.precision, self.device) if self.ranks.first else "fp32"
        return PRECISIONS[int(self.ranks.firsts(PRECISIONS.index(chosen))[0])]

    def _seed(self, step: int) -> None:
        """Seeds torch's random numbers, differently in each process and at each step."""
        torch.manual_seed(stable_hash(f"{self.config.seed} {self.ranks.rank} {step}"))

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: by steps or by this process's minutes, whichever is
        more.
        """
        if not self.stage.trains:
            return 1.0
        return min(
            1.0, max(self.step / self.stage_config.steps, self.seconds / 60 / self.stage_config.max_minutes)
        )

    def iterate(self, progress: float) -> dict[str, Tensor]:
        """One step of the optimiser on `accumulate` batches → means of their figures, as tensors on the
        device; nothing here waits for the device.

        If a gradient is not finite, weights, averages and momentum stay as they are, and the figure
        `finite` is False.
        """
        parts: dict[str, list[Tensor]] = {}
        for part in range(count := self.stage_config.accumulate):
            with self.ranks.apart(self.runner, last=part == count - 1):
                turn = self.step * count + part
                with autocast(self.device, self.dtype):
                    loss, logs = self.runner(self.stage.batch(turn), turn)
                (loss / count).backward()
            for name, value in {"loss": loss.detach(), **logs}.items():
                parts.setdefault(name, []).append(value)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.stage_config.grad_clip)
        finite = torch.isfinite(norm)
        self.optimiser.step(optim.learning_rate(self.stage_config, self.step, progress), finite)
        self.average.update(self.module, self.step, finite)
        self.optimiser.zero_grad()
        self.step += 1
        means = {name: torch.stack(values).mean() for name, values in parts.items()}
        return {"grad": norm, **means, "finite": finite}

    def save(self) -> None:
        """Writes the stage's checkpoint and then the state for an exact continuation. In this order, the
        state is never ahead of the checkpoint. To be called by all processes at the same step; UserError
        where their weights differ.
        """
        if not self.ranks.same(list(self.module.parameters())):
            raise UserError(
                f"At step {self.step} the processes have other weights; start again from the last save."
            )
        if self.ranks.first:
            about = {"stage": self.config.stage, "origin": self.origin | {"precision": self.precision}}
            about |= {"steps": self.step, "minutes": round(self.seconds / 60, 2), "device": str(self.device)}
            about |= {"scores": self.scores}
            self.stage.save(checkpoint_of(self.config, self.config.stage), self.average.module, about)
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state: dict[str, Any] = {"step": self.step, "random": torch.get_rng_state(), "cuda_random": cuda}
        state |= {"resume_state": self.stage.resume_state()}
        if self.ranks.first:
            state |= {"seconds": self.seconds, "precision": self.precision, "origin": self.origin}
            state |= {"scores": self.scores, "trains": self.stage.trains}
            state |= {"module": _learnt(self.module), "average": _learnt(self.average.module)}
            state |= {"optimiser": self.optimiser.state_dict()}
        else:
            state["buffers"] = self._buffers()
        write_state(state_file(self.config, self.ranks.rank), state)

    def _buffers(self) -> dict[str, Tensor]:
        """The module's buffers, which each process has its own of."""
        weights = {name for name, _ in self.module.named_parameters()}
        return {name: value for name, value in self.module.state_dict().items() if name not in weights}

    def _restore(self, state: dict[str, Any]) -> None:
        """Loads the first process's state. Games and random numbers of other processes come from their own
        files, if these were saved at the same step.
        """
        own = state if self.ranks.first else read_state(state_file(self.config, self.ranks.rank))
        try:
            self.step, self.seconds = state["step"], state["seconds"]
            self.scores = state.get("scores", {})
            module = state["module"]
            if own and own["step"] == self.step:
                module = module | own.get("buffers", {})
            for part, learnt in ((self.module, module), (self.average.module, state["average"])):
                if learnt.keys() != _learnt(part).keys():
                    raise KeyError("other networks")
                part.load_state_dict(part.state_dict() | learnt)
            self.optimiser.load_state_dict(state["optimiser"])
            if not own or own["step"] != self.step:
                self._seed(self.step)  # it was not there before
                return
            self.stage.load_resume_state(own["resume_state"])
            torch.set_rng_state(own["random"])
            if own["cuda_random"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_random"], self.device)
        except (*UNREADABLE, AttributeError) as error:
            raise unfit(state_file(self.config)) from error

    def show(self, metrics: Metrics) -> None:
        """Measures the averaged weights on held-out data, and draws a picture of what they make of it."""
        self.scores = rounded(self.stage.validate(self.average.module))
        metrics.measured(self.scores, self.step, self.seconds)
        name = Path(self.config.out) / f"{self.config.stage}.png"
        save_picture(name, self.stage.picture(self.average.module))


def _learnt(module: nn.Module) -> dict[str, Tensor]:
    """A module's state without the weights that it does not train: those are in other checkpoints."""
    frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def train_stage(
    config: TrainConfig, ranks: Ranks, stop: Stop, standing: Standing | None = None
) -> dict[str, Any]:
    """Trains one stage until its steps or minutes are spent → its last figures. When stopped by a signal it
    saves and raises Stopped; UserError where another training writes into the same folder.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    said = f"Another training is writing into {out}; wait for it, or choose another out=DIR."
    with alone(out, said) if ranks.first else nullcontext():
        return _train_alone(config, ranks, stop, standing)


def _train_alone(config: TrainConfig, ranks: Ranks, stop: Stop, standing: Standing | None) -> dict[str, Any]:
    standing = standing or Standing(config)
    if standing.finished(config.stage_config()):
        return figures_of(config)
    begun = (
        f"what was saved at step {standing.state['step']} is there"
        if standing.state
        else "nothing was saved yet"
    )
    try:
        training = Training(config, ranks, standing)
    except Stopped as error:
        raise Stopped(error.code - 128, f"stopped before the first step; {begun}.") from None
    metrics = Metrics(
        config,
        ranks,
        training.stage_config.batch * training.stage_config.accumulate * ranks.count,
        training.step,
    )
    try:
        with stop.gently():
            _run(training, metrics, stop)
            training.save()  # first, in case showing fails
            if ranks.first:
                training.show(metrics)
            training.save()  # with the scores
            ranks.agree(0)  # the others wait until all files are written
    finally:
        metrics.close()
    return metrics.last | figures_of(config)


def _run(training: Training, metrics: Metrics, stop: Stop) -> None:
    config, ranks, folder = training.config, training.ranks, Path(training.config.out)
    saved = shown = time.perf_counter()
    while True:
        # the first process's clock decides for all, and a signal to any of them
        now = time.perf_counter()
        wishes = [
            now - saved > 60 * config.save_minutes,
            now - shown > 60 * config.picture_minutes,
            paused(folder),
        ]
        share, *wishes = (ranks.first and wish for wish in (training.progress(), *wishes))
        progress, signal, save, picture, pause = ranks.agree(share, stop.signal or metrics.unheard, *wishes)
        if save or signal or picture or pause:  # whatever comes of showing it, what was learnt stays
            training.save()
            saved = time.perf_counter()
        if signal:
            said = f"stopped; saved at step {training.step}, and the same command continues."
            raise Stopped(int(signal), said)
        if picture:
            if ranks.first:
                training.show(metrics)
            shown = time.perf_counter()
        if pause:
            seconds = _wait(ranks, folder, stop)
            metrics.waited(seconds)
            stop.waited += seconds
            continue
        if progress >= 1:
            return
        start = time.perf_counter()
        logs = training.iterate(progress)
        training.seconds += time.perf_counter() - start
        if metrics.add(logs, training.step, training.seconds, progress) >= PATIENCE:
            said = f"The gradients of stage {config.stage} were not finite for {PATIENCE} steps in a row"
            raise UserError(f"{said}; try a lower stages.{config.stage}.learning_rate, or precision=fp32.")


def _wait(ranks: Ranks, folder: Path, stop: Stop) -> float:
    """Waits until the pause file is gone or a signal comes → the seconds it took."""
    begin = time.perf_counter()
    if ranks.first:
        say_paused(folder)
    while True:
        time.sleep(1.0)
        pause, signal = ranks.agree(ranks.first and paused(folder), stop.signal)
        if signal or not pause:
            return time.perf_counter() - begin


def figures_of(config: TrainConfig) -> dict[str, Any]:
    """Stage, steps, minutes and scores of a finished stage, read from its checkpoint, and the file's path."""
    path = checkpoint_of(config, config.stage)
    about = read_about(path)
    figures = {name: about[name] for name in ("stage", "steps", "minutes", "scores") if name in about}
    return figures | {"checkpoint": str(path)}
