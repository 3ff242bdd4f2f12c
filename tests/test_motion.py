"""The first guess: nothing moves at first, a matrix for each key and each frame ahead, across patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.motion import Motion

KEYS, CHANNELS, PATCH, AHEAD = 3, 2, 2, 2
ROWS, COLUMNS = 4, 6


def make(scramble: float = 0.0, patch: int = PATCH) -> Motion:
    torch.manual_seed(0)
    motion = Motion(KEYS, CHANNELS, patch, AHEAD)
    with torch.no_grad():
        motion.weight.add_(scramble * torch.randn_like(motion.weight))
    return motion


def keys(*held: int) -> Tensor:
    """→ multi-hot (1, 1, k)."""
    return F.one_hot(torch.tensor(held, dtype=torch.int64), KEYS).sum(0).float()[None, None]


def shifted(frames: Tensor, right: int) -> Tensor:
    """Frames (..., x) moved by some columns to the right (left where negative); the edge is repeated."""
    columns = torch.arange(frames.shape[-1]) - right
    return frames[..., columns.clamp(0, frames.shape[-1] - 1)]


@torch.no_grad()
@pytest.mark.parametrize("patch, rows, columns", [(1, 3, 5), (2, 4, 6), (4, 4, 12)])
def test_nothing_moves_at_first(patch, rows, columns):
    before = torch.randn(3, 5, CHANNELS, rows, columns)
    actions = (torch.rand(3, 5, KEYS) < 0.5).float()
    guess = make(patch=patch)(before, actions, torch.tensor([0, 1, 1, 0, 1]))
    assert guess.dtype == torch.float32 and torch.equal(guess, before)


@torch.no_grad()
@pytest.mark.parametrize("patch, rows, columns", [(1, 3, 5), (2, 4, 6), (4, 4, 12)])
def test_it_is_the_written_out_definition(patch, rows, columns):
    """One patch after the other: the always valid matrix and those of the held keys, on its surroundings."""
    motion, border = make(0.2, patch), patch // 2
    before, ahead = torch.randn(2, 3, CHANNELS, rows, columns), [1, 0, 1]
    actions = (torch.rand(2, 3, KEYS) < 0.5).float()
    made = motion(before, actions, torch.tensor(ahead))
    rows_at, columns_at = (torch.arange(-border, n + border).clamp(0, n - 1) for n in (rows, columns))
    expected = torch.full_like(made, torch.nan)
    for b in range(2):
        for t in range(3):
            wide = before[b, t][:, rows_at][:, :, columns_at]
            matrix = motion.weight[ahead[t], 0] + (
                actions[b, t, :, None, None] * motion.weight[ahead[t], 1:]
            ).sum(0)
            for y in range(0, rows, patch):
                for x in range(0, columns, patch):
                    around = wide[:, y : y + patch + 2 * border, x : x + patch + 2 * border]
                    moved = (matrix @ around.flatten()).view(CHANNELS, patch, patch)
                    expected[b, t, :, y : y + patch, x : x + patch] = moved
    assert torch.allclose(made, expected, atol=1e-5)


@torch.no_grad()
def test_it_is_linear_in_the_frame():
    motion, ahead = make(0.2), torch.arange(2)
    one, other = torch.randn(2, 2, 2, CHANNELS, ROWS, COLUMNS)
    actions = (torch.rand(2, 2, KEYS) < 0.5).float()
    whole = motion(2 * one - 3 * other, actions, ahead)
    parts = 2 * motion(one, actions, ahead) - 3 * motion(other, actions, ahead)
    assert torch.allclose(whole, parts, atol=1e-4)
    assert not motion(torch.zeros_like(one), actions, ahead).any()


@torch.no_grad()
@pytest.mark.parametrize("ahead", range(AHEAD))
@pytest.mark.parametrize("row", range(1 + KEYS))
def test_every_key_and_every_ahead_has_its_own_matrix(row, ahead):
    """A changed matrix is seen while its key is held (the first one always), so far ahead, nowhere else."""
    before = torch.randn(1, 1, CHANNELS, ROWS, COLUMNS)
    plain, changed = make(0.2), make(0.2)
    changed.weight[ahead, row] += torch.randn_like(changed.weight[ahead, row])
    for held in ((), (0,), (1,), (2,), (0, 2), (0, 1, 2)):
        for far in range(AHEAD):
            difference = changed(before, keys(*held), torch.tensor([far]))
            difference -= plain(before, keys(*held), torch.tensor([far]))
            seen = far == ahead and (row == 0 or row - 1 in held)
            assert (difference.abs().max() > 0.1) == seen and difference.any() == seen, (held, far)


@torch.no_grad()
def test_keys_held_together_add_up():
    motion, before, now = make(0.2), torch.randn(1, 1, CHANNELS, ROWS, COLUMNS), torch.tensor([0])
    none, first, last, both = (motion(before, keys(*held), now) for held in ((), (0,), (2,), (0, 2)))
    assert torch.allclose(both - none, (first - none) + (last - none), atol=1e-5)


@torch.no_grad()
def test_what_moves_crosses_the_borders_of_patches():
    """A matrix that shifts by one column does so for whole pictures: the neighbours' columns come in."""
    motion = make()
    still = motion.weight[0, 0].view(CHANNELS, PATCH, PATCH, CHANNELS, 2 * PATCH, 2 * PATCH)
    for key, (right, axis) in enumerate([(1, -1), (-1, -1), (1, -2)]):
        motion.weight[0, 1 + key] = (still.roll(-right, axis) - still).flatten(3).flatten(0, 2)
    before = torch.randn(1, 1, CHANNELS, ROWS, COLUMNS)
    right, left, down = (motion(before, keys(key), torch.tensor([0])) for key in range(3))
    assert torch.allclose(right, shifted(before, 1), atol=1e-6)
    assert torch.allclose(left, shifted(before, -1), atol=1e-6)
    assert torch.allclose(down, shifted(before.mT, 1).mT, atol=1e-6)
    dot = torch.zeros_like(before)
    dot[..., 1, 1] = 1  # the last of its patch in both directions
    assert motion(dot, keys(0), torch.tensor([0]))[..., 1, 2].tolist() == [[[1, 1]]]
    assert motion(dot, keys(2), torch.tensor([0]))[..., 2, 1].tolist() == [[[1, 1]]]


