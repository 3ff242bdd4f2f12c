"""Checkpoint files: weights as safetensors, with config and provenance in the header.

Training writes float32; packing.py makes smaller files. Both are read here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from ..config import ModelConfig, UserError, WorldConfig
from .state_spec import StateSpec

FORMAT = 2  # 1 had other networks
SCALE = "#scale"  # NAME#scale holds the scales of the rows of NAME, a tensor in 8 bits
EXTRAS = "extras"  # prefix of tensors that belong to no network
# types of the header's fields: required ones, and optional ones
ABOUT = {"format": int, "modules": list, "model": dict, "world": dict}
KNOWN = {"stage": str, "origin": dict, "scores": dict, "card": dict, "steps": int, "minutes": int | float}

T = TypeVar("T")


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    model: ModelConfig,
    world: WorldConfig,
    extras: dict[str, Tensor] | None = None,
    **about: Any,
) -> None:
    """Writes the modules' weights unchanged, and `extras`: other tensors, such as starts of games.

    `about`: provenance for the header, such as seed, minutes trained, scores and licence notices; must be
    JSON. Raises UserError as `write_tensors` does.
    """
    tensors = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    tensors |= {f"{EXTRAS}.{name}": value for name, value in (extras or {}).items()}
    head = {"modules": list(modules), "model": asdict(model), "world": asdict(world), **about}
    write_tensors(path, tensors, head)


def write_tensors(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
    """Writes a checkpoint file from tensors and header, in place of an old one only once it is complete.
    Raises UserError where it cannot be written.
    """
    # copies, as safetensors refuses two names of one tensor
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata={"rollplay": json.dumps(head | {"format": FORMAT})})
        os.umask(mask := os.umask(0))
        os.chmod(beside, 0o666 & ~mask)  # safetensors makes it readable for its owner only
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        if path.parent.is_dir():
            beside.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint {path} could not be written ({error}); free some space and run again."
        ) from error


def apply_overrides(made: T, wanted: T, given: Collection[str], section: str, free: Collection[str]) -> T:
    """The config `made` of trained networks, with those fields replaced by `wanted`'s that the command line
    gave. `given` holds the command line's option names, such as "model.denoiser.ladder" where `section` is
    "model.denoiser". Only the fields in `free` may get a new value; UserError for any other.
    """
    changes = {}
    for name in (f.name for f in fields(made)):
        option, before, now = f"{section}.{name}", getattr(made, name), getattr(wanted, name)
        if before == now or option not in given:
            continue
        if name not in free:
            raise UserError(f"{option}={now} cannot be chosen any more: it was trained with {before}.")
        changes[name] = now
    return replace(made, **changes)


class Checkpoint:
    """A checkpoint file, read and checked. Raises UserError for a file that is missing, damaged or foreign.

    `about`: the whole header; `model`, `world`: its configs; `modules`: the names of its networks; `extras`:
    other tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.about, self.tensors = _read(self.path)
        self.modules: list[str] = self.about["modules"]
        parts, kinds = self.about["model"], get_type_hints(ModelConfig)
        try:
            self.model = ModelConfig(**{name: kinds[name](**part) for name, part in parts.items()})
            self.world = WorldConfig(**self.about["world"])
            StateSpec.from_dict(asdict(self.model.state))
        except (KeyError, TypeError, UserError) as error:
            said = f"The config inside {self.path} is not one that this version understands"
            raise UserError(f"{said}: {str(error).rstrip('.')}.") from error
        prefix = EXTRAS + "."
        self.extras = {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def build(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The network `name` with the file's weights; `make` makes it with fresh ones.

        The shapes of its weights are compared with the file's before memory is allocated, since a damaged
        header may ask for any size. Raises UserError where they differ.
        """
        expected = {key: tuple(value.shape) for key, value in self._weights(name).items()}
        there = sum(value.numel() for value in self.tensors.values())
        try:
            with _only_shapes(4 * there + 10**6):
                made = {key: tuple(value.shape) for key, value in make().state_dict().items()}
        except (_TooLarge, ValueError, ArithmeticError, RuntimeError):
            made = {}
        if made != expected:
            wrong = sorted(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key))
            raise self._misfit(name, wrong[0])
        module = make()
        self.load_into(name, module)
        return module

    def load_into(self, name: str, module: nn.Module) -> None:
        """Fills `module` with the weights of network `name`. Raises UserError where names or shapes
        differ.
        """
        own = self._weights(name)
        scales = {key: self.tensors.get(f"{name}.{key}{SCALE}") for key in own}
        for key, scale in scales.items():
            if scale is not None and scale.shape != (*own[key].shape[:1], *[1] * (own[key].ndim - 1)):
                raise self._misfit(name, f"{key}{SCALE}")
        try:
            module.load_state_dict({k: x if scales[k] is None else x * scales[k] for k, x in own.items()})
        except RuntimeError as error:
            first = "".join(str(error).splitlines()[1:2]).strip()[:160]
            raise self._misfit(name, first) from error

    def _weights(self, name: str) -> dict[str, Tensor]:
        """A network's tensors without scales, by their names inside the network; UserError without it."""
        if name not in self.modules:
            raise UserError(
                f"{self.path} holds no {name}, only {self.about['modules']}; train that stage first."
            )
        prefix = name + "."
        return {
            key[len(prefix) :]: value
            for key, value in self.tensors.items()
            if key.startswith(prefix) and not key.endswith(SCALE)
        }

    def _misfit(self, name: str, where: str) -> UserError:
        return UserError(f"The weights of {name} in {self.path} do not fit its config ({where}); train anew.")

    def digest(self) -> str:
        """Short hash of the file, by which recordings, caches and later stages refer to it."""
        return file_digest(self.path)


def read_about(path: Path) -> dict[str, Any]:
    """The header of a checkpoint without its tensors, which is fast; raises UserError as Checkpoint does."""
    return _read(path, ())[0]


def _read(path: Path, wanted: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """→ a file's header, and its tensors: those in `wanted`, or all."""
    if not path.is_file():
        raise UserError(
            f"There is no checkpoint {path}; train one (python train.py) or give checkpoint=FILE."
        )
    try:
        with safe_open(path, framework="pt") as file:
            head = (file.metadata() or {}).get("rollplay")
            if head is None:
                raise UserError(f"{path} holds weights of another program, not a Rollplay checkpoint.")
            about = _header(path, head)
            tensors = {key: file.get_tensor(key) for key in (file.keys() if wanted is None else wanted)}
    except (SafetensorError, OSError, ValueError) as error:
        said = f"{path} is not a readable checkpoint (cut short, or another kind of file)"
        raise UserError(f"{said}; copy it again or train one.") from error
    return about, tensors


def _header(path: Path, text: str) -> dict[str, Any]:
    """A header's text → its content; UserError where something is missing or of the wrong type."""
    damaged = f"The header of {path} is damaged"
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{damaged}: it is not JSON; copy it again or train anew.") from error
    if not isinstance(about, dict):
        raise UserError(f"{damaged}: it holds no names; copy it again or train anew.")
    if about.get("format") != FORMAT:
        said = f"{path} has format {json.dumps(about.get('format'))[:20]}, and this version reads {FORMAT}"
        raise UserError(f"{said}; train it anew, or use the version that made it.")
    for name, kinds in (ABOUT | KNOWN).items():
        if (name in ABOUT or name in about) and not isinstance(about.get(name), kinds):
            raise UserError(f"{damaged}: its {name} is missing or wrong; copy it again or train anew.")
    names, made_from = about["modules"], about.get("origin", {}).get("made_from", {})
    parts = about["model"].values()
    if not all(isinstance(name, str) for name in names) or not all(
        isinstance(part, dict) for part in (*parts, made_from)
    ):
        raise UserError(f"{damaged}: it names its parts wrongly; copy it again or train anew.")
    return about


class _TooLarge(Exception):
    """A network has more weights than the file."""


class _NoMemory(TorchFunctionMode):
    """A context in which torch.empty, zeros, ones and full make tensors without memory (device meta).

    torch.device("meta") would also apply to arange and the like, which then load Triton; loaded in the thread
    of a window, that crashes with the LLVM of Mesa's drivers.
    """

    FILLED = (torch.empty, torch.zeros, torch.ones, torch.full)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        more = {"device": "meta"} if function in self.FILLED else {}
        return function(*args, **{**(kwargs or {}), **more})


@contextmanager
def _only_shapes(limit: int) -> Iterator[None]:
    """A context in which networks are made without memory; raises _TooLarge beyond `limit` weights."""
    made = 0

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal made
        made += 0 if value is None else value.numel()
        if made > limit:
            raise _TooLarge

    with _NoMemory():
        hooks = [register_module_parameter_registration_hook(count)]
        hooks.append(register_module_buffer_registration_hook(count))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def file_digest(path: Path) -> str:
    """Short hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


def weights_digest(module: nn.Module, without: Sequence[str] = ()) -> str:
    """Short hash of a network's weights, by which caches made with it are named; without the weights of the
    submodules in `without`.
    """
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        if key.split(".")[0] not in without:
            digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
