"""Stage `collect`: a mixture of policies plays the true world in parallel and writes recordings."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait as wait_for_exit
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..bounds import short_seed
from ..config import TrainConfig, UserError, WorldConfig
from ..errors import reason
from ..worlds import make_world
from .about_world import described, world_of
from .dataset import true_headers
from .find import walk_recordings
from .lock import alone
from .policies import SHARES, PolicyMixture
from .recording import Recorder, Recording
from .schema import HEADER, SCHEMA, read_header

RECORDING_FRAMES = 6000  # frames in one recording, the unit of work and of resuming
DRAFT, OLD = ".tmp", ".old.tmp"  # endings of a recording's name while it is written, and while replaced
REPORT_FRAMES = 50  # a worker moves the progress bar after so many
RESTARTS = 3  # of workers: a simulator that crashes ends its worker, about once in some hundred starts
LEAVE_SECONDS = 2.0  # time for a worker to close its world after its parent has died

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

    def beside(self, ending: str) -> Path:
        """The recording's path with an ending, DRAFT or OLD."""
        return self.directory.with_name(self.directory.name + ending)

    def done(self) -> bool:
        """Whether the recording exists with all its frames."""
        return _count(self.directory) >= self.frames


def collect(config: TrainConfig) -> dict[str, float]:
    """Writes `config.frames` frames of `config.world` as numbered recordings into `config.data`.

    Their bytes depend on config and seed alone. Complete recordings stay. Returns the figures of this
    call; UserError where the folder holds other recordings or is in use, and where world or disk fail.
    """
    data = Path(config.data)
    try:
        data.mkdir(parents=True, exist_ok=True)
        if not os.access(data, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"Recordings cannot be written to {data}: {error.strerror}.") from None
    config = replace(config, world=_opened(config.world))
    said = f"Another collection is writing the same recordings into {data}"
    with alone(data / f".{_name(config)}.lock", f"{said}; wait for it, or choose another seed or data=."):
        _refuse_another(config)
        world_of(true_headers(walk_recordings(data)), config.world)  # players' recordings, too
        jobs = plan(config)
        _refuse_to_replace(jobs)
        there = [_count(job.directory) for job in jobs]
        todo = [job for job, frames in zip(jobs, there, strict=True) if frames < job.frames]
        played = sum(job.frames for job in todo)  # an incomplete recording is played again from its beginning
        begin = time.monotonic()
        episodes = _run(todo, config, sum(job.frames for job in jobs) - played) if todo else 0
        seconds = time.monotonic() - begin
    return {
        "frames": sum(max(job.frames - frames, 0) for job, frames in zip(jobs, there, strict=True)),
        "seconds": round(seconds, 2),
        "fps": round(played / seconds, 1) if played else 0.0,
        "recordings": len(todo),
        "episodes": episodes,
        "kept_frames": sum(there),
    }


def _opened(config: WorldConfig) -> WorldConfig:
    """The config with keys and rate, which a Gymnasium world knows only when open; raises its UserError."""
    if config.kind != "gym":
        return config
    with closing(make_world(config)) as world:
        return described(config, world)


def plan(config: TrainConfig) -> list[Job]:
    """The recordings that make up `config.frames`, finished or not."""
    jobs = []
    for number, start in enumerate(range(0, config.frames, RECORDING_FRAMES)):
        directory = Path(config.data) / f"{_name(config)}-{number:05d}"
        frames = min(RECORDING_FRAMES, config.frames - start)
        jobs.append(Job(config.world, directory, config.seed, number, frames, config.lossless))
    return jobs


def _name(config: TrainConfig) -> str:
    """What the names of a job's recordings have in common."""
    return _named(config.world.name, config.world.id, config.seed)


def _named(world: str, id: str, seed: int) -> str:
    return re.sub(r"[^\w.-]+", "_", "-".join(filter(None, (world, id)))) + f"-{seed}"


def _refuse_another(config: TrainConfig) -> None:
    """Raises UserError where the folder holds collected recordings of another world or of other settings."""
    for path in sorted(Path(config.data).glob(f"*/{HEADER}")):
        if not _is_collected(header := read_header(path.parent), path.parent):
            continue
        there = {"schema": header["schema"], "lossless": header["codec"].get("lossless")}
        wanted = {"schema": SCHEMA, "lossless": config.lossless}
        there["policies"], wanted["policies"] = header["policies"] or None, SHARES
        world = header["config"]
        for name, value in asdict(config.world).items():
            if name in world:
                there[f"world.{name}"], wanted[f"world.{name}"] = world[name], value
        differing = [name for name in wanted if there[name] != wanted[name]]
        if "world.name" in differing:
            differing = ["world.name"]  # the reason for all others
        if differing:
            said = "; ".join(
                f"{name} is {_words(there[name])} there and {_words(wanted[name])} here" for name in differing
            )
            how = "choose another data=, or train on them with stage=all frames=0"
            raise UserError(f"{config.data} holds recordings of another job ({said}); {how}.")


