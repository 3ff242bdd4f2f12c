"""Fidelity: routes in the generated world compared with the same routes in the true one."""

from __future__ import annotations

import numpy as np

from ..data.picture import grid, save_picture
from ..data.sight import wall_views
from .features import frechet_distance
from .generated import rebuilt, roll
from .measures import OCTAVES, highpass_correlation, octaves, psnr, sharpness, ssim
from .played import Played, play_routes, recorded
from .route import RETURN
from .section import STATELESS, Scope, Section

HORIZONS = (1, 8, 16, 64)  # frames after the start at which pictures are compared
EVERY = 4  # every fourth frame is used for the Fréchet distance
END = 16  # last frames of a route, of which the share is measured that a wall fills
KINDS_SHOWN = 5
ABOUT = ("psnr", "ssim", "sharpness", *(f"octave{n + 1}" for n in range(OCTAVES)), "highpass")


def fidelity(scope: Scope) -> Section:
    """Similarity, sharpness and detail of pictures after 1, 8, 16 and 64 frames: of all, of open views, and
    of views that a wall fills in the true world. Baselines: the network without its state, the last true
    frame repeated, and the autoencoder alone.
    """
    played = _played(scope)
    horizons = [h for h in HORIZONS if h <= played.true.shape[1]]
    made = roll(scope.player, played.games(scope.seed), "routes")
    blind = roll(scope.stateless, played.games(scope.seed), "routes, no state") if scope.stateless else None
    section = Section("Fidelity")
    figures, walls = section.figures, _walls(scope, played)
    for horizon in horizons:
        at = horizon - 1
        true, drawn = played.true[:, at], made[:, at]
        best, still = rebuilt(scope.player, true), played.before[:, -1]
        groups = {"": np.ones(len(true), bool)}
        groups |= {} if walls is None else {"_open": ~walls[:, at], "_wall": walls[:, at]}
        for name, some in groups.items():
            if some.any():
                figures |= compared(drawn[some], true[some], f"{horizon}{name}")
                figures[f"autoencoder_psnr_{horizon}{name}"] = psnr(best[some], true[some])
                figures[f"repeat_psnr_{horizon}{name}"] = psnr(still[some], true[some])
                figures[f"views_{horizon}{name}"] = int(some.sum())
        if blind is not None:
            figures |= compared(blind[:, at], true, f"{horizon}{STATELESS}")
        figures |= {f"autoencoder_{k}": v for k, v in compared(best, true, str(horizon)).items()}
        for kind in dict.fromkeys(played.kinds):
            some = np.array(played.kinds) == kind
            figures[f"psnr_{horizon}_of_{kind}"] = psnr(drawn[some], true[some])
    flat = [x[:, ::EVERY].reshape(-1, *x.shape[2:]) for x in (made, played.true)]
    figures["frechet"] = frechet_distance(*flat)
    if blind is not None:
        figures[f"frechet{STATELESS}"] = frechet_distance(blind[:, ::EVERY].reshape(flat[1].shape), flat[1])
    figures["frechet_autoencoder"] = frechet_distance(rebuilt(scope.player, flat[1]), flat[1])
    _wall_share(scope, section, made, played, walls)
    section.round(3)
    _tell(section, played, horizons)
    shown = [played.kinds.index(kind) for kind in dict.fromkeys(played.kinds)][:KINDS_SHOWN]
    save_picture(scope.folder / "routes.png", grid([x[i, ::6] for i in shown for x in (played.true, made)]))
    section.show("routes.png", "A route of each kind, every sixth frame: true, and generated below")
    return section


def compared(made: np.ndarray, true: np.ndarray, when: str) -> dict[str, float]:
    """Figures of generated pictures against the true ones, (n, h, w, 3) each; sharpness and octaves as shares
    of the true ones. `when`: suffix of the figures' names.
    """
    shares = octaves(made) / np.maximum(octaves(true), 1e-9)
    return {
        f"psnr_{when}": psnr(made, true),
        f"ssim_{when}": ssim(made, true),
        f"sharpness_{when}": sharpness(made) / max(sharpness(true), 1e-9),
        **{f"octave{number + 1}_{when}": float(share) for number, share in enumerate(shares)},
        f"highpass_{when}": highpass_correlation(made, true),
    }


