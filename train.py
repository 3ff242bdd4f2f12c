"""Trains everything: python train.py stage=NAME [name=value ...]

Stages: collect, autoencoder, motion, denoiser, rollout, distill, evaluate. Each reads what the one before it
wrote, in this order, takes max_minutes=M and goes on where it was stopped. Besides: frontier times networks
of several sizes here, precision times a checkpoint in each precision and compares the pictures, and ablate
measures a checkpoint that plays without parts of the method: checkpoint=FILE out=docs/ablation.
Often used options:
  world=NAME        which game: doom_gathering doom_arena doom_defend doom_home gym (with world.id=...)
  preset=NAME       toy (seconds) · laptop (overnight on 2 cores) · gpu (under 25 minutes on one big GPU)
  data=DIR          recordings      out=DIR   checkpoints, metrics and pictures
  frames=N          collect: how many      max_minutes=M   seed=N   device=auto|cpu|cuda   threads=N
All options with their defaults: engine/config.py, TrainConfig.
Several processes: torchrun --nproc-per-node N train.py ...
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine import optim
from engine.config import TrainConfig, UserError, load_config
from engine.device import AUTOCAST, autocast, pick_device, pick_precision
from engine.layers import choose_kernels

RANDOM = ("random", "cuda_random")  # what of a saved state belongs to one process alone
UNREADABLE = (OSError, EOFError, pickle.UnpicklingError)
MISSHAPEN = (RuntimeError, KeyError, ValueError, TypeError, AttributeError)


class Training:
    """One stage in training: its networks, optimiser, moving average and where it stands; saved and resumed
    whole.
    """

    def __init__(self, config: TrainConfig, rank: int, ranks: int):
        from engine.stages import make_stage

        self.config, self.rank, self.pace = config, rank, config.pace()
        self.device = pick_device(config.device)
        if self.device.type == "cuda" and ranks > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.dtype = AUTOCAST[pick_precision(config.precision, self.device)]
        torch.manual_seed(config.seed + 1000 * rank)
        self.stage = make_stage(config, self.device, self.dtype, rank, ranks)
        self.module = self.stage.module.to(self.device)
        self.optimiser = optim.Optimiser(self.module, self.pace)
        self.average = optim.moving_average(self.module, self.pace.ema)
        # in turns some weights have no gradient, on all processes alike; and each process has its own games
        words = {"find_unused_parameters": config.stage == "distill", "broadcast_buffers": False}
        self.runner = DistributedDataParallel(self.module, **words) if ranks > 1 else self.module
        if config.compile:
            self.runner = torch.compile(self.runner)
        self.step, self.seconds = 0, 0.0
        self.folder = Path(config.out)
        self.state_file = self.folder / f"{config.stage}.state{rank or ''}.pt"

    def progress(self) -> float:
        """Share of the run that is done, by steps or by minutes, whichever is further; the same on every
        process.
        """
        share = max(self.step / self.pace.steps, self.seconds / 60 / self.pace.max_minutes)
        if dist.is_initialized():
            told = torch.tensor([share])
            dist.broadcast(told.to(self.device) if dist.get_backend() == "nccl" else told, 0)
            share = told.item()
        return min(1.0, share)

    def iterate(self, progress: float) -> dict[str, torch.Tensor]:
        """One optimiser step → logs, still on the device."""
        with autocast(self.device, self.dtype):
            loss, logs = self.runner(self.stage.batch(self.step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.pace.grad_clip)
        if torch.isfinite(norm):
            self.optimiser.step(optim.learning_rate(self.pace, self.step, progress))
        self.optimiser.zero_grad()
        self.average.update_parameters(self.module)
        self.step += 1
        return {"loss": loss.detach(), "grad": norm, **logs}

    def save(self) -> None:
        """Everything that an exact continuation needs, written beside and then renamed; then the stage's
        checkpoint.
        """
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        beside = self.state_file.with_suffix(".tmp")
        try:
            torch.save(state, beside)
            os.replace(beside, self.state_file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            beside.unlink(missing_ok=True)
            raise UserError(
                f"Training state could not be written to {self.folder} ({error}); free some space."
            ) from error
        if self.rank == 0:
            about = {"steps": self.step, "minutes": round(self.seconds / 60, 1), "device": str(self.device)}
            self.stage.save(self.folder / f"{self.config.stage}.safetensors", self.average.module, about)

    def resume(self) -> None:
        """Goes on from the first process's state; only the random state is each process's own."""
        first = self.folder / f"{self.config.stage}.state.pt"
        if not first.exists():
            return
        try:
            state = torch.load(first, map_location="cpu", weights_only=True)
            if self.rank and self.state_file.exists():
                state |= {key: torch.load(self.state_file, weights_only=True)[key] for key in RANDOM}
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (*UNREADABLE, *MISSHAPEN) as error:
            said = f"{first} is damaged or does not fit this config"
            raise UserError(f"{said}; delete it to start anew, or give another out=DIR.") from error
        self.step, self.seconds = state["step"], state["seconds"]
        if self.rank and not self.state_file.exists():
            torch.manual_seed(self.config.seed + 1000 * self.rank + self.step)  # it was not there before
            return
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)

    def picture(self) -> None:
        from engine.picture import save_picture

        save_picture(self.folder / f"{self.config.stage}.png", self.stage.picture(self.average.module))


class Metrics:
    """A JSON line every few steps, a progress bar, and TensorBoard where asked for; silent on all ranks but
    the first.
    """

    def __init__(self, training: Training):
        config, self.training = training.config, training
        self.loud = training.rank == 0
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}  # not every iteration has every figure
        self.count, self.since = 0, time.perf_counter()
        self.file = open(Path(config.out) / f"{config.stage}.jsonl", "a") if self.loud else None  # noqa: SIM115
        self.board = _tensorboard(config) if self.loud and config.tensorboard else None
        words = {"desc": config.stage, "unit": "%", "total": 100, "disable": not self.loud}
        self.bar = tqdm(
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}", **words
        )
        self.last: dict[str, float] = {}

    def add(self, logs: dict[str, torch.Tensor], progress: float) -> None:
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.count += 1
        if self.count < self.training.config.log_every:
            return
        now = time.perf_counter()
        rate = self.count * self.training.pace.batch / (now - self.since)
        self.last = {name: float(value) / self.counts[name] for name, value in self.sums.items()} | {
            "rate": rate
        }
        self.sums, self.counts, self.count, self.since = {}, {}, 0, now
        if not self.loud:
            return
        step, minutes = self.training.step, self.training.seconds / 60
        self.file.write(json.dumps({"step": step, "minutes": round(minutes, 2)} | _rounded(self.last)) + "\n")
        self.file.flush()
        if self.board:
            for name, value in self.last.items():
                self.board.add_scalar(name, value, step)
        self.bar.n = 100 * progress
        self.bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in self.last.items()))

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def _tensorboard(config: TrainConfig):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard=true needs the extra: pip install -e '.[train]'.") from error
    return SummaryWriter(str(Path(config.out) / "tensorboard" / config.stage))


def run_stage(config: TrainConfig) -> dict:
    """Trains one stage until its steps or minutes are spent → figures."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() and config.device != "cpu" else "gloo")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        training = Training(config, rank, ranks)
        training.resume()
        metrics = Metrics(training)
        saved = shown = time.perf_counter()
        while (progress := training.progress()) < 1:
            start = time.perf_counter()
            metrics.add(training.iterate(progress), progress)
            training.seconds += time.perf_counter() - start
            if time.perf_counter() - saved > 60 * config.save_minutes:
                training.save()
                saved = time.perf_counter()
            if rank == 0 and time.perf_counter() - shown > 60 * config.picture_minutes:
                training.picture()
                shown = time.perf_counter()
        metrics.close()
        training.save()
        if rank == 0:
            training.picture()
        about = {"stage": config.stage, "steps": training.step, "minutes": training.seconds / 60}
        return (
            _rounded(metrics.last)
            | about
            | {"checkpoint": str(training.folder / f"{config.stage}.safetensors")}
        )
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        config = load_config("train", TrainConfig, arguments)
        if config.threads:
            torch.set_num_threads(config.threads)
        choose_kernels(config.kernels)
        if config.stage == "collect":
            from engine.collection import collect

            figures = collect(config)
        elif config.stage == "evaluate":
            from engine.evaluation import evaluate

            # killed at once, it would leave its simulator behind
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            figures = evaluate(config)
        elif config.stage == "ablate":
            from engine.evaluation import ablate

            signal.signal(signal.SIGTERM, signal.default_int_handler)
            figures = ablate(config)
        elif config.stage == "frontier":
            from engine.frontier import frontier

            figures = frontier(config)
        elif config.stage == "precision":
            from engine.precision import precision

            figures = precision(config)
        else:
            figures = run_stage(config)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        print(
            f"train.py: {error.filename} cannot be written; choose another place with out=DIR.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; the same command continues from the last save.", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
