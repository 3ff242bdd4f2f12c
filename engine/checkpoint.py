"""Weights on disk: safetensors with config and provenance inside, written beside and then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import AutoencoderConfig, DenoiserConfig, ModelConfig, UserError, WorldConfig

FORMAT = 1


def save_checkpoint(
    path: Path, modules: dict[str, nn.Module], model: ModelConfig, world: WorldConfig, **about: Any
) -> None:
    """Writes the modules' weights in half precision; matrices of the denoiser as 8-bit rows with a scale
    each.

    `about` is free provenance (data seed, minutes trained, licence notice, scores) and must be JSON.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors |= _pack(f"{name}.{key}", value.detach().cpu(), rows=name == "denoiser")
    head = {
        "format": FORMAT,
        "modules": list(modules),
        "model": asdict(model),
        "world": asdict(world),
        **about,
    }
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata={"rollplay": json.dumps(head)})
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        if path.parent.is_dir():
            beside.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint {path} could not be written ({error}); free some space and run again."
        ) from error


def _pack(key: str, value: Tensor, rows: bool) -> dict[str, Tensor]:
    if not value.is_floating_point():
        return {key: value}
    if not (rows and value.ndim == 2 and value.numel() > 4096):
        return {key: (value.half() if value.ndim > 1 else value.float()).contiguous()}
    scale = value.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return {key: (value / scale).round().to(torch.int8), key + "#scale": scale.float()}


class Checkpoint:
    """A checkpoint file, read and checked. Raises UserError for a file that is missing, cut, or not ours."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"There is no checkpoint {self.path}; train one (python train.py) or give checkpoint=FILE."
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                head = (file.metadata() or {}).get("rollplay")
                self._tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            said = f"{self.path} is not a readable checkpoint (cut short, or another kind of file)"
            raise UserError(f"{said}; copy it again or train one.") from error
        if head is None:
            raise UserError(f"{self.path} holds weights of another program, not a Rollplay checkpoint.")
        try:
            self.about: dict[str, Any] = json.loads(head)
            if self.about["format"] != FORMAT:
                raise UserError(
                    f"{self.path} has format {self.about['format']}; this version reads {FORMAT}."
                )
            self.modules = list(self.about["modules"])
            parts = self.about["model"]
            self.model = ModelConfig(
                AutoencoderConfig(**parts["autoencoder"]), DenoiserConfig(**parts["denoiser"])
            )
            self.world = WorldConfig(**self.about["world"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The config inside {self.path} is not one that this version understands: {error}."
            ) from error

    def load_into(self, name: str, module: nn.Module) -> None:
        """Fills `module` with the weights stored as `name`, or as a part of one ("denoiser.motion"); refuses
        missing, foreign and misshapen ones.
        """
        if name.split(".")[0] not in self.modules:
            raise UserError(
                f"{self.path} holds no {name}, only {self.about['modules']}; train that stage first."
            )
        prefix = name + "."
        own = {k[len(prefix) :]: v for k, v in self._tensors.items() if k.startswith(prefix)}
        state = {
            key: value * own[key + "#scale"] if key + "#scale" in own else value
            for key, value in own.items()
            if not key.endswith("#scale")
        }
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            first = "".join(str(error).splitlines()[1:2]).strip()[:160]
            raise UserError(
                f"The weights in {self.path} do not fit its config ({first}); train anew."
            ) from error

    def digest(self) -> str:
        """Short hash of the file: the name by which recordings and caches know it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """Short hash of a network's weights: caches made with it are known by it."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