def _played(scope: Scope) -> Played:
    """The routes as played in the true world; without one, clips of recordings."""
    if scope.truth is not None:
        routes = [route for route in scope.routes if not route.kind.startswith(RETURN)]
        some = routes[:: -(-len(routes) // scope.size.routes)]
        return play_routes(scope.truth, some).cut(scope.most)
    length = next((h for h in HORIZONS[::-1] if scope.clips.places(scope.history + h)), HORIZONS[0])
    return recorded(scope.clips, scope.size.routes, scope.history, min(length, scope.most), scope.seed)


def _walls(scope: Scope, played: Played) -> np.ndarray | None:
    """Which true views a wall fills by the map, bool (b, t); None without a map."""
    each = [wall_views(told, scope.lines) for told in played.told]
    return None if any(one is None for one in each) else np.stack(each)


def _wall_share(
    scope: Scope, section: Section, made: np.ndarray, played: Played, walls: np.ndarray | None
) -> None:
    """Adds the shares of views at the routes' ends that a wall fills: generated by the probe, and true."""
    if scope.probe is None or walls is None:
        return
    f, shape = section.figures, (-1, *made.shape[2:])
    f["probe_accuracy"] = scope.probe.accuracy
    f["wall_share_map"] = float(walls[:, -END:].mean())
    f["wall_share_true"] = float(scope.probe.fills(played.true[:, -END:].reshape(shape)).mean())
    f["wall_share"] = float(scope.probe.fills(made[:, -END:].reshape(shape)).mean())
    f["wall_ratio"] = f["wall_share"] / max(f["wall_share_true"], 1e-9)


def _tell(section: Section, played: Played, horizons: list[int]) -> None:
    f, kinds = section.figures, dict.fromkeys(played.kinds)
    counts = ", ".join(f"{played.kinds.count(kind)} {kind}" for kind in kinds)
    section.say(
        f"{len(played.kinds)} routes of {played.true.shape[1]} frames ({counts}), from the same true "
        "frames and under the same keys in the true world and in the generated one. PSNR in dB; sharpness "
        "and the energies of the grey picture's octaves, the finest first, in shares of the true ones; "
        "high-pass: correlation of the two finest octaves with the true ones. The true world's map says "
        "which true views a wall fills. Repeated: PSNR of the last true frame; autoencoder: of the true "
        "frame encoded and decoded."
    )
    rows = []
    for horizon in horizons:
        for name, title in (("", ""), ("_open", ", open"), ("_wall", ", wall")):
            key = f"{horizon}{name}"
            if f"psnr_{key}" in f:
                row = [f[f"{what}_{key}"] for what in ABOUT]
                row += [f[f"{what}_{key}"] for what in ("views", "repeat_psnr", "autoencoder_psnr")]
                rows.append([f"after {horizon}{title}", *row])
        others = [(f"autoencoder, {horizon}", [f"autoencoder_{what}_{horizon}" for what in ABOUT])]
        others += [(f"after {horizon}, no state", [f"{what}_{horizon}{STATELESS}" for what in ABOUT])]
        for title, names in others:
            rows += [[title, *(f[name] for name in names), "", "", ""]] if names[0] in f else []
    columns = ["PSNR", "SSIM", "sharpness", *(f"octave {n + 1}" for n in range(OCTAVES)), "high-pass"]
    section.table(["frames", *columns, "views", "repeated", "autoencoder"], rows)
    section.table(
        ["PSNR after", *map(str, horizons)],
        [[kind, *(f[f"psnr_{horizon}_of_{kind}"] for horizon in horizons)] for kind in kinds],
    )
    section.say(
        f"Fréchet distance of fixed features to the same routes' true frames: {f['frechet']:.3g} generated, "
        f"{f['frechet_autoencoder']:.3g} the autoencoder alone."
    )
    if "wall_share" in f:
        section.say(
            f"In the routes' last {END} frames a wall fills {f['wall_share']:.0%} of the generated views "
            f"and {f['wall_share_true']:.0%} of the true ones (by the map {f['wall_share_map']:.0%}); so "
            f"says a probe that is right in {f['probe_accuracy']:.1%} of true views that it has not seen."
        )