def _is_collected(header: dict, path: Path) -> bool:
    """Whether it was collected, not made by who played; its name says so where an older version did not."""
    if header["policies"] != {}:
        return header["policies"] is not None
    name = _named(header["world"], str(header["config"].get("id", "")), header["seed"])
    return re.fullmatch(re.escape(name) + r"-\d{5}(\.old)?(\.tmp)?", path.name) is not None


def _refuse_to_replace(jobs: list[Job]) -> None:
    """Raises UserError where a recording of this job, or its draft, would replace something else."""
    for job in jobs:
        for path in (job.directory, *map(job.beside, (DRAFT, OLD))):
            try:
                header = read_header(path) if path.exists() else None
            except UserError:  # killed before it had a header, or not a recording
                header = None
            ours = header and _is_collected(header, path) and header["seed"] == job.seed
            if path.exists() and not ours and (header or path == job.directory):
                said = f"{path} was not made by this collection and is not replaced"
                raise UserError(f"{said}; give it another name, or choose another seed= or data=.")


def _words(value: object) -> str:
    """A setting's value as words for a message."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" if isinstance(v, float) else k for k, v in value.items())
    return "not told" if value is None else str(value)


def _count(directory: Path) -> int:
    """How many frames of a recording can be read; 0 without one."""
    try:
        return len(Recording(directory)) if directory.exists() else 0
    except UserError:
        return 0


def _run(todo: list[Job], config: TrainConfig, kept: int) -> int:
    """Plays all jobs in worker processes → number of episodes. A worker that dies is replaced a few times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(config.workers or cores or 1, len(todo))
    bar = tqdm(total=kept + sum(job.frames for job in todo), initial=kept, unit="frame", desc="collect")
    episodes, deaths = 0, 0
    with bar:
        while left := [job for job in todo if not job.done()]:
            # spawn, not fork: the parent may hold torch's threads, which do not survive a fork
            context = multiprocessing.get_context("spawn")
            played = context.Value("q", 0)
            bar.n = bar.total - sum(job.frames for job in left)  # recordings of dead workers start again
            pool = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(played,)
            )
            try:
                for more in _follow([pool.submit(play, job) for job in left], bar, played):
                    episodes += more
            except BrokenProcessPool:
                deaths += 1
                if deaths > RESTARTS:
                    raise UserError(f"Processes died {deaths} times; run with fewer workers.") from None
                bar.write(
                    "A collecting process died (a fault of the simulator, or memory ran out); going on."
                )
            finally:
                pool.shutdown(cancel_futures=True)
    return episodes


def _follow(futures: list[Future], bar: tqdm, played) -> Iterator[int]:
    """Yields each finished recording's number of episodes, and moves the bar meanwhile."""
    waiting, seen, begun = set(futures), 0, bar.n
    while waiting:
        finished, waiting = wait(waiting, timeout=0.25, return_when=FIRST_COMPLETED)
        bar.update(played.value - seen)
        seen = bar.n - begun
        yield from (future.result() for future in finished)


def _start_worker(played) -> None:
    global _played
    _played = played
    nowhere = os.open(
        os.devnull, os.O_WRONLY
    )  # a simulator that outlives its worker must not keep our pipes open
    for output in (1, 2):
        os.dup2(nowhere, output)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a killed parent cannot tell its workers to stop
        wait_for_exit([parent.sentinel])
        time.sleep(LEAVE_SECONDS)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def play(job: Job) -> int:
    """Makes a recording, as a draft that is renamed at the end → its number of episodes; or UserError."""
    draft = job.beside(DRAFT)
    try:
        if draft.exists():
            shutil.rmtree(draft)
        world = make_world(job.world)
        try:
            how = {"lossless": job.lossless, "state_kinds": world.state_kinds, "policies": SHARES}
            with Recorder(draft, described(job.world, world), "true", job.seed, **how) as recorder:
                episodes = _play_into(recorder, world, job)
        finally:
            world.close()
        if job.directory.exists():  # incomplete or damaged; the new one begins with the same frames
            old = job.beside(OLD)
            shutil.rmtree(old, ignore_errors=True)
            job.directory.rename(old)
            draft.rename(job.directory)
            shutil.rmtree(old)
        else:
            draft.rename(job.directory)
    except OSError as error:
        said = f"The recording {draft} could not be written: {reason(error)}"
        raise UserError(f"{said}; run again to go on.") from None
    return episodes


def _play_into(recorder: Recorder, world, job: Job) -> int:
    rng = np.random.default_rng((short_seed(job.seed), job.number))
    policy = PolicyMixture(world.action_space, int(rng.integers(2**31)), world.fps, world.map_lines())
    nothing = np.zeros(len(world.action_space), np.float32)
    episodes = 0
    for count in range(1, job.frames + 1):
        time_ns = round((count - 1) / world.fps * 1e9)  # not the clock's, which would differ from run to run
        if world.done:
            seed = int(rng.integers(2**31))
            began = [{"reset": {"seed": seed, "start": "episode"}}]  # so that it can be replayed
            frame = world.reset(seed)
            recorder.add(frame, nothing, reset=True, events=began, state=world.state(), t_ns=time_ns)
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
