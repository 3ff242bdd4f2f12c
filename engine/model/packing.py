"""Stage `pack`: makes the small checkpoint that ships, with most weights in 8 bits, and starts of games."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig, UserError, WorldConfig
from ..data.about_world import agreed
from ..data.dataset import true_recordings
from ..data.recording import Recording
from ..data.starts import STEPS, cut_start, split_choice
from ..worlds.base import ActionSpace
from .checkpoint import EXTRAS, SCALE, Checkpoint, write_tensors
from .networks import load_autoencoder

STARTS = 5  # how many, unless starts= names them
SMALLEST = 4096  # matrices with up to so many elements stay in 16 bits, as scales would cost too much
# Parts whose matrices stay in 16 bits up to so many elements: the decoder's layers close to pixels, where
# rounding is visible, which are small; and the state's predictor, whose errors add up.
HALF = {"autoencoder.decoder": 1 << 16, "states": 1 << 30}


def pack(config: TrainConfig) -> dict:
    """Packs `config.checkpoint` into `config.out`, a file or a directory → the packed file's path and size,
    and the largest relative error of a matrix, with its name.

    Raises UserError where a file is there already, unless `again=true`, and for a packed checkpoint.
    """
    if not config.checkpoint:
        raise UserError("stage=pack needs checkpoint=FILE, of which it makes a small one at out=FILE.")
    source, out = Checkpoint(config.checkpoint), Path(config.out)
    agreed({source.path: asdict(source.world)}, config.world, config.given)  # refuses world= of another one
    target = out if out.suffix == ".safetensors" else out / f"{source.world.name}.safetensors"
    if target.exists() and (target.samefile(source.path) or not config.again):
        raise UserError(f"{target} is there already; choose another out=FILE, or again=true to replace it.")
    if any(key.endswith(SCALE) for key in source.tensors):
        raise UserError(f"{source.path} is packed already; give the checkpoint that training wrote.")
    tensors: dict[str, Tensor] = {}
    worst, name = 0.0, ""
    for key, value in source.tensors.items():
        small = {key: value} if key.startswith(f"{EXTRAS}.") else packed(key, value)
        tensors |= small
        if value.is_floating_point() and value.ndim > 1 and key in small:
            unpacked = small[key].double() * small.get(key + SCALE, torch.ones(1)).double()
            error = float((unpacked - value.double()).norm() / value.double().norm().clamp_min(1e-12))
            worst, name = max((worst, name), (error, key))
    tensors |= {f"{EXTRAS}.{key}": value for key, value in starts_of(config, source).items()}
    write_tensors(target, tensors, source.about | {"packed_from": source.digest(), "card": card_of(source)})
    size = target.stat().st_size / 1e6
    print(f"{target}: {size:.2f} MB; the matrix that lost most is {name}, by {worst:.2%} of its norm.")
    return {"checkpoint": str(target), "megabytes": round(size, 3), "error": round(worst, 5), "matrix": name}


def packed(key: str, value: Tensor) -> dict[str, Tensor]:
    """A network's tensor → the tensors that ship in its place, by name: matrices and convolutions in 8 bits
    with a scale for each row (output channel); small ones and those of HALF in float16; vectors and integers
    unchanged.
    """
    if not value.is_floating_point() or value.ndim < 2:
        return {key: value}
    limits = [limit for part, limit in HALF.items() if key.startswith(f"{part}.")]
    if value.numel() <= max([SMALLEST, *limits]):
        return {key: value.half()}
    scale = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return {key: (value / scale).round().to(torch.int8), key + SCALE: scale.float()}


def starts_of(config: TrainConfig, source: Checkpoint) -> dict[str, Tensor]:
    """Starts of games, as tensors by name: latents, keys and states of a few frames of a recording each. They
    are taken from `config.starts` (DIR:FRAME), or else spread over the held-out recordings. Raises UserError
    for recordings that do not fit this world.
    """
    autoencoder, world = load_autoencoder(source).eval(), source.world
    space = ActionSpace(tuple(world.keys), tuple(map(tuple, world.keys.values())))
    wanted, frames = source.model.state.names, source.model.denoiser.known_frames
    made: dict[str, Tensor] = {}
    for number, (recording, last) in enumerate(_places(config, world, frames), 1):
        start = cut_start(recording, last, space, frames, str(number), world)
        if start.frames.shape[1:3] != (world.height, world.width):
            size = f"{start.frames.shape[2]}x{start.frames.shape[1]}"
            said = f"{recording.directory} has frames of {size}, {world.name} of {world.width}x{world.height}"
            raise UserError(f"{said}; give it other recordings, with data=DIR or starts=[DIR:FRAME].")
        pixels = torch.from_numpy(start.frames)
        with torch.inference_mode():
            latents = autoencoder.encode(pixels.permute(0, 3, 1, 2))
        known = start.states or [None] * len(start.frames)
        states = [[(state or {}).get(name, math.nan) for name in wanted] for state in known]
        parts = {"latents": (latents * STEPS).round().clamp(-128, 127).to(torch.int8)}
        parts["actions"] = torch.from_numpy(start.actions).to(torch.uint8)
        parts["states"] = torch.tensor(states).reshape(len(states), len(wanted))
        made |= {f"starts.{number}.{key}": value for key, value in parts.items()}
    return made


def _places(config: TrainConfig, world: WorldConfig, frames: int) -> list[tuple[Recording, int]]:
    """Recordings, each with the index of a start's last frame; a start has `frames` frames."""
    if config.starts:
        return [_named(choice) for choice in config.starts]
    train, held_out = true_recordings(config.data, world)
    recordings = [Recording(path) for path in held_out or train]  # of a single one none is held out
    episodes = [(one, *episode) for one in recordings if len(one) for episode in one.episodes()]
    places = [
        (one, frame) for one, start, stop in episodes for frame in range(start + 2 * frames, stop, frames)
    ]
    places = places or [(one, stop - 1) for one, _, stop in episodes]  # where no episode is that long
    if not places:
        raise UserError(f"The recordings in {config.data} hold no frame to start from; collect others.")
    return places[:: max(1, len(places) // STARTS)][:STARTS]


def _named(choice: str) -> tuple[Recording, int]:
    directory, frame = split_choice(choice)
    if frame is None:
        raise UserError(f"starts={choice} tells no frame; give each start as DIR:FRAME of a recording.")
    return Recording(directory), frame


def card_of(source: Checkpoint) -> dict[str, Any]:
    """The model card: world, keys, weights by network, and scores and licence where the checkpoint has
    them.
    """
    about = source.about
    sizes = {
        name: sum(x.numel() for k, x in source.tensors.items() if k.startswith(f"{name}."))
        for name in source.modules
    }
    known = {name: about[name] for name in ("scores", "licence") if name in about}
    return {"world": source.world.name, "keys": list(source.world.keys), "weights": sizes, **known}
