"""Stage `evaluate`: the generated world held against the true one, with figures and pictures.

Held-out recordings give true states, actions and what became of them; the same actions are played in the
network.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .config import TrainConfig, UserError
from .dataset import split
from .device import autocast
from .picture import grid, save_picture
from .policies import make_policy
from .recording import Recording, find_recordings
from .rollout import Rollout
from .session import Player, Session

HORIZONS = (1, 16, 64)  # frames after the start at which pictures are compared
TURN_FRAMES = 4  # a turn is judged by the flow over so many frames after the key went down
TRIALS = 100
CLIPS = 64  # held-out clips over which fidelity is averaged
PLACES = 3  # held-out places from which the long games start


def evaluate(config: TrainConfig) -> dict:
    """Measures a checkpoint on held-out recordings of its world and in long games of its own → figures."""
    out = Path(config.out)
    newest = [out / f"{stage}.safetensors" for stage in ("rollout", "denoiser")]
    player = Player(
        config.checkpoint or next((p for p in newest if p.exists()), newest[0]),
        config.device,
        config.precision,
    )
    recordings = find_recordings(config.data)
    chosen = recordings if config.unseen else split(recordings)[1] or recordings
    clips = Clips([Recording(path) for path in chosen], player)
    report = out / "evaluation"
    figures: dict = {"checkpoint": str(player.checkpoint.path), "world": player.world.name}
    figures |= fidelity(player, clips, report, config.seed)
    figures |= turning(player, clips, config.seed)
    figures |= endurance(player, clips, report, min(config.frames, int(60 * player.world.fps)), config.seed)
    report.mkdir(parents=True, exist_ok=True)
    (report / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


class Clips:
    """Held-out recordings as a source of true clips: frames, and the actions that caused them."""

    def __init__(self, recordings: list[Recording], player: Player):
        self.recordings = recordings
        for recording in recordings:
            if list(recording.names) != list(player.world.keys):
                raise UserError(
                    f"{recording.directory} has other keys than {player.checkpoint.path} was trained on."
                )

    def places(self, length: int) -> list[tuple[int, int]]:
        """All (recording, start) whose `length` frames lie in one episode."""
        runs = ((i, a, b) for i, r in enumerate(self.recordings) for a, b in r.episodes())
        return [(i, start) for i, a, b in runs for start in range(a, b - length + 1)]

    def choose(
        self, places: list[tuple[int, int]], count: int, length: int, seed: int
    ) -> tuple[np.ndarray, Tensor]:
        """`count` of the places at random → frames uint8 (b, length, h, w, 3), actions (b, length, k)."""
        if not places:
            raise UserError(
                f"No held-out episode has the {length} frames needed; collect more (stage=collect)."
            )
        picked = np.random.default_rng(seed).permutation(len(places))[:count]
        chosen = [places[i] for i in sorted(picked)]
        frames = np.stack([self.recordings[i].frames(start, start + length) for i, start in chosen])
        actions = np.stack([self.recordings[i].actions[start : start + length] for i, start in chosen])
        return frames, torch.from_numpy(actions)


@torch.inference_mode()
def roll(player: Player, frames: np.ndarray, actions: Tensor, seed: int) -> np.ndarray:
    """Plays `actions` (b, t, k) from the first true frames (b, t, h, w, 3) → the generated rest, uint8."""
    rollout = Rollout(player.denoiser, len(frames), player.dtype or torch.float32)
    start = rollout.start_frames
    latents = torch.cat([player.encode(clip[:start]) for clip in frames])
    actions = actions.to(player.device)
    seeds = torch.arange(len(frames), device=player.device) + seed
    with autocast(player.device, player.dtype):
        rollout.reset(latents, actions[:, :start], seeds)
        made = [rollout.step(action) for action in actions[:, start:].unbind(1)]
    return np.stack([player.decode(heads) for heads in made], 1)


@torch.inference_mode()
def moved(player: Player, frames: np.ndarray, actions: Tensor) -> np.ndarray:
    """First guesses at what follows true frames (b, t, h, w, 3) under the actions (b, t + 1, k), uint8: the
    last frame moved, and nothing drawn.
    """
    denoiser = player.denoiser
    latents = torch.cat([player.encode(clip[-2:]) for clip in frames])
    actions = actions.to(player.device)[:, -denoiser.config.momentum - 1 :]
    with autocast(player.device, player.dtype):
        guess = denoiser.motion(latents, actions[:, :-1], actions[:, -1:]).mean[:, 0]
    return player.decode(guess)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures (n, h, w, 3) of the peak signal-to-noise ratio, decibels."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-3))).mean())


def fidelity(player: Player, clips: Clips, report: Path, seed: int) -> dict:
    """PSNR against the true frames after 1, 16 and 64 frames, that of doing nothing (the last frame
    repeated), both also where a key is held, and that of the autoencoder alone, which bounds it; sharpness in
    shares of the true frames' own.
    """
    start = player.denoiser.config.sink + player.denoiser.config.recent
    length = start + HORIZONS[-1]
    frames, actions = clips.choose(clips.places(length), CLIPS, length, seed)
    made = roll(player, frames, actions, seed)
    true = frames[:, start:]
    figures = {f"psnr@{h}": psnr(made[:, h - 1], true[:, h - 1]) for h in HORIZONS}
    figures["psnr@1_repeat"] = psnr(frames[:, start - 1], true[:, 0])
    figures["psnr@1_moved"] = psnr(moved(player, frames[:, :start], actions[:, : start + 1]), true[:, 0])
    moving = actions[:, start].any(-1).numpy()  # a still picture is easy to repeat
    if moving.any():
        figures["psnr@1_moving"] = psnr(made[moving, 0], true[moving, 0])
        figures["psnr@1_moving_repeat"] = psnr(frames[moving, start - 1], true[moving, 0])
    figures |= {f"sharpness@{h}": sharpness(made[:, h - 1]) / sharpness(true[:, h - 1]) for h in HORIZONS}
    rebuilt = np.stack([player.decode(player.encode(clip[start : start + 1])[0])[0] for clip in frames])
    figures["psnr_autoencoder"] = psnr(rebuilt, true[:, 0])
    figures["sharpness_autoencoder"] = sharpness(rebuilt) / sharpness(true[:, 0])
    rows = [x[i, ::6] for i in range(4) for x in (true, made)]
    save_picture(report / "rollout.png", grid(rows))
    return {name: round(value, 2) for name, value in figures.items()}


def horizontal_flow(a: np.ndarray, b: np.ndarray, reach: int = 16) -> float:
    """Shift in pixels, to the right, that best lays picture a over b, both uint8 (h, w, 3); 0 where nothing
    is seen.

    Turning moves the whole picture sideways, so one global shift by block matching is enough, and needs no
    library.
    """
    a, b = (x.astype(np.float32).mean(-1) for x in (a, b))  # (h, w)
    width = a.shape[1]
    costs = [
        np.abs(a[:, max(0, -d) : width - max(0, d)] - b[:, max(0, d) : width + min(0, d)]).mean()
        for d in range(-reach, reach + 1)
    ]
    best = int(np.argmin(costs))
    return float(best - reach) if costs[best] < 0.9 * costs[reach] else 0.0


def turning(player: Player, clips: Clips, seed: int) -> dict:
    """Share of key changes to a turn whose generated flow has the true one's sign, over `TRIALS` trials."""
    names = list(player.world.keys)
    if not {"turn_left", "turn_right"} <= set(names):
        return {}
    left, right = names.index("turn_left"), names.index("turn_right")
    start = player.denoiser.config.sink + player.denoiser.config.recent
    length = start + TURN_FRAMES
    places = []
    for i, at in clips.places(length):
        way = (
            clips.recordings[i].actions[at : at + length, left]
            - clips.recordings[i].actions[at : at + length, right]
        )
        if way[start] != 0 and way[start - 1] != way[start] and (way[start:] == way[start]).all():
            places.append((i, at))
    frames, actions = clips.choose(places, 8 * TRIALS, length, seed)
    made = roll(player, frames, actions, seed)
    agree, first, judged = 0, 0, 0
    for clip, dream in zip(frames, made, strict=True):
        dream = np.concatenate([clip[start - 1 : start], dream])
        flows = [horizontal_flow(a, b) for a, b in zip(clip[start - 1 :], clip[start:], strict=False)]
        dreamt = [horizontal_flow(a, b) for a, b in zip(dream, dream[1:], strict=False)]
        if (
            abs(sum(flows)) < TURN_FRAMES or judged == TRIALS
        ):  # against a bare wall nothing tells the direction
            continue
        judged += 1
        agree += np.sign(sum(dreamt)) == np.sign(sum(flows))
        first += np.sign(sum(dreamt[:2])) == np.sign(sum(flows))
    return {
        "turn_obeyed": round(agree / max(1, judged), 3),
        "turn_obeyed_within_2": round(first / max(1, judged), 3),
        "turn_trials": judged,
    }


