"""Saved training states: written to a temporary file that is renamed, and checked before use."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig, UserError
from ..stage_config import StageConfig
from .provenance import ELSEWHERE, check_upstream, checkpoint_of, differences, origin_of

VERSION = 3  # of a state file's content
UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError)


def state_file(config: TrainConfig, rank: int = 0) -> Path:
    """The file of a process's training state. The first process's has everything; another's only its own
    buffers, games and random states.
    """
    return Path(config.out) / f"{config.stage}.state{rank or ''}.pt"


def write_state(path: Path, content: dict[str, Any]) -> None:
    """Saves nested plain values and tensors. If that fails, the old file stays; UserError where the disk is
    the reason.
    """
    beside = path.with_suffix(".tmp")
    try:
        torch.save(content | {"version": VERSION}, beside)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):  # torch reports a full disk as a RuntimeError
            raise
        raise UserError(
            f"Training state could not be written to {path.parent} ({error}); free some space."
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """What `write_state` wrote; None without a file; UserError where the file cannot be used."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise KeyError("version")
    except UNREADABLE as error:
        raise unfit(path) from error
    return state


def unfit(path: Path) -> UserError:
    """The error for a state file that cannot be used."""
    said = f"{path} is damaged or of another version"
    return UserError(f"{said}; delete it to start anew, or give another out=DIR.")


class Standing:
    """How far a stage has come. `origin`: what it would be made from now; `state`: the saved state to
    continue from, None to begin.

    Raises UserError where the saved state has another origin; with `again=true` that is printed, and the
    stage begins anew.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        check_upstream(config, config.stage)
        self.origin = origin_of(config)
        self.state = read_state(state_file(config))
        if self.state and (found := self._differences()):
            said = f"{state_file(config)} was begun otherwise: {', '.join(found[:4])}"
            if not config.again:
                raise UserError(f"{said}; give the same again, or {ELSEWHERE}.")
            print(f"{said}. It is trained anew.", file=sys.stderr)
            self.state = None
        elif self.state and self.state["origin"]["data"] != self.origin["data"]:
            print(f"Recordings in {config.data} came or went since {config.stage} began.", file=sys.stderr)

    def _differences(self) -> list[str]:
        found = differences(self.config, self.state["origin"], self.origin)
        wanted, was = self.config.precision, self.state["precision"]
        return found + ([f"precision was {was} and is {wanted}"] if wanted not in ("auto", was) else [])

    def finished(self, stage: StageConfig) -> bool:
        """Whether the checkpoint is there and nothing is left to do: the steps or minutes of `stage` are
        spent, or there was nothing to train.
        """
        if not self.state or not checkpoint_of(self.config, self.config.stage).is_file():
            return False
        if not self.state.get("trains", True):
            return True
        return self.state["step"] >= stage.steps or self.state["seconds"] >= 60 * stage.max_minutes
