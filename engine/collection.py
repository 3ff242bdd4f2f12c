"""Stage `collect`: a mixture of policies plays the true world in parallel and writes recordings."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait as wait_for_exit
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .config import TrainConfig, UserError, WorldConfig
from .policies import PolicyMixture
from .recording import Recorder
from .worlds import make_world

RECORDING_FRAMES = 6000  # frames in one recording; the unit of work and of resuming
REPORT_FRAMES = 50  # a worker tells the progress bar after so many
RESTARTS = 3  # a simulator that crashes takes its worker with it; seen once in some hundred starts
LEAVE_SECONDS = 2.0  # that a worker without a parent has to close its world

_played = None  # in a worker: frames played by all workers, shared with the parent


@dataclass(frozen=True)
class Job:
    """One recording to make; everything in it follows from (seed, number)."""

    world: WorldConfig
    directory: Path
    seed: int
    number: int
    frames: int
    lossless: bool


def collect(config: TrainConfig) -> dict[str, float]:
    """Writes `config.frames` frames of `config.world` as numbered recordings into `config.data`.

    The bytes depend on the seed only, not on `workers`. Finished recordings are kept, others made anew.
    Returns the figures of this call. Raises UserError when the world or the disk fails.
    """
    jobs = plan(config)
    todo = [job for job in jobs if not job.directory.exists()]
    kept = sum(job.frames for job in jobs) - sum(job.frames for job in todo)
    try:
        Path(config.data).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Recordings cannot be written to {config.data}: {error.strerror}.") from None
    begin = time.monotonic()
    episodes = _run(todo, config, kept) if todo else 0
    seconds = time.monotonic() - begin
    frames = sum(job.frames for job in todo)
    return {
        "frames": frames,
        "seconds": round(seconds, 2),
        "fps": round(frames / seconds, 1) if frames else 0.0,
        "recordings": len(todo),
        "episodes": episodes,
        "kept_frames": kept,
    }


def plan(config: TrainConfig) -> list[Job]:
    """The recordings that make up `config.frames`, finished or not."""
    name = re.sub(r"[^\w.-]+", "_", "-".join(filter(None, (config.world.name, config.world.id))))
    jobs = []
    for number, start in enumerate(range(0, config.frames, RECORDING_FRAMES)):
        directory = Path(config.data) / f"{name}-{config.seed}-{number:05d}"
        frames = min(RECORDING_FRAMES, config.frames - start)
        jobs.append(Job(config.world, directory, config.seed, number, frames, config.lossless))
    return jobs


def _run(todo: list[Job], config: TrainConfig, kept: int) -> int:
    """Plays all jobs in worker processes → number of episodes. A worker that dies is replaced a few times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(config.workers or cores or 1, len(todo))
    bar = tqdm(total=kept + sum(job.frames for job in todo), initial=kept, unit="frame", desc="collect")
    episodes, deaths = 0, 0
    with bar:
        while left := [job for job in todo if not job.directory.exists()]:
            # spawn, not fork: the parent may hold torch's threads, which do not survive a fork
            context = multiprocessing.get_context("spawn")
            played = context.Value("q", 0)
            bar.n = bar.total - sum(job.frames for job in left)  # a dead worker's half recording is made anew
            pool = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(played,)
            )
            try:
                for more in _follow([pool.submit(play, job) for job in left], bar, played):
                    episodes += more
            except BrokenProcessPool:
                deaths += 1
                if deaths > RESTARTS:
                    said = f"A collecting process died {deaths} times"
                    raise UserError(f"{said}; run again with fewer workers to go on.") from None
                bar.write(
                    "A collecting process died (a fault of the simulator, or memory ran out); going on."
                )
            finally:
                pool.shutdown(cancel_futures=True)
    return episodes


def _follow(futures: list[Future], bar: tqdm, played) -> Iterator[int]:
    """Moves the bar → the number of episodes of each recording as it is finished."""
    waiting, seen, begun = set(futures), 0, bar.n
    while waiting:
        finished, waiting = wait(waiting, timeout=0.25, return_when=FIRST_COMPLETED)
        bar.update(played.value - seen)
        seen = bar.n - begun
        yield from (future.result() for future in finished)


def _start_worker(played) -> None:
    global _played
    _played = played
    nowhere = os.open(os.devnull, os.O_WRONLY)  # a simulator that outlives its worker must not hold our pipes
    for output in (1, 2):
        os.dup2(nowhere, output)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a killed parent cannot tell its workers to stop
        wait_for_exit([parent.sentinel])
        time.sleep(LEAVE_SECONDS)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def play(job: Job) -> int:
    """Makes one recording, under a name with .tmp until it is whole → number of episodes."""
    draft = job.directory.with_name(job.directory.name + ".tmp")
    try:
        if draft.exists():
            shutil.rmtree(draft)
        world = make_world(job.world)
        try:
            keys = dict(zip(world.action_space.names, map(list, world.action_space.bindings), strict=True))
            described = replace(job.world, keys=keys)  # a gym world chooses its keys itself
            with Recorder(draft, described, "true", job.seed, lossless=job.lossless) as recorder:
                episodes = _play_into(recorder, world, job)
        finally:
            world.close()
        draft.rename(job.directory)
    except OSError as error:
        said = error.strerror or str(error)
        raise UserError(f"The recording {draft} could not be written: {said}; run again to go on.") from None
    return episodes


def _play_into(recorder: Recorder, world, job: Job) -> int:
    rng = np.random.default_rng((job.seed, job.number))
    policy = PolicyMixture(world.action_space, int(rng.integers(2**31)), job.world.fps)
    nothing = np.zeros(len(world.action_space), np.float32)
    episodes = 0
    for count in range(1, job.frames + 1):
        time_ns = round((count - 1) / job.world.fps * 1e9)  # the clock's would differ from run to run
        if world.done:
            frame = world.reset(int(rng.integers(2**31)))
            recorder.add(frame, nothing, reset=True, state=world.state(), t_ns=time_ns)
            episodes += 1
        else:
            action = policy(world.state(), world.action_space)
            frame = world.step(action)
            recorder.add(frame, action, state=world.state(), t_ns=time_ns)
        if count % REPORT_FRAMES == 0 or count == job.frames:
            _report(count - (count - 1) // REPORT_FRAMES * REPORT_FRAMES)
    return episodes


def _report(frames: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the collecting program is gone")
    if _played is not None:
        with _played.get_lock():
            _played.value += frames