def endurance(player: Player, clips: Clips, report: Path, frames: int, seed: int) -> dict:
    """A minute each of standing still, random keys and turning, from `PLACES` places: strips, and sharpness
    (share of the true frames' mean) and motion (grey levels) in the first and the last five seconds; and, as
    what stands still might be stuck, motion in a second of turning after the minute idle.
    """
    session, length = Session(player), player.denoiser.config.sink + player.denoiser.config.recent
    starts, actions = clips.choose(clips.places(length), PLACES, length, seed)
    true = sharpness(clips.choose(clips.places(1), 256, 1, seed)[0][:, 0])
    parts: dict[str, list[float]] = {}
    rows, times, part = [], [], max(2, int(5 * player.world.fps))
    for name in ("idle", "random", "spin"):
        for place in range(len(starts)):
            policy = make_policy(name, session.action_space, seed + place)
            session.reset(seed + place, starts[place], actions[place].numpy())
            seen = []
            for _ in tqdm(range(frames), desc=f"{name} {place + 1}", unit="frame", disable=None):
                seen.append(session.step(policy({}, session.action_space)))
            times += session.step_ms
            movie = np.stack(seen)
            for when, piece in (("first", movie[:part]), ("last", movie[-part:])):
                parts.setdefault(f"{name}_sharpness_{when}", []).append(sharpness(piece) / true)
                parts.setdefault(f"{name}_motion_{when}", []).append(motion(piece))
            rows.append(movie[:: max(1, frames // 12)])
            if name == "idle":
                turn = make_policy("spin", session.action_space, seed + place)
                woken = [session.step(turn({}, session.action_space)) for _ in range(int(player.world.fps))]
                parts.setdefault("idle_motion_woken", []).append(motion(np.stack(woken)))
    save_picture(report / "endurance.png", grid(rows))
    figures = {what: round(float(np.mean(values)), 2) for what, values in parts.items()}
    figures["step_ms_p50"] = round(float(np.percentile(times, 50)), 1)
    figures["step_ms_p99"] = round(float(np.percentile(times, 99)), 1)
    return figures


def sharpness(frames: np.ndarray) -> float:
    """Mean absolute difference of neighbouring pixels of (n, h, w, 3), in grey levels."""
    pixels = frames.astype(np.float32)
    return float(np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean())


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames of (n, h, w, 3), in grey levels."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())
