"""Drift: long games side by side, measured every few seconds; do they move away from true pictures?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..data.film import Film
from ..data.picture import grid, save_picture
from ..data.policies import make_policy
from ..worlds.base import ActionSpace
from .generated import Games, play
from .measures import motion
from .plots import draw_drift
from .section import Scope, Section
from .segment_stats import SegmentStats, curves, disagreement, growth, mean
from .truth import ATTEMPTS, State

POLICIES = ("scripted", "random", "idle")
MOVING = POLICIES[:2]  # policies in whose games motion is measured
AGREEMENT = 0.1  # the growths of both halves of the games may differ by this much
SPAN = 12  # segments at both ends that are compared; at most a third of a game
LONG = 1000  # first number of the longest games
# frames: flicker is measured over so many idle ones, growth of distance over so many random ones
STEPS = 2000
SHOWN = 12  # pictures of a game in its strip
FILM = "drift.mp4"
FILMED = 60.0  # seconds
EPISODES = 9000  # seed of the true states from which long games start


@dataclass(frozen=True)
class Plan:
    """A game to be played; the seed decides noise and keys."""

    policy: str
    seed: int
    state: State
    actions: np.ndarray  # (t, k)
    shown: bool  # in strips and film


class Played(NamedTuple):
    """Generated games, and, if there is a true world, the same keys played there."""

    games: list[SegmentStats]
    true: list[SegmentStats]


def drift(scope: Scope) -> Section:
    """Games of a minute and two under each policy; more are played until both halves of them agree."""
    size = scope.size
    both = Played([], [])
    for number in range(size.rounds):
        _play_round(scope, both, size.starts, size.minutes[-1], number * size.starts, "drift")
        last = len(both.games[0].rows)
        if max(disagreement(of(p, both.games), last, _span(last)) for p in POLICIES) <= AGREEMENT:
            break
    section = _told(scope, "Drift", both, size.minutes)
    _walls(section, *both)
    steps(section, both.games)
    section.round(3)
    _pictures(scope, section, both, "drift")
    _film(scope, [some[0].beginning for some in (both.true, both.games) if some])
    beside = "the true world on the left, generated on the right" if both.true else "generated"
    section.say(f"[The first minute under the script as a film]({FILM}): {beside}.")
    return section


def long_drift(scope: Scope) -> Section:
    """The same with a few games of ten minutes."""
    minutes, both = scope.size.long_minutes, Played([], [])
    _play_round(scope, both, scope.size.long_starts, minutes[-1], LONG, "long drift")
    section = _told(scope, "Long drift", both, minutes)
    section.round(3)
    _pictures(scope, section, both, "long_drift")
    return section


def of(policy: str, games: list[SegmentStats]) -> list[SegmentStats]:
    """The games of one policy."""
    return [game for game in games if game.policy == policy]


def _play_round(scope: Scope, both: Played, starts: int, minutes: int, turn: int, name: str) -> None:
    """Plays `starts` games of each policy and adds them to `both`; `turn`: how many were played before."""
    plans = _plans(scope, starts, minutes, turn)
    whole = scope.truth is not None and all(len(plan.state.script) for plan in plans)
    total = sum(len(plan.actions) for plan in plans) * (1 + whole)
    with tqdm(total=total, desc=name, unit="frame", disable=None) as bar:
        both.games.extend(_play(scope, plans, bar))
        both.true.extend(_play_true(scope, plan, bar) for plan in plans if whole)


def _plans(scope: Scope, starts: int, minutes: int, turn: int) -> list[Plan]:
    """Plans of games of so many minutes, the policies by turns."""
    keys, length = scope.player.world.keys, _segment(scope)
    space = ActionSpace(tuple(keys), tuple(map(tuple, keys.values())))
    total = min(max(1, scope.most // length), _segments(scope, minutes)) * length
    plans, first = [], turn * len(POLICIES)
    for number in range(first, first + starts * len(POLICIES)):
        policy = POLICIES[number % len(POLICIES)]
        play_blind = make_policy(policy, space, scope.seed + number)
        actions = np.stack([play_blind({}, space) for _ in range(total)])
        shown = number < first + len(POLICIES) and turn in (0, LONG)
        plans.append(Plan(policy, scope.seed + number, _start(scope, number), actions, shown))
    return plans


def _start(scope: Scope, number: int) -> State:
    """Where game `number` starts: a true state, or, without a simulator, a held-out clip."""
    if scope.truth is not None:
        states = itertools.islice(scope.truth.states(EPISODES + scope.seed + number), ATTEMPTS)
        found = next((state for state in states if state is not None), None)
        if found is not None:
            return found
    length, count = scope.history, len(POLICIES) * scope.size.starts * scope.size.rounds
    frames, actions, told = scope.clips.choose(scope.clips.places(length), count, length, scope.seed)
    place, script = number % len(frames), np.zeros((0, actions.shape[2]), np.float32)
    return State(0, script, frames[place], actions[place].numpy(), told[place])


def _play(scope: Scope, plans: list[Plan], bar: tqdm) -> list[SegmentStats]:
    """The generated games, side by side."""
    watches = [_watch(scope, plan) for plan in plans]
    actions = np.stack([np.concatenate([plan.state.actions, plan.actions]) for plan in plans])
    games = Games(
        np.stack([plan.state.frames for plan in plans]),
        torch.from_numpy(actions),
        torch.tensor([plan.seed for plan in plans]),
        [plan.state.told for plan in plans],
    )
    for pictures in play(scope.player, games):
        for watch, picture in zip(watches, pictures, strict=True):
            watch.add(picture)
        bar.update(len(plans))
    return watches


def _play_true(scope: Scope, plan: Plan, bar: tqdm) -> SegmentStats:
    """Plays the same keys in the true world, over as many episodes as it takes."""
    game = _watch(scope, plan)
    for frame in scope.truth.play(plan.state, iter(plan.actions)):
        game.add(frame)
        bar.update()
    return game


def _watch(scope: Scope, plan: Plan) -> SegmentStats:
    shown = np.linspace(0, len(plan.actions) - 1, SHOWN).astype(int).tolist() if plan.shown else ()
    begin = scope.frames(FILMED) if plan.shown and plan.policy == POLICIES[0] else 0
    return SegmentStats(scope.reference, _segment(scope), plan.policy, frozenset(shown), begin, scope.probe)


def _segment(scope: Scope) -> int:
    """Frames of a segment, rounded down, so that a minute's segments fit into a minute."""
    return max(2, int(scope.size.segment * scope.player.world.fps))


