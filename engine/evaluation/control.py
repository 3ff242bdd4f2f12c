"""Control: the same state and noise under every key; does the picture change as the true one does?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..data.picture import grid, save_picture
from .generated import roll
from .measures import difference, flat
from .plots import draw_confusion
from .section import Scope, Section, skipped
from .truth import starts

HOLD = 4  # frames that each key is held
DEVIATIONS = 1.96  # standard deviations within which 95 % of a normal distribution lie
STATES_SHOWN = 3
VISIBLE = 2.0  # grey levels by which a key's true picture must differ from all others, to be counted


@dataclass(frozen=True)
class Verdict:
    """The result for one action in one state."""

    action: int
    nearest: int  # the action whose true picture the generated one is most like
    cosine: float  # between generated and true change of the picture, relative to no key
    size: float  # of the generated change along the true one, as a share of it


def control(scope: Scope) -> Section:
    """Counterfactuals under each single key and none: confusion, direction and size of the change."""
    if scope.truth is None:
        return skipped("Control", scope)
    names = ["none", *scope.truth.space.names]
    plan = np.repeat(alternatives(len(names) - 1)[:, None], HOLD, 1)  # (n, HOLD, k)
    found = scope.truth.gather(scope.size.states, scope.seed + 1, lambda number, state: plan, "control")
    section = Section("Control")
    if not found:
        section.say("No state was found from which every key could be held.")
        return section
    made = roll(scope.player, starts(found, scope.seed), "control")
    made = made.reshape(len(found), len(names), *made.shape[1:])  # (state, action, t, h, w, 3)
    true = np.stack([one.frames for one in found])
    verdicts = [v for t, g in zip(true[:, :, -1], made[:, :, -1], strict=True) for v in judge(t, g)]
    _figures(section, verdicts, names)
    _tell(section, verdicts, names, len(found))
    draw_confusion(scope.folder / "control.png", confusion(verdicts, len(names)), names)
    section.show("control.png", "Given keys against the true branch that the generated picture is most like")
    _strip(scope, true, made)
    section.show(
        "counterfactuals.png",
        f"Some states, {HOLD} frames later: {', '.join(names)}; true, and generated below",
    )
    return section


def alternatives(keys: int) -> np.ndarray:
    """No key, then each alone: (keys + 1, keys)."""
    return np.concatenate([np.zeros((1, keys)), np.eye(keys)]).astype(np.float32)


def judge(true: np.ndarray, made: np.ndarray) -> list[Verdict]:
    """Pictures (n, h, w, 3) of one state under n actions, the first of which is no key → a verdict on each
    action whose true picture visibly differs from all others.

    Pictures are compared by their difference from the mean over all actions, as what they have in common says
    nothing about keys; and by direction only, as size is a figure of its own.
    """
    apart = difference(true[:, None], true[None])  # (n, n)
    np.fill_diagonal(apart, np.inf)
    alike = cosines(flat(made) - flat(made).mean(0), flat(true) - flat(true).mean(0))  # (made, true)
    change, truth = flat(made) - flat(made[:1]), flat(true) - flat(true[:1])
    direct = cosines(change, truth)
    size = (change * truth).sum(1) / np.maximum(np.square(truth).sum(1), 1e-9)
    return [
        Verdict(int(action), int(alike[action].argmax()), float(direct[action, action]), float(size[action]))
        for action in np.flatnonzero(apart.min(1) >= VISIBLE)
    ]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines between vectors (n, d) and (m, d) → (n, m); 0 where either vector is zero."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in (a, b))
    return a @ b.T


def confusion(verdicts: list[Verdict], actions: int) -> np.ndarray:
    """Counts (actions, actions): the given action in rows, the one with the most similar true picture in
    columns.
    """
    table = np.zeros((actions, actions), int)
    for verdict in verdicts:
        table[verdict.action, verdict.nearest] += 1
    return table


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of hits / trials (Wilson, 1927)."""
    share, z2 = hits / trials, DEVIATIONS**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = DEVIATIONS / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return middle - half, middle + half


def _figures(section: Section, verdicts: list[Verdict], names: list[str]) -> None:
    if verdicts:
        agree = [v.action == v.nearest for v in verdicts]
        low, high = wilson(sum(agree), len(agree))
        section.figures |= {"control": float(np.mean(agree)), "control_low": low, "control_high": high}
        changed = [v for v in verdicts if v.action]
        if changed:
            section.figures["control_direction"] = float(np.mean([v.cosine for v in changed]))
            section.figures["control_size"] = float(np.median([v.size for v in changed]))
    section.figures["control_trials"] = len(verdicts)
    for number, name in enumerate(names):
        if agree := [v.nearest == number for v in verdicts if v.action == number]:
            section.figures[f"control_{name}"] = float(np.mean(agree))
    section.round(3)


def _tell(section: Section, verdicts: list[Verdict], names: list[str], states: int) -> None:
    section.say(
        f"{states} true states, each key held {HOLD} frames with the same noise. A key is judged in a state "
        f"where its true picture differs from those of all others by {VISIBLE:g} grey levels or more. It "
        "agrees where the generated picture, as it differs from the mean over all keys, is most like the "
        "true one of the same key. Direction: the cosine between the generated and the true change "
        "against touching nothing (1 is best); size: the generated change along the true one "
        "(median; 1 is best)."
    )
    f = section.figures
    if verdicts:
        section.say(
            f"{f['control']:.1%} of {f['control_trials']:.0f} trials agree; the share's interval of 95 %: "
            f"{f['control_low']:.1%} to {f['control_high']:.1%}."
        )
    rows = []
    for number, name in enumerate(names):
        mine = [v for v in verdicts if v.action == number]
        agree = f"{np.mean([v.nearest == number for v in mine]):.2f}" if mine else "–"
        changed = mine if number else []
        cosine = f"{np.mean([v.cosine for v in changed]):.2f}" if changed else "–"
        size = f"{np.median([v.size for v in changed]):.2f}" if changed else "–"
        rows.append([name, str(len(mine)), agree, cosine, size])
    section.table(["key", "judged", "agreeing", "direction", "size"], rows)


def _strip(scope: Scope, true: np.ndarray, made: np.ndarray) -> None:
    """The last frames of the first states (state, action, t, h, w, 3): true, and generated below."""
    pairs = zip(true[:STATES_SHOWN, :, -1], made[:STATES_SHOWN, :, -1], strict=True)
    save_picture(scope.folder / "counterfactuals.png", grid([row for pair in pairs for row in pair]))
