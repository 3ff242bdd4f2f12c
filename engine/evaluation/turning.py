"""Turning: does the generated picture move the way of a key that went down to turn?"""

from __future__ import annotations

import numpy as np

from .generated import roll
from .measures import flows
from .section import Scope, Section

TURN_FRAMES = 4  # a turn is judged by the flow over so many frames after the key went down
SEEN = 8  # key changes that are looked at for each that is wanted: a bare wall tells no direction


def turning(scope: Scope) -> Section:
    """Share of recorded key changes to a turn whose generated flow has the true one's sign."""
    section = Section("Turning")
    player, clips, start, count = scope.player, scope.clips, scope.history, scope.size.turns
    length = start + TURN_FRAMES
    places = _changes(scope, length)
    if not places:
        section.say("No key change to a turn is recorded in this world.")
        return section
    frames, actions = clips.choose(places, SEEN * count, length, scope.seed)
    way = np.array([flows(clip[start - 1 :]).sum() for clip in frames])
    judged = np.flatnonzero(np.abs(way) >= TURN_FRAMES)[:count]
    section.figures = {"turn_obeyed": 0.0, "turn_obeyed_within_2": 0.0, "turn_trials": len(judged)}
    if len(judged):
        frames, way = frames[judged], np.sign(way[judged])
        made = roll(player, frames, actions[judged], scope.seed, "turning")
        dreams = np.concatenate([frames[:, start - 1 : start], made], 1)
        dreamt = np.stack([flows(dream) for dream in dreams])  # (b, TURN_FRAMES)
        for name, flow in (("turn_obeyed", dreamt), ("turn_obeyed_within_2", dreamt[:, :2])):
            section.figures[name] = round(float((np.sign(flow.sum(1)) == way).mean()), 3)
    f = section.figures
    section.say(
        f"Of {f['turn_trials']} recorded key changes to a turn, {f['turn_obeyed']:.0%} move the generated "
        f"picture the true way within {TURN_FRAMES} frames, {f['turn_obeyed_within_2']:.0%} within two."
    )
    return section


def _changes(scope: Scope, length: int) -> list[tuple[int, int]]:
    """Places where a turn begins right behind the history and is held to the clip's end."""
    names, clips, start = list(scope.player.world.keys), scope.clips, scope.history
    if not {"turn_left", "turn_right"} <= set(names):
        return []
    left, right = names.index("turn_left"), names.index("turn_right")
    places = []
    for i, at in clips.places(length):
        held = clips.recordings[i].actions[at : at + length]
        way = held[:, left] - held[:, right]
        if way[start] != 0 and way[start - 1] != way[start] and (way[start:] == way[start]).all():
            places.append((i, at))
    return places