def moves(size: int, random: torch.Generator, permuted: bool = False) -> tuple[Tensor, Tensor]:
    """Key 0 shifts left, key 1 right, key 2 nothing, by a column a frame → a frame and those after it (b, 1 +
    ahead, c, y, x), actions (b, k); `permuted` gives each game another one's key.
    """
    before = torch.randn(size, CHANNELS, 4, 16, generator=random)
    key = torch.randint(KEYS, (size,), generator=random)
    ways = [torch.stack([shifted(before, way * k) for k in range(1 + AHEAD)], 1) for way in (-1, 1, 0)]
    clips = torch.stack(ways)[key, torch.arange(size)]
    if permuted:
        key = key[torch.randperm(size, generator=random)]
    return clips, F.one_hot(key, KEYS).float()


def guesses(motion: Motion, clips: Tensor, action: Tensor) -> Tensor:
    """→ squared error (b, ahead) of the guesses made from each clip's first frame."""
    before, actions = (x[:, None].expand(-1, AHEAD, *x.shape[1:]) for x in (clips[:, 0], action))
    return (motion(before, actions, torch.arange(AHEAD)) - clips[:, 1:]).square().mean((2, 3, 4))


@torch.no_grad()
def errors(motion: Motion) -> Tensor:
    """→ mean squared error on new games for each key and number of frames ahead (k, t)."""
    clips, action = moves(256, torch.Generator().manual_seed(2))
    error = guesses(motion, clips, action)
    return torch.stack([error[action[:, key] > 0].mean(0) for key in range(KEYS)])


@pytest.mark.parametrize("permuted", [False, True])
def test_it_learns_which_way_a_key_shifts(permuted):
    """By descent; keys that belong to another game teach nothing."""
    motion, random = make(patch=4).requires_grad_(), torch.Generator().manual_seed(1)
    optimiser, first = torch.optim.Adam(motion.parameters(), lr=0.02), errors(motion)
    assert (first[:2] > 1).all() and (first[2] == 0).all()
    for _ in range(200):
        guesses(motion, *moves(16, random, permuted)).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    found = errors(motion)
    assert (found > 0.3 if permuted else found < 0.05).all(), found


@torch.no_grad()
@pytest.mark.parametrize("permuted", [False, True])
def test_it_is_fitted_to_which_way_a_key_shifts(permuted):
    """In closed form; keys that belong to another game teach nothing here either."""
    motion, random = make(patch=4), torch.Generator().manual_seed(1)
    motion.fit((moves(256, random, permuted) for _ in range(20)), ridge=100.0)
    found = errors(motion)
    assert (found > 0.3 if permuted else found < 0.01).all(), found
    if not permuted:
        clips, _ = moves(8, random)
        right = motion(clips[:, :1], F.one_hot(torch.tensor([[1]] * 8), KEYS).float(), torch.tensor([0]))
        inner = right[:, 0, ..., 1:] - clips[:, 0, ..., :-1]
        assert inner.abs().max() < 0.2, "the right key shifts to the right"
