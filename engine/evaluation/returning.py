"""Returning: walk away and come back, under keys that do so in the true game; is it the same place?"""

from __future__ import annotations

import numpy as np

from ..data.picture import grid, save_picture
from .generated import rebuilt, roll
from .measures import psnr
from .played import play_routes
from .route import RETURN
from .section import STATELESS, Scope, Section, skipped

LAST = 4  # frames at the end, when the player is back at the start
SHOWN = 12


def returning(scope: Scope) -> Section:
    """PSNR against the true view at the return, after 5, 10 and 20 seconds. For comparison: that of views of
    other places, and that of the view at the start, which a perfect memory would reach.
    """
    if scope.truth is None:
        return skipped("Coming back", scope)
    section, rows, shown = Section("Coming back"), [], []
    for seconds in scope.size.return_seconds:
        routes = [route for route in scope.routes if route.kind == f"{RETURN}{seconds}"][: scope.size.returns]
        if not routes or len(routes[0].actions) > scope.most:
            continue
        played = play_routes(scope.truth, routes, f"return {seconds} s")
        made = roll(scope.player, played.games(scope.seed), f"return {seconds} s")
        row = at_return(made, played.true, played.before[:, -1])
        best = rebuilt(scope.player, played.true[:, -1])
        row["autoencoder"] = psnr(best, played.true[:, -1])
        section.figures |= {f"return_{name}_{seconds}": value for name, value in row.items()}
        if scope.stateless:
            blind = roll(scope.stateless, played.games(scope.seed), f"return {seconds} s, no state")
            row["stateless"] = at_return(blind, played.true, played.before[:, -1])["psnr"]
            section.figures[f"return_psnr_{seconds}{STATELESS}"] = row["stateless"]
        rows.append([f"{seconds} s", str(len(routes)), *row.values()])
        times = np.linspace(0, made.shape[1] - 1, SHOWN).astype(int)
        shown += [played.true[0, times], made[0, times]]
    if not rows:
        section.say("There is no route that leads back to its start.")
        return section
    section.round(3)
    section.say(
        "Routes that lead away and back to their start, where the true world shows nearly the view that "
        f"it showed there. PSNR in dB at the return, over the last {LAST} frames, against the true view "
        "there: of the generated view; of the view at the start, were it remembered; and of the true "
        "views where the other routes return, which is what a wrong place is worth."
    )
    names = ["generated", "start's view", "another place", "autoencoder"]
    names += ["without state"] if scope.stateless else []
    section.table(["away for", "routes", *names], rows)
    save_picture(scope.folder / "returning.png", grid(shown))
    section.show("returning.png", "From the start to the return: true, and generated below")
    return section


def at_return(made: np.ndarray, true: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """Generated and true routes (b, t, h, w, 3) and their first views (b, h, w, 3) → mean PSNR against the
    true view at the end: of the generated view, of the first view, and of other routes' true views.
    """
    ends = true[:, -LAST:]
    count, shape = len(true), true.shape[2:]
    others = [psnr(true[i, -1:], true[j, -1:]) for i in range(count) for j in range(count) if i != j]
    each = psnr(made[:, -LAST:].reshape(-1, *shape), ends.reshape(-1, *shape))
    still = psnr(np.repeat(start[:, None], ends.shape[1], 1).reshape(-1, *shape), ends.reshape(-1, *shape))
    return {"psnr": each, "start": still, "elsewhere": float(np.mean(others)) if others else 0.0}
