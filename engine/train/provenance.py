"""The origin of a stage: what it is made from and how. Stored in its checkpoint, compared on resuming."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

from ..config import TrainConfig, UserError
from ..data.find import find_recordings
from ..data.recording import ACTIONS, FRAMES, HEADER
from ..model.checkpoint import file_digest, read_about
from ..stage_config import TRAINED

FREE = ("steps", "max_minutes")  # fields of a stage's config that may change between calls
ELSEWHERE = "start anew with again=true, or in another out=DIR"


def checkpoint_of(config: TrainConfig, stage: str) -> Path:
    """The file of a stage's checkpoint."""
    return Path(config.out) / f"{stage}.safetensors"


def origin_of(config: TrainConfig) -> dict[str, Any]:
    """What `config.stage` is made from (digests of checkpoints and data) and how (configs, seed), for
    JSON.
    """
    stage = {name: value for name, value in asdict(config.stage_config()).items() if name not in FREE}
    made_from = {
        name: file_digest(path)
        for name in TRAINED[config.stage].reads
        if (path := checkpoint_of(config, name)).is_file()
    }
    if config.weights and Path(config.weights).is_file():
        made_from["weights"] = file_digest(Path(config.weights))
    about = {
        "made_from": made_from,
        "stage": stage,
        "model": _model_of(config),
        "world": asdict(config.world),
    }
    return about | {"seed": config.seed, "data": data_digest(config.data)}


def _model_of(config: TrainConfig) -> dict[str, Any]:
    """The parts of the model's config that the stage makes, and fields of the others given as options."""
    makes = TRAINED[config.stage].makes
    model = {part: asdict(getattr(config.model, part)) for part in makes}
    for option in config.given:
        parts = option.split(".")
        if parts[0] == "model" and len(parts) == 3 and parts[1] not in makes:
            model[".".join(parts[1:])] = reduce(getattr, parts[1:], config.model)
    return model


def data_digest(data: str) -> str:
    """Short hash of the recordings' names and the sizes of their files."""
    digest, root = hashlib.sha256(), Path(data)
    for recording in find_recordings(root):
        files = (recording / name for name in (HEADER, ACTIONS, FRAMES))
        sizes = [file.stat().st_size if file.exists() else 0 for file in files]
        digest.update(f"{recording.relative_to(root)} {sizes}\n".encode())
    return digest.hexdigest()[:16]


def differences(config: TrainConfig, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two origins of a stage differ, in words; empty where the training can be continued. Recordings
    may have been added or removed.
    """
    found = []
    for name in sorted(before["made_from"].keys() | now["made_from"].keys()):
        if before["made_from"].get(name) != now["made_from"].get(name):
            found.append(f"{name} is another" if name in before["made_from"] else f"{name} was not there")
    for part, prefix in (("stage", f"stages.{config.stage}."), ("model", "model."), ("world", "world.")):
        one, other = _flat(before[part]), _flat(now[part])
        names = one.keys() & other.keys()
        if part == "model":
            # fields that only one version of the program has are ignored; options given once only are not
            fields = tuple(f"{made}." for made in TRAINED[config.stage].makes)
            names = one.keys() | {name for name in other if not name.startswith(fields)}
        found += [
            f"{prefix}{name} was {one.get(name, 'not given')} and is {other.get(name, 'not given')}"
            for name in sorted(names)
            if one.get(name) != other.get(name)
        ]
    if before["seed"] != now["seed"]:
        found.append(f"seed was {before['seed']} and is {now['seed']}")
    return found


def _flat(part: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(part, dict):
        return {name: part}
    return {
        key: value for k, v in part.items() for key, value in _flat(v, f"{name}.{k}" if name else k).items()
    }


def check_upstream(config: TrainConfig, stage: str) -> None:
    """Raises UserError where a checkpoint that `stage` reads, directly or not, was made from an earlier
    version of one beside it.
    """
    for name in TRAINED[stage].reads:
        path = checkpoint_of(config, name)
        if not path.is_file():
            continue
        made_from = read_about(path).get("origin", {}).get("made_from", {})
        for source in TRAINED[name].reads:
            there = checkpoint_of(config, source)
            if source in made_from and there.is_file() and file_digest(there) != made_from[source]:
                said = f"{path} was made from another {there.name} than the one beside it"
                raise UserError(f"{said}; train it anew first: stage={name} again=true.")
        check_upstream(config, name)