def _segments(scope: Scope, minutes: int) -> int:
    return max(1, round(minutes * scope.size.minute / scope.size.segment))


def _span(segments: int) -> int:
    return max(1, min(SPAN, segments // 3))


def _figures(section: Section, scope: Scope, both: Played, minutes: tuple[int, ...]) -> None:
    f, longest = section.figures, len(both.games[0].rows)
    for minute in minutes:
        count = _segments(scope, minute)
        if not 1 < count <= longest:
            continue
        span = _span(count)
        for policy in POLICIES:
            key, some, true = f"{minute}min_{policy}", of(policy, both.games), of(policy, both.true)
            f[f"drift_{key}"] = growth(some, count, span)
            f[f"nearest_{key}"] = mean(some, "nearest", slice(count - span, count))
            if len(some) > 1:
                f[f"drift_{key}_halves"] = disagreement(some, count, span)
            if true:
                f[f"drift_{key}_true"] = growth(true, count, span)
                f[f"nearest_{key}_true"] = mean(true, "nearest", slice(count))
            if policy in MOVING:
                f[f"motion_{key}"] = motion_share(scope, some, true, count)


def motion_share(scope: Scope, games: list[SegmentStats], true: list[SegmentStats], segments: int) -> float:
    """Motion at the end of the games' first `segments`, as a share of the true world's over all minutes under
    the same policy, or, without a true world, of the recordings'.
    """
    span = _span(segments)
    made = mean(games, "motion", slice(segments - span, segments))
    if true:
        usual = mean(true, "motion", slice(None))
    else:
        clips, _, _ = scope.clips.choose(scope.clips.places(2), 64, 2, scope.seed)
        usual = float(np.mean([motion(clip) for clip in clips]))
    return made / max(usual, 1e-9)


def _walls(section: Section, games: list[SegmentStats], true: list[SegmentStats]) -> None:
    """Adds the shares of views in moving games that a wall fills, generated and true."""
    pair = [[game for game in some if game.policy in MOVING] for some in (games, true)]
    if not all(pair) or "wall" not in pair[0][0].rows[0]:
        return
    f = section.figures
    f["drift_wall_share"], f["drift_wall_share_true"] = (mean(some, "wall", slice(None)) for some in pair)
    f["drift_wall_ratio"] = f["drift_wall_share"] / max(f["drift_wall_share_true"], 1e-9)
    section.say(
        f"A wall fills {f['drift_wall_share']:.0%} of the views under script and random keys, and "
        f"{f['drift_wall_share_true']:.0%} in the true world under the same keys."
    )


def steps(section: Section, games: list[SegmentStats]) -> None:
    """Adds figures of the first 2,000 frames: flicker and wandering without keys, distance under random
    keys.
    """
    count = max(1, min(STEPS // games[0].length, len(games[0].rows)))
    idle, random, f = of("idle", games), of("random", games), section.figures
    later = slice(1, count) if count > 1 else slice(count)  # at first the last walk fades
    f["flicker_idle"] = mean(idle, "motion", later)
    f["flicker_idle_first"] = mean(idle, "motion", slice(1))
    f["flicker_idle_last"] = mean(idle, "motion", slice(count - 1, count))
    f["idle_away"] = mean(idle, "away", slice(count - 1, count))
    f["random_growth"] = growth(random, count, _span(count))
    section.say(
        f"Over the first {count * games[0].length} frames: standing still, a frame differs from the one "
        f"before by {f['flicker_idle']:.2g} grey levels ({f['flicker_idle_first']:.2g} in the first "
        f"segment, while the last walk fades, {f['flicker_idle_last']:.2g} in the last), and the view has "
        f"wandered by {f['idle_away']:.2g} grey levels of the coarse picture; under random keys the "
        f"distance to true frames is {f['random_growth']:.2f} times that at the start."
    )


def _told(scope: Scope, title: str, both: Played, minutes: tuple[int, ...]) -> Section:
    section = Section(title)
    _figures(section, scope, both, minutes)
    f, games = section.figures, both.games
    seconds, each = games[0].frames / scope.player.world.fps, len(games) // len(POLICIES)
    section.say(
        f"{each} games of {seconds:.0f} s under each of {len(POLICIES)} policies; their beginnings are the "
        "shorter games. Drift is how much farther from the nearest true frames (fixed features; median of a "
        f"segment of {scope.size.segment:g} s, mean over segments and games) they are at their ends than at "
        f"their starts, a third of a game each, {SPAN} segments at most; halves: by how much two halves of "
        "the games disagree. What is frozen does not drift, so motion at the end stands beside it, in shares "
        "of the true world's."
    )
    rows = []
    for key in [f"{minute}min_{policy}" for minute in minutes for policy in POLICIES]:
        names = [f"drift_{key}{end}" for end in ("", "_true", "_halves")]
        names += [f"nearest_{key}{end}" for end in ("", "_true")] + [f"motion_{key}"]
        if names[0] in f:
            rows.append([key.replace("min_", " min, "), *(f.get(name, "–") for name in names)])
    columns = ["drift", "true world's", "halves", "distance at the end", "true frames'", "motion"]
    section.table(["length", *columns], rows)
    return section


def _pictures(scope: Scope, section: Section, both: Played, name: str) -> None:
    """Adds curves, strips, and a table of the first and the last segment."""
    lines = {policy: curves(of(policy, both.games)) for policy in POLICIES}
    lines |= {f"{policy} true": curves(of(policy, both.true)) for policy in POLICIES if both.true}
    names = list(both.games[0].rows[0])
    rows = [
        [f"{policy}, {when}", *(figures[column][at] for column in names)]
        for policy, figures in lines.items()
        for when, at in (("first", 0), ("last", -1))
    ]
    section.table(["policy, segment", *names], rows)
    draw_drift(scope.folder / f"{name}.png", lines, both.games[0].length / scope.player.world.fps)
    section.show(
        f"{name}.png", "Means over the games of a policy; dashed: the true world under the same keys"
    )
    strips = [np.stack(game.strip) for game in both.games if game.strip]
    save_picture(scope.folder / f"{name}_strip.png", grid(strips))
    section.show(f"{name}_strip.png", f"{', '.join(POLICIES)}, from the first frame to the last")


def _film(scope: Scope, beside: list[list[np.ndarray]]) -> None:
    """Writes a film of the first minute: generated, with the true world, if any, on the left."""
    height, width = beside[0][0].shape[:2]
    (scope.folder / FILM).unlink(missing_ok=True)  # of an earlier evaluation
    film = Film(scope.folder / FILM, height, width * len(beside), scope.player.world.fps)
    for pictures in zip(*beside, strict=True):
        film.add(np.concatenate(pictures, 1))
    film.close()
