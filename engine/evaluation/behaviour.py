"""Behaviour: standing still, turning around and back, pushing into a wall, turning left and right by
turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..data.picture import grid, save_picture
from .generated import rebuilt, roll
from .measures import flows, motion, psnr, sharpness
from .section import Scope, Section, skipped
from .truth import State, starts

TURN_SECONDS = 8.0  # a full turn must be done by then
WALL_SECONDS, PUSH_SECONDS = 6.0, 3.0  # to reach a wall, and to push on against it
SWING, SWINGS = 8, 6  # frames of a turn, and how many turns, left and right by turns
END_SECONDS = 1.0  # at a walk's end, in which its figures are taken
SHOWN = 12

# A picture has collapsed if one of these limits is passed at a walk's end, compared with the true picture:
SOFT, HARSH = 1 / 3, 2.0  # sharpness, as a share of the rebuilt true picture's
COLOUR = 40.0  # grey levels of error in the mean of a colour
STUCK, MOVES = 0.15, 2.0  # share of the true motion, if that is more than so many grey levels
RESTLESS = 8.0  # grey levels of motion a frame while the true world stands still
STILL = 0.5

CRITERION = (
    f"A game counts as collapsed where in its last {END_SECONDS:g} s, against true frames encoded and "
    f"decoded, sharpness is under {SOFT:.2f} or over {HARSH:g} times theirs, or a colour's mean is off by "
    f"more than {COLOUR:g} grey levels, or the picture moves less than {STUCK:.0%} as much as one that moves "
    f"({MOVES:g} grey levels a frame), or by more than {RESTLESS:g} where the true one stands still."
)


@dataclass(frozen=True)
class End:
    """Figures of the end of a walk."""

    sharpness: float
    colour: np.ndarray  # (3,)
    motion: float


def ending(frames: np.ndarray) -> End:
    """The last frames of a walk, uint8 (n, h, w, 3) → their figures."""
    return End(sharpness(frames), frames.mean((0, 1, 2)), motion(frames))


def collapsed(made: End, true: End) -> bool:
    """Whether the generated picture has collapsed, by the limits above; `true`: of rebuilt true frames."""
    share = made.sharpness / max(true.sharpness, 1e-6)
    off = np.abs(made.colour - true.colour).max() > COLOUR
    stuck = true.motion > MOVES and made.motion < STUCK * true.motion
    restless = true.motion < STILL and made.motion > RESTLESS
    return bool(not SOFT <= share <= HARSH or off or stuck or restless)


def behaviour(scope: Scope) -> Section:
    """What players try first, compared with the true world."""
    if scope.truth is None:
        return skipped("Behaviour", scope)
    section = Section("Behaviour")
    section.say(CRITERION)
    rows = _idle(scope, section)
    for number, (name, plan) in enumerate((("spin", spin), ("wall", wall), ("reversal", reversal))):
        rows += _walk(scope, section, name, plan, number)
    columns = [
        "game",
        "seconds",
        "sharpness, share",
        "motion",
        "true motion",
        "share collapsed",
    ]
    section.table(columns, rows)
    for name, *_ in rows:
        caption = f"{name}, from the first frame to the last: true, and generated below"
        section.show(f"behaviour_{name}.png", caption)
    f = section.figures
    if "spin_return_psnr" in f:
        section.say(
            f"After a full turn and back the view is {f['spin_return_psnr']:.3g} dB from that at the start "
            f"(true world: {f['spin_return_psnr_true']:.3g} dB)."
        )
    if "reversal_obeyed" in f:
        section.say(f"Of the reversals, {f['reversal_obeyed']:.0%} move the picture the true way.")
    section.round(3)
    section.figures["collapses"] = sum(v > 0 for name, v in f.items() if name.endswith("_collapsed"))
    return section


def _idle(scope: Scope, section: Section) -> list:
    """Standing still, compared with the true world as long as its episode lasts."""
    keys = len(scope.truth.space)
    end = np.zeros((1, scope.frames(END_SECONDS), keys), np.float32)
    found = scope.truth.gather(scope.size.walks, scope.seed + 6, lambda number, state: end, "idle")
    if not found:
        return []
    idle = np.zeros((min(scope.most, scope.frames(scope.size.idle)), keys), np.float32)
    games = [replace(one, actions=idle[None]) for one in found]
    true = [scope.truth.run(one.state, idle)[0] for one in found]
    return _judge(scope, section, "idle", true, list(roll(scope.player, starts(games, scope.seed), "idle")))


def _walk(scope: Scope, section: Section, name: str, plan, number: int) -> list:
    """Several walks of a kind, in the network and in the true world."""

    def branch(_: int, state: State) -> np.ndarray | None:
        actions = plan(scope, state)
        return None if actions is None else actions[None]

    found = scope.truth.gather(scope.size.walks, scope.seed + 3 + number, branch, name)
    if not found:
        section.say(f"{name}: this world has no keys or no place for it.")
        return []
    made = [roll(scope.player, starts([one], scope.seed), name)[0] for one in found]
    true = [one.frames[0] for one in found]
    if name == "spin":
        for key, some in (("", made), ("_true", true)):
            back = [psnr(x[-1:], one.state.frames[-1:]) for x, one in zip(some, found, strict=True)]
            section.figures[f"spin_return_psnr{key}"] = float(np.mean(back))
    if name == "reversal":
        share = obeyed(made, true)
        section.figures |= {} if share is None else {"reversal_obeyed": share}
    return _judge(scope, section, name, true, made)


def _judge(scope: Scope, section: Section, name: str, true: list[np.ndarray], made: list[np.ndarray]) -> list:
    """Walks (n, h, w, 3), true and generated → a row of the table; adds figures and a strip of the first
    walk.
    """
    end = max(2, scope.frames(END_SECONDS))
    ends = [
        (ending(g[-end:]), ending(rebuilt(scope.player, t[-end:]))) for g, t in zip(made, true, strict=True)
    ]
    section.figures |= {
        f"{name}_sharpness": float(np.mean([g.sharpness / max(t.sharpness, 1e-6) for g, t in ends])),
        f"{name}_motion": float(np.mean([g.motion for g, _ in ends])),
        f"{name}_motion_true": float(np.mean([t.motion for _, t in ends])),
        f"{name}_collapsed": float(np.mean([collapsed(g, t) for g, t in ends])),
    }
    rows = [x[0][np.linspace(0, len(x[0]) - 1, SHOWN).astype(int)] for x in (true, made)]
    save_picture(scope.folder / f"behaviour_{name}.png", grid(rows))
    f, seconds = section.figures, len(made[0]) / scope.player.world.fps
    return [[name, seconds, *(f[f"{name}_{x}"] for x in ("sharpness", "motion", "motion_true", "collapsed"))]]


def spin(scope: Scope, state: State) -> np.ndarray | None:
    """Keys of a full turn, as long as it takes in the true world, and one back (t, k)."""
    pair = _turns(scope)
    if pair is None:
        return None
    left = _held(scope, pair[0], scope.frames(TURN_SECONDS))
    angles = [s["angle"] for s in (state.told[-1], *scope.truth.run(state, left)[1]) if "angle" in s]
    if not angles:
        return None
    steps = (np.diff(angles) + 180) % 360 - 180  # degrees a frame, whatever the way
    turned = np.flatnonzero(np.abs(np.cumsum(steps)) >= 360)
    if not len(turned):
        return None
    length = int(turned[0]) + 1
    return np.concatenate([left[:length], _held(scope, pair[1], length)])


def wall(scope: Scope, state: State) -> np.ndarray | None:
    """Keys that walk until the true position no longer changes, and push on (t, k)."""
    ahead = [name for name in ("forward", "up") if name in scope.truth.space.names]
    if not ahead:
        return None
    actions = _held(scope, ahead[0], scope.frames(WALL_SECONDS + PUSH_SECONDS))
    places = [(s["x"], s["y"]) for s in scope.truth.run(state, actions)[1] if "x" in s and "y" in s]
    if len(places) < 2:
        return None
    stopped = np.flatnonzero(np.abs(np.diff(places, axis=0)).sum(1) < STILL)
    if not len(stopped) or stopped[0] > scope.frames(WALL_SECONDS):
        return None
    return actions[: int(stopped[0]) + scope.frames(PUSH_SECONDS)]


def reversal(scope: Scope, state: State) -> np.ndarray | None:
    """Keys of turns to the left and to the right by turns, without pauses (t, k)."""
    pair = _turns(scope)
    return pair and np.concatenate([_held(scope, pair[number % 2], SWING) for number in range(SWINGS)])


def obeyed(made: list[np.ndarray], true: list[np.ndarray]) -> float | None:
    """Of the turns with a visible true flow, the share whose generated flow has the same sign."""
    signs = []
    for pair in zip(made, true, strict=True):
        ways = [[flows(x[at : at + SWING]).sum() for at in range(0, len(x), SWING)] for x in pair]
        signs += [np.sign(g) == np.sign(t) for g, t in zip(*ways, strict=True) if abs(t) >= SWING]
    return float(np.mean(signs)) if signs else None


def _turns(scope: Scope) -> tuple[str, str] | None:
    for pair in (("turn_left", "turn_right"), ("left", "right")):
        if set(pair) <= set(scope.truth.space.names):
            return pair
    return None


def _held(scope: Scope, name: str, frames: int) -> np.ndarray:
    return np.repeat(scope.truth.space.encode([name])[None], frames, 0)
