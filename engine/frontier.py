"""Stage `frontier`: how long the player's whole step takes for networks of several sizes, on this machine."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from .autoencoder import Autoencoder
from .config import DenoiserConfig, TrainConfig
from .denoiser import Denoiser
from .device import AUTOCAST, autocast, pick_device, pick_precision
from .rollout import Rollout
from .weights import cast_weights, pack_weights

LADDERS = {1: [1.0], 2: [0.6, 1.0], 3: [0.5, 0.8, 1.0], 4: [0.4, 0.7, 0.9, 1.0]}
SIZES = [  # patch, width, layers, window, recent
    (4, 256, 6, 4, 8),
    (4, 256, 8, 4, 8),
    (4, 256, 6, 2, 8),
    (4, 256, 6, 1, 8),
    (4, 256, 6, 4, 16),
    (4, 384, 8, 4, 8),
    (4, 512, 8, 4, 8),
    (2, 256, 6, 4, 8),
    (2, 256, 6, 2, 8),
]


@torch.inference_mode()
def frontier(config: TrainConfig) -> dict:
    """Times rollout and decode of random weights, `config.steps` steps each (100 unless given) → figures, p50
    in ms.
    """
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    dtype = AUTOCAST[precision]
    shape = config.model.autoencoder.latent_shape(config.world)
    autoencoder = Autoencoder(config.model.autoencoder).to(device).eval()
    figures: dict = {"precision": precision, "threads": torch.get_num_threads()}
    print("patch width layers window recent  params M  step ms p50  p99")
    for patch, width, layers, window, recent in tqdm(SIZES, desc="frontier", unit="size", disable=None):
        size = replace(
            DenoiserConfig(),
            patch=patch,
            width=width,
            layers=layers,
            window=window,
            recent=recent,
            ladder=LADDERS[window],
        )
        denoiser = Denoiser(size, len(config.world.keys), *shape, autoencoder).to(device).eval()
        for module in (denoiser, autoencoder):
            cast_weights(module, precision)
            if device.type == "cpu":
                pack_weights(module, precision)
        times = _time(denoiser, autoencoder, device, dtype, config.steps or 100)
        millions = sum(p.numel() for p in denoiser.parameters()) / 1e6
        p50, p99 = np.percentile(times, 50), np.percentile(times, 99)
        row = f"{patch:5d} {width:5d} {layers:6d} {window:6d} {recent:6d}"
        print(f"{row}  {millions:8.1f}  {p50:11.1f} {p99:4.1f}")
        figures[f"p{patch}_d{width}_l{layers}_w{window}_r{recent}"] = round(float(p50), 1)
    return figures


def _time(
    denoiser: Denoiser, autoencoder: Autoencoder, device: torch.device, dtype, steps: int
) -> list[float]:
    """Milliseconds of each step: one frame rolled out and decoded, keys held."""
    rollout = Rollout(denoiser, 1, dtype or torch.float32)
    action = torch.zeros(1, denoiser.keys, device=device)
    times = []
    with autocast(device, dtype):
        start = torch.randn(1, rollout.start_frames, *denoiser.shape, device=device)
        rollout.reset(
            start, action[:, None].expand(-1, rollout.start_frames, -1), torch.zeros(1, device=device).long()
        )
        for _ in range(steps + 10):
            begin = time.perf_counter()
            autoencoder.decode(rollout.step(action)).cpu()
            times.append(1000 * (time.perf_counter() - begin))
    return times[10:]
