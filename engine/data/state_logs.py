"""Training data of stage `state`: recorded states and actions without frames, and single frames' latents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..stage_config import StateStageConfig
from .latents import LatentsCache
from .recording import Recording

WARM = 16  # most recorded frames before those that are predicted in a row
APART_SHARE = 0.4  # share of iterations in which every frame is predicted from recorded ones
APART = 24  # frames of a game in these iterations
SHORTEST = 8  # fewest frames predicted in a row
RESET_SHARE = 0.15  # share of games that begin with an episode


class StateBatch(NamedTuple):
    """Recorded states (b, warm + t, S), the actions that caused them (b, warm + t, k), and how many frames
    come before those to be predicted.
    """

    states: Tensor
    actions: Tensor
    warm: int

    def to(self, device: torch.device) -> StateBatch:
        return StateBatch(self.states.to(device), self.actions.to(device), self.warm)


class StateLogs:
    """States, actions and resets of many recordings in a row, from which games are cut."""

    def __init__(self, states: Tensor, actions: Tensor, resets: Tensor) -> None:
        """(n, S) float32 raw units, (n, k) float32, (n,) bool: true where an episode or recording starts."""
        self.states, self.actions, self.resets = states.float(), actions.float(), resets.bool()
        first = torch.arange(len(resets))
        borders = torch.cat([first[self.resets], torch.tensor([len(resets)])])
        place = torch.searchsorted(borders, first, right=True).clamp_max(len(borders) - 1)
        self.left = borders[place] - first  # frames of the same episode from here on

    @classmethod
    def read(
        cls, recordings: Iterable[Recording], names: Sequence[str], keys: Sequence[str]
    ) -> StateLogs | None:
        """Logs of recordings, states with the columns `names`, actions with the columns `keys`. Frames
        without state are left out; None if no frame has one. Raises UserError for a recording with some of
        `names` only.
        """
        parts = []
        for recording in recordings:
            rows, states = known_states(recording, names)
            if not len(rows):
                continue
            actions = np.zeros((len(rows), len(keys)), np.float32)
            for column, name in enumerate(recording.names):
                if name in keys:
                    actions[:, keys.index(name)] = recording.actions[rows, column]
            resets = recording.resets[rows] | (np.diff(rows, prepend=-2) != 1)
            parts.append([torch.from_numpy(part) for part in (states, actions, resets)])
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True))) if parts else None

    def __len__(self) -> int:
        return len(self.states)

    def cut(self, starts: Tensor, length: int, warm: int) -> StateBatch:
        """Games of `length` frames that begin at the frames `starts` (b,)."""
        rows = starts[:, None] + torch.arange(length)
        return StateBatch(self.states[rows], self.actions[rows], warm)

    def batch(self, seed: int, stage: StateStageConfig) -> StateBatch:
        """Random games. In a share of the batches (APART_SHARE) `warm` is 0: frames are predicted from
        recorded ones. In all others a number of frames is predicted in a row, drawn from SHORTEST, twice that
        and so on up to `stage.unroll`; the longer, the fewer games. Raises UserError if no episode is long
        enough.
        """
        random = torch.Generator().manual_seed(seed)
        lengths = [min(SHORTEST, stage.unroll)]
        while lengths[-1] < stage.unroll:
            lengths.append(min(2 * lengths[-1], stage.unroll))
        unroll = lengths[int(torch.randint(len(lengths), (), generator=random))]
        if float(torch.rand((), generator=random)) < APART_SHARE:
            unroll = 0
        warm = int(torch.randint(1, WARM + 1, (), generator=random)) if unroll else 0
        length = warm + (unroll or APART)
        fits = self.left >= length
        anywhere, begun = fits.nonzero()[:, 0], (fits & self.resets).nonzero()[:, 0]
        if not len(anywhere):
            raise UserError(f"No recorded episode has {length} frames; collect longer ones.")
        count = max(stage.batch // 4, stage.batch * lengths[0] // unroll) if unroll else stage.batch
        starts = anywhere[torch.randint(len(anywhere), (count,), generator=random)]
        if len(begun):
            early = begun[torch.randint(len(begun), (count,), generator=random)]
            starts = torch.where(torch.rand(count, generator=random) < RESET_SHARE, early, starts)
        return self.cut(starts, length, warm)


class StatePictures(NamedTuple):
    """Latents and states of single frames."""

    latents: Tensor  # (n, c, y, x) float16
    states: Tensor  # (n, S) raw units

    @classmethod
    def read(cls, cache: LatentsCache, names: Sequence[str], limit: int, seed: int) -> StatePictures | None:
        """At most `limit` random frames of a cache of which the numbers `names` are known; None if there are
        none.
        """
        known = []
        for states, columns in zip(cache.states, cache.state_names, strict=True):
            complete = set(names) <= set(columns)
            own = states[:, [columns.index(name) for name in names]] if complete else states[:0]
            known.append((rows := np.flatnonzero(np.isfinite(own).all(1)), own[rows]))
        total = sum(len(rows) for rows, _ in known)
        if not total:
            return None
        chosen = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
        latents, kept, first = [], [], 0
        for pictures, (rows, states) in zip(cache.latents, known, strict=True):
            mine = chosen[(chosen >= first) & (chosen < first + len(rows))] - first
            first += len(rows)
            latents.append(torch.from_numpy(pictures[rows[mine]]))
            kept.append(torch.from_numpy(states[mine]))
        return cls(torch.cat(latents), torch.cat(kept))

    def batch(self, seed: int, count: int) -> StatePictures:
        """`count` random ones of these, as float32."""
        random = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.latents), (count,), generator=random)
        return StatePictures(self.latents[rows].float(), self.states[rows])

    def to(self, device: torch.device) -> StatePictures:
        return StatePictures(self.latents.to(device), self.states.to(device))


def known_states(recording: Recording, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the frames that have all of `names` (n,), and their states (n, len(names)) float32. Raises
    UserError for a recording with states that lack some of `names`.
    """
    rows = [i for i, state in enumerate(recording.states) if state]
    if rows and (missing := set(names) - recording.states[rows[0]].keys()):
        said = f"{recording.directory} does not record {', '.join(sorted(missing))}"
        raise UserError(f"{said}; collect it again, or train without that recording.")
    rows = [i for i in rows if recording.states[i].keys() >= set(names)]
    states = [[recording.states[i][name] for name in names] for i in rows]
    return np.array(rows, np.int64), np.array(states, np.float32).reshape(len(rows), len(names))
