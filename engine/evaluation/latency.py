"""Latency: if one key changes, how soon does the picture respond, and how strongly?

Two games with the same state and noise differ only in the key, so that the difference of their pictures is
the response. Only its part along the true world's own response counts: that a frame is merely drawn
differently is no response.
"""

from __future__ import annotations

import numpy as np

from ..config import PlayConfig
from ..device import threads
from ..rollout.session import Session
from .control import alternatives
from .generated import roll
from .measures import difference, flat
from .plots import draw_responses
from .section import Scope, Section, skipped
from .truth import State, starts

OWN = "as trained"
ANSWERS = 48  # steps that are timed
AFTER = 8  # frames after the change that are played
VISIBLE = 1.0  # grey levels of the coarse picture: the least response of the true world that counts
FIRST = 0.1  # a first response is this share of the true one at the same frame
SHARES = {"half": 0.5, "full": 0.9}  # shares of the strength that a response reaches
SPAN = 3  # frames over which strength is averaged


def answer_ms(scope: Scope) -> float:
    """Median milliseconds of steps in which keys change, after all that can be computed before is done."""
    session, keys = Session(scope.player), alternatives(len(scope.player.world.keys))
    session.reset(scope.seed, *scope.start())
    with threads(PlayConfig.threads):
        for number in range(ANSWERS):
            session.speculate()
            session.step(keys[number % len(keys)])
    return float(np.median(session.step_ms))


def latency(scope: Scope) -> Section:
    """Frames from a key to the first visible response, and to half and nine tenths of its strength: as the
    checkpoint plays, and, with `size.settings`, without correction.
    """
    if scope.truth is None:
        return skipped("Latency", scope)
    section, step_ms = Section("Latency"), answer_ms(scope)
    found = scope.truth.gather(scope.size.flips, scope.seed + 2, lambda n, s: _plan(scope, n, s), "latency")
    if not found:
        section.say("No state was found in which a key changes the true picture.")
        return section
    true = np.stack([one.frames for one in found])  # (flips, 2, t, h, w, 3)
    levels = {OWN: None} | ({"uncorrected": 0.0} if scope.size.settings else {})
    answers = {}
    for name, level in levels.items():
        made = roll(scope.player, starts(found, scope.seed), f"latency {name}", level)
        answers[name] = answer(made.reshape(true.shape), true)
    seen = difference(true[:, 0], true[:, 1]) >= VISIBLE  # (flips, t)
    times = {name: summary(made, seen) for name, made in answers.items()}
    _figures(section, times, scope.player.world.fps, step_ms)
    section.figures["latency_strength"] = float(np.median(strength(answers[OWN])))
    section.figures["latency_half_true_frames"] = float(np.median(frames_until(answers[OWN], seen, 0.5)))
    section.figures["latency_true_first"] = float(np.median(seen.argmax(1) + 1))
    section.round()
    _tell(section, times, len(found), step_ms, scope.player.world.fps)
    curves = {name: np.median(made, 0) for name, made in answers.items()}
    draw_responses(scope.folder / "latency.png", curves, OWN)
    section.show("latency.png", "Median size of the answer, in shares of the true world's at the same frame")
    return section


def _plan(scope: Scope, number: int, state: State) -> np.ndarray | None:
    """Two action lists (2, t, k): the state's keys held on, and changed to others (by turns none, and each
    alone); None if the true world hardly responds.
    """
    keys = alternatives(len(scope.truth.space))
    others = [key for key in np.roll(keys, -1 - number, 0) if not np.array_equal(key, state.actions[-1])]
    actions = np.repeat(np.stack([state.actions[-1], others[0]])[:, None], AFTER, 1)
    branches = scope.truth.branch(state, actions)
    if branches is None:
        return None
    apart = difference(*branches.frames)
    return actions if apart[-1] >= 4 * VISIBLE and apart[: AFTER // 2].max() >= VISIBLE else None


def answer(made: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pairs of games (n, 2, t, h, w, 3) → the generated response along the true one, as its share (n, t)."""
    change, truth = (flat(pair[:, 1]) - flat(pair[:, 0]) for pair in (made, true))  # (n, t, d)
    return (change * truth).sum(-1) / np.maximum(np.square(truth).sum(-1), 1e-9)


def strength(made: np.ndarray) -> np.ndarray:
    """Responses (n, t) → the highest mean that each reaches over `SPAN` frames (n,). Not the last value: as
    the two worlds diverge, even a right response is less and less along the true one.
    """
    return np.lib.stride_tricks.sliding_window_view(made, SPAN, 1).mean(-1).max(1)


def frames_until(made: np.ndarray, seen: np.ndarray, share: float | np.ndarray) -> np.ndarray:
    """Responses (n, t), whether the true ones are visible (n, t), and a share → frames (n,) from the first
    visible true response, which counts 1, to the first response of at least the share; t + 1 if none is.
    """
    enough = (made >= share) & seen
    return np.where(enough.any(1), enough.argmax(1) - seen.argmax(1) + 1, made.shape[1] + 1)


def summary(made: np.ndarray, seen: np.ndarray) -> dict[str, float]:
    """Median frames to the first response, and to half and nine tenths of the strength it reaches. A response
    that stays below FIRST counts as none.
    """
    reached = strength(made)[:, None]
    reached = np.where(reached >= FIRST, reached, np.inf)
    levels = {"first": FIRST} | {name: share * reached for name, share in SHARES.items()}
    return {name: float(np.median(frames_until(made, seen, level))) for name, level in levels.items()}


def _figures(section: Section, times: dict[str, dict], fps: float, step_ms: float) -> None:
    for name, value in times[OWN].items():
        section.figures[f"latency_{name}_frames"] = value
    # a key goes down half a frame before the next step, on average; that step's picture is shown when what is
    # left of it to do is done
    section.figures["latency_answer_ms"] = step_ms
    waiting = (times[OWN]["first"] - 1 + 0.5) * 1000 / fps
    section.figures["latency_ms"] = waiting + step_ms
    for setting, found in times.items():
        for name, value in found.items() if setting != OWN else ():
            section.figures[f"latency_{setting}_{name}"] = value


def _tell(section: Section, times: dict[str, dict], flips: int, step_ms: float, fps: float) -> None:
    f = section.figures
    section.say(
        f"{flips} key changes in true states, each against the same game without it, with the same noise. "
        "The answer is the change of the picture along the true one, in shares of it. Frames are counted "
        f"from the first at which the true world visibly answers (by {VISIBLE:g} grey level), which is 1; "
        f"medians: first answer ({FIRST:g} of the true one), half and full (0.5 and 0.9 of the strength that "
        "it reaches, as its delay is one thing and how pale its pictures are another). The checkpoint's "
        f"own answers reach {f['latency_strength']:.2f} of the true "
        f"ones, half of which are reached after {f['latency_half_true_frames']:g}. A key waits half a frame "
        f"for the next step on average, so its first answer is seen after ({times[OWN]['first']:g} - ½) x "
        f"{1000 / fps:.0f} ms + {step_ms:.0f} ms = {f['latency_ms']:.0f} ms; the second part is what is "
        "left of a step when the key is known."
    )
    rows = [[name, *(f"{found[key]:g}" for key in found)] for name, found in times.items()]
    section.table(["played", "first", "half", "full"], rows)
    section.say(f"{AFTER + 1} means that it did not come within {AFTER} frames.")
