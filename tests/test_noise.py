"""Noise: the identities of flow matching, the counter's statistics and repeatability, the training levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.model.noise import add_noise, counter_noise, jittered, ramp, training_sigma

SHAPE = (3, 5, 7)  # odd on purpose: 105 numbers
LADDER = torch.tensor([0.4, 0.7, 0.9, 1.0])


def noise(seed: int | list[int], frame: int = 0, count: int = 1, shape=SHAPE) -> Tensor:
    seeds = torch.tensor([seed] if isinstance(seed, int) else seed)
    return counter_noise(seeds, frame, count, shape)


def correlation(x: Tensor, y: Tensor) -> float:
    """Of two samples, in standard errors."""
    x, y = x.flatten().double(), y.flatten().double()
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1].abs() * len(x) ** 0.5)


def test_add_noise_goes_from_clean_to_noise():
    clean, other = torch.randn(2, 3, *SHAPE), torch.randn(2, 3, *SHAPE)
    sigma = torch.tensor([[0.0, 0.25, 1.0], [1.0, 0.5, 0.0]])
    made = add_noise(clean, other, sigma)
    assert torch.equal(made[0, 0], clean[0, 0]) and torch.equal(made[1, 2], clean[1, 2])
    assert torch.equal(made[0, 2], other[0, 2]) and torch.equal(made[1, 0], other[1, 0])
    assert torch.allclose(made[0, 1], 0.75 * clean[0, 1] + 0.25 * other[0, 1], atol=1e-6)


def test_counter_noise_is_repeated_exactly():
    torch.manual_seed(1)
    first = noise([5, 6], 7, 3)
    torch.manual_seed(2)
    assert first.shape == (2, 3, *SHAPE) and torch.equal(first, noise([5, 6], 7, 3))


def test_counter_noise_of_a_frame_does_not_depend_on_what_else_is_asked():
    whole = noise([5, 6, 7], 100, 5)
    assert torch.equal(whole[:, 2:], noise([5, 6, 7], 102, 3))
    for game, seed in enumerate([5, 6, 7]):
        for i in range(5):
            assert torch.equal(whole[game, i], noise(seed, 100 + i)[0, 0])


def test_counter_noise_differs_by_seed_and_frame():
    parts = [noise(list(range(8)), frame, 4) for frame in (0, 17, 1024, 100_000)]
    different = torch.cat(parts, 1).flatten(0, 1).flatten(1)  # (8 · 16, 105)
    assert len({tuple(row) for row in different.tolist()}) == len(different) == 128
    table = torch.corrcoef(different) - torch.eye(len(different))
    assert table.abs().max() < 0.6, "105 numbers of each: 6 standard errors"
    assert (table * 105**0.5).square().sum().div(128 * 127).item() == pytest.approx(1, abs=0.1)


def test_counter_noise_of_large_seeds():
    """A seed may be any int64; its high half counts too."""
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**62, -1, -(2**40), 2**63 - 1]
    made = noise(seeds, 3)
    assert made.isfinite().all() and len({x.sum().item() for x in made}) == len(seeds)


def test_counter_noise_is_gaussian():
    x = noise(list(range(40)), 1000, 25, (16, 6, 8))  # 768 000 numbers
    assert x.dtype == torch.float32 and x.isfinite().all()
    flat = x.flatten().double()
    error = len(flat) ** -0.5
    assert abs(flat.mean()) < 4.5 * error
    assert abs(flat.var() - 1) < 4.5 * 2**0.5 * error
    assert abs((flat**3).mean()) < 4.5 * 15**0.5 * error
    assert abs((flat**4).mean() - 3) < 4.5 * 96**0.5 * error
    assert 4 < flat.abs().max() < 7
    expected = torch.special.ndtr(flat.sort().values)
    steps = torch.arange(len(flat), dtype=torch.float64) / len(flat)
    assert (expected - steps).abs().max() < 2 * error, "Kolmogorov-Smirnov"


def test_counter_noise_has_no_correlations():
    x = noise(list(range(40)), 0, 25, (16, 6, 8)).flatten(2)  # (seed, frame, 768)
    pairs = {
        "seeds": (x[1:], x[:-1]),
        "frames": (x[:, 1:], x[:, :-1]),
        "places": (x[..., 1:], x[..., :-1]),
        "rows": (x[..., 8:], x[..., :-8]),
        "halves": (x[..., :384], x[..., 384:]),
    }
    for name, (a, b) in pairs.items():
        assert correlation(a, b) < 4.5, name
        assert correlation(a.square(), b.square()) < 4.5, f"squares of {name}"


def test_ramp_goes_from_pure_noise_to_the_ladder():
    assert ramp(LADDER, 0).tolist() == [1, 1, 1, 1]
    assert torch.equal(ramp(LADDER, 1), LADDER[[2, 2, 2, 3]])
    assert torch.equal(ramp(LADDER, 2), LADDER[[1, 1, 2, 3]])
    assert torch.equal(ramp(LADDER, 3), LADDER) and torch.equal(ramp(LADDER, 9), LADDER)


def test_jittered_levels_fall_by_a_share_and_the_last_stays():
    levels = jittered(LADDER.expand(500, -1), 0.2)
    share = levels / LADDER
    assert torch.equal(levels[:, -1], torch.ones(500)) and (share <= 1).all() and (share >= 0.8).all()
    assert share[:, 0].std() > 0.04 and torch.equal(jittered(LADDER[None], 0.0), LADDER[None])


def test_training_sigma_shows_the_ladder_what_is_raised_and_what_is_lowered():
    sigma = training_sigma(LADDER, 4000, 0.0, 0.2)
    assert sigma.shape == (4000, 4)

    def share(levels: Tensor) -> float:
        return (sigma == levels).all(1).float().mean().item()

    stairs = [LADDER, *(LADDER[[i, i, 2, 3]] for i in (1, 2)), torch.ones(4)]
    stairs[2] = LADDER[[2, 2, 2, 3]]
    shares = [share(levels) for levels in stairs]
    assert shares[0] == pytest.approx(0.34 + 0.33 / 4, abs=0.03), "mostly the ladder itself"
    assert shares[1:] == pytest.approx([0.33 / 4] * 3, abs=0.02), "as while a window fills up"
    low = sigma[sigma[:, -1] < 1]
    assert len(low) / 4000 == pytest.approx(1 - sum(shares), abs=0.001), "nothing else"
    assert torch.allclose(low / low[:, -1:], LADDER.expand(len(low), -1)), "the ladder as a whole"
    assert low[:, -1].min() >= 0.2 and low[:, -1].mean() == pytest.approx(0.6, abs=0.03)


def test_training_sigma_falls_by_the_jitter_but_for_pure_noise():
    sigma = training_sigma(LADDER, 4000, 0.2, 0.2)
    sigma = sigma[sigma[:, -1] == 1]  # the others are lowered as a whole
    assert len(sigma) > 2000, "the newest frame stays pure noise"
    assert (sigma[:, 0] >= 0.8 * LADDER[0] - 1e-6).all() and (sigma <= 1).all()
    plain = sigma[sigma[:, 2] <= LADDER[2]]
    assert (sigma[:, 0] < LADDER[0]).float().mean() > 0.5 and len(plain) > 2000
    stairs = plain[plain[:, 1] < 0.8 * LADDER[2]]  # not raised either
    assert len(stairs) > 500 and correlation(stairs[:, 2], stairs[:, 1]) < 4.5, "each falls by itself"


def test_training_sigma_works_for_a_window_of_one():
    sigma = training_sigma(torch.tensor([1.0]), 50, 0.3, 0.2)
    assert sigma.shape == (50, 1) and (sigma <= 1).all() and (sigma >= 0.2).all()
