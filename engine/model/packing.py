"""Stage `pack`: the small file that ships. Most weights in 8 bits, each row with a scale; the rest in 16."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..config import TrainConfig, UserError
from .checkpoint import EXTRAS, SCALE, Checkpoint, write_tensors

SMALLEST = 4096  # elements of a tensor that is worth a scale for each of its rows
HALF = ("autoencoder",)  # networks that make pixels: 16 bits, as the eye sees what rounding does there


def pack(config: TrainConfig) -> dict:
    """Packs `config.checkpoint` into `config.out`, a file or a directory → its size, and the matrix that lost
    most.

    Raises UserError where something lies there already and `again` is not given.
    """
    if not config.checkpoint:
        raise UserError("stage=pack needs checkpoint=FILE, of which it makes a small one at out=FILE.")
    source, out = Checkpoint(config.checkpoint), Path(config.out)
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
            kept = small[key].double() * small.get(key + SCALE, torch.ones(1)).double()
            error = float((kept - value.double()).norm() / value.double().norm().clamp_min(1e-12))
            worst, name = max((worst, name), (error, key))
    write_tensors(target, tensors, source.about | {"packed_from": source.digest()})
    size = target.stat().st_size / 1e6
    print(f"{target}: {size:.2f} MB; the matrix that lost most is {name}, by {worst:.2%} of its norm.")
    return {"checkpoint": str(target), "megabytes": round(size, 3), "error": round(worst, 5), "matrix": name}


def packed(key: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of a network as it ships: vectors in float32, matrices and convolutions in 8 bits with a scale
    for each row (output channel), those of HALF and small ones in float16; what is no float as it is.
    """
    if not value.is_floating_point() or value.ndim < 2:
        return {key: value}
    if key.split(".")[0] in HALF or value.numel() <= SMALLEST:
        return {key: value.half()}
    scale = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return {key: (value / scale).round().to(torch.int8), key + SCALE: scale.float()}
