"""Drift: long games side by side, looked at every few seconds; what changes from the first to the last?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..film import Film
from ..picture import grid, save_picture
from ..policies import make_policy
from ..worlds.base import ActionSpace
from .branches import ATTEMPTS, State
from .generated import play
from .measures import motion
from .plots import draw_drift
from .section import Scope, Section
from .watch import EVERY, Watch, curves, ratio

POLICIES = ("scripted", "random", "idle")
MOVING = POLICIES[:2]  # by whose games motion is judged
SHOWN = 12  # pictures of a game in its strip
FILM = "drift.mp4"
FILMED = 60.0  # seconds
EPISODES = 9000  # seed of the true states that long games begin with


@dataclass(frozen=True)
class Plan:
    """A game to be played: noise and keys follow from the seed."""

    policy: str
    seed: int
    state: State
    actions: np.ndarray  # (t, k)
    first: bool  # of its policy's games: the one that is shown


def drift(scope: Scope) -> Section:
    """Several games a policy, some of which go on to the longest; their beginnings are the shorter games."""
    # rounded down, so that the segments of a minute fit into the frames of one
    length = max(2 * EVERY, int(scope.size.segment * scope.player.world.fps))
    plans = _plans(scope, length)
    whole = scope.truth is not None and all(len(plan.state.script) for plan in plans)
    total = sum(len(plan.actions) for plan in plans) * (1 + whole)
    with tqdm(total=total, desc="drift", unit="frame", disable=None) as bar:
        games = _play(scope, plans, length, bar)
        true = [_play_true(scope, plan, length, bar) for plan in plans] if whole else []
    section = Section("Drift")
    _figures(section, scope, games, true)
    lines = {policy: curves(of(policy, games)) for policy in POLICIES}
    lines |= {f"{policy} true": curves(of(policy, true)) for policy in POLICIES if true}
    _tell(section, scope, games, lines)
    draw_drift(scope.folder / "drift.png", lines, length / scope.player.world.fps)
    section.show("drift.png", "Means over the games of a policy; dashed: the true world under the same keys")
    strips = [np.stack(game.strip) for game in games if game.strip]
    save_picture(scope.folder / "drift_strip.png", grid(strips))
    section.show("drift_strip.png", f"{', '.join(POLICIES)}, from the first frame to the last")
    _film(scope, [some[0].beginning for some in (true, games) if some])
    beside = "the true world on the left, generated on the right" if true else "generated"
    section.say(f"[The first minute under the script as a film]({FILM}): {beside}.")
    return section


def of(policy: str, games: list[Watch]) -> list[Watch]:
    """The games of one policy."""
    return [game for game in games if game.policy == policy]


def _plans(scope: Scope, length: int) -> list[Plan]:
    """All games, the policies by turns; the first few of each policy go on to the longest."""
    size, keys = scope.size, scope.player.world.keys
    space = ActionSpace(tuple(keys), tuple(map(tuple, keys.values())))
    plans = []
    for number in range(len(POLICIES) * size.starts):
        turn, name = divmod(number, len(POLICIES))
        minutes = size.minutes[-1] if turn < size.long_starts else size.minutes[-2:][0]
        total = min(max(1, scope.most // length), _segments(scope, minutes)) * length
        policy = make_policy(POLICIES[name], space, scope.seed + number)
        actions = np.stack([policy({}, space) for _ in range(total)])
        plans.append(
            Plan(POLICIES[name], scope.seed + number, _start(scope, number), actions, first=turn == 0)
        )
    return plans


def _start(scope: Scope, number: int) -> State:
    """Where a game begins: a true state, or, without a simulator, a held-out clip."""
    if scope.truth is not None:
        states = itertools.islice(scope.truth.states(EPISODES + scope.seed + number), ATTEMPTS)
        found = next((state for state in states if state is not None), None)
        if found is not None:
            return found
    length, count = scope.history, len(POLICIES) * scope.size.starts
    frames, actions = scope.clips.choose(scope.clips.places(length), count, length, scope.seed)
    place = number % len(frames)
    return State(0, np.zeros((0, actions.shape[2]), np.float32), frames[place], actions[place].numpy())


def _play(scope: Scope, plans: list[Plan], length: int, bar: tqdm) -> list[Watch]:
    """The generated games, in the order of their plans; those of one length are played in one batch."""
    games = [_watch(scope, plan, length) for plan in plans]
    for total in sorted({len(plan.actions) for plan in plans}):
        together = [number for number, plan in enumerate(plans) if len(plan.actions) == total]
        batch = [plans[number] for number in together]
        frames = np.stack([plan.state.frames for plan in batch])
        actions = np.stack([np.concatenate([plan.state.actions, plan.actions]) for plan in batch])
        seeds = torch.tensor([plan.seed for plan in batch])
        for pictures in play(scope.player, frames, torch.from_numpy(actions), seeds):
            for number, picture in zip(together, pictures, strict=True):
                games[number].add(picture)
            bar.update(len(batch))
    return games


def _play_true(scope: Scope, plan: Plan, length: int, bar: tqdm) -> Watch:
    """The true world under the same keys, from episode to episode."""
    game = _watch(scope, plan, length)
    for frame in scope.truth.play(plan.state, iter(plan.actions)):
        game.add(frame)
        bar.update()
    return game


def _watch(scope: Scope, plan: Plan, length: int) -> Watch:
    total, filmed = len(plan.actions), plan.first and plan.policy == POLICIES[0]
    shown = np.linspace(0, total - 1, SHOWN).astype(int).tolist() if plan.first else ()
    begin = scope.frames(FILMED) if filmed else 0
    return Watch(scope.features, length, plan.policy, frozenset(shown), begin)


def _segments(scope: Scope, minutes: int) -> int:
    return max(1, round(minutes * scope.size.minute / scope.size.segment))


def _lengths(scope: Scope, games: list[Watch]) -> dict[str, int]:
    """Names of the lengths that a game was played to → segments."""
    longest = max(len(game.rows) for game in games)
    each = {f"{m}min": _segments(scope, m) for m in scope.size.minutes}
    return {name: count for name, count in each.items() if 1 < count <= longest}


def lasting(games: list[Watch], segments: int) -> list[Watch]:
    """The games that go on for so many segments at least."""
    return [game for game in games if len(game.rows) >= segments]


def _figures(section: Section, scope: Scope, games: list[Watch], true: list[Watch]) -> None:
    for name, count in _lengths(scope, games).items():
        for policy in POLICIES:
            section.figures[f"drift_{name}_{policy}"] = ratio(lasting(of(policy, games), count), count)
        for key, some in ((f"drift_{name}", games), (f"drift_{name}_true", true)):
            if some:
                some = lasting(some, count)
                section.figures[key] = ratio(some, count)
                last = [game.rows[count - 1]["stray"] for game in some]
                section.figures[key.replace("drift", "stray")] = float(np.mean(last))
    section.figures["motion_ratio"] = motion_ratio(scope, games, true)
    section.round(3)


def motion_ratio(scope: Scope, games: list[Watch], true: list[Watch]) -> float:
    """Motion in the longest games' last minute, in shares of the true world's under the same policies, all
    its minutes; or, where there is none, of held-out recordings.
    """
    moving = [game for game in games if game.policy in MOVING]
    longest = lasting(moving, max(len(game.rows) for game in moving))
    last = max(1, scope.frames(scope.size.minute) // games[0].length)
    made = np.mean([row["motion"] for game in longest for row in game.rows[-last:]])
    if true:
        usual = np.mean([row["motion"] for game in true if game.policy in MOVING for row in game.rows])
    else:
        clips, _ = scope.clips.choose(scope.clips.places(2), 64, 2, scope.seed)
        usual = np.mean([motion(clip) for clip in clips])
    return float(made / max(usual, 1e-9))


def _tell(section: Section, scope: Scope, games: list[Watch], lines: dict[str, dict]) -> None:
    f, fps = section.figures, scope.player.world.fps
    counts = {frames: sum(game.frames == frames for game in games) for frames in {g.frames for g in games}}
    played = " and ".join(f"{counts[frames]} of {frames / fps:.0f} s" for frames in sorted(counts))
    section.say(
        f"{len(games)} games under {len(POLICIES)} policies, {played}; their beginnings are the shorter "
        f"games. Drift is the Fréchet distance to true frames in the last {scope.size.segment:g} s, in "
        "shares of that in the first; the frames of all games that last so long are pooled. A game's views "
        "change, which this distance minds, so the true world's own ratio is beside it, and straying: how "
        "far the features of the last segment's frames are from the nearest true ones (median; mean over "
        "games). What is frozen does not drift: motion in the longest games' last minute of scripted and "
        "random play is "
        f"{f['motion_ratio']:.0%} of the true."
    )
    rows = []
    for name, count in _lengths(scope, games).items():
        number = str(len(lasting(games, count)))
        each = [f[f"drift_{name}_{policy}"] for policy in POLICIES]
        stray = [f.get(f"stray_{name}{whose}", "–") for whose in ("", "_true")]
        rows.append([name, number, f[f"drift_{name}"], *each, f.get(f"drift_{name}_true", "–"), *stray])
    section.table(["length", "games", "drift", *POLICIES, "true world", "straying", "straying, true"], rows)
    names = list(games[0].rows[0])
    section.table(
        ["policy, segment", *names],
        [
            [f"{policy}, {when}", *(figures[name][at] for name in names)]
            for policy, figures in lines.items()
            for when, at in (("first", 0), ("last", -1))
        ],
    )


def _film(scope: Scope, beside: list[list[np.ndarray]]) -> None:
    """The first minute, generated, and where there is a true world it on the left."""
    height, width = beside[0][0].shape[:2]
    film = Film(scope.folder / FILM, height, width * len(beside), scope.player.world.fps)
    for pictures in zip(*beside, strict=True):
        film.add(np.concatenate(pictures, 1))
    film.close()
