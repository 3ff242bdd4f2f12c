"""The optimiser, its schedule and the moving average."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from games import make_denoiser

from engine.config import TrainConfig, load_config
from engine.train.optim import MovingAverage, Optimiser, learning_rate

FINITE = torch.tensor(True)


def stage_config(name: str = "denoiser"):
    return load_config("train", TrainConfig, ["preset=toy", f"stage={name}"]).stage_config()


def test_learning_rate_warms_up_and_decays():
    rate = stage_config().learning_rate
    rates = [learning_rate(stage_config(), *place) for place in [(0, 0), (4, 0.1), (30, 0.7), (39, 1)]]
    assert rates == pytest.approx([rate / 5, rate, rate, 0])
    assert 0 < learning_rate(stage_config(), 35, 0.85) == pytest.approx(rate / 2)


def test_moving_average_forgets_its_start_and_follows():
    module = torch.nn.Linear(1, 1)
    average, count = MovingAverage(module, 0.99), itertools.count()
    with torch.no_grad():
        module.weight.fill_(1000.0)
        average.update(module, next(count), FINITE)
        module.weight.fill_(1.0)
        for _ in range(100):
            average.update(module, next(count), FINITE)
        assert average.module.weight.item() == pytest.approx(1, abs=0.1)
        for _ in range(2000):
            average.update(module, next(count), FINITE)
        module.weight.fill_(2.0)
        average.update(module, next(count), FINITE)
    assert 1.004 < average.module.weight.item() < 1.02, "a hundredth of the way, later on"
    assert module.weight.item() == 2


def test_muon_takes_the_matrices_of_layers_and_both_parts_follow_the_rate():
    denoiser = make_denoiser()
    optimiser = Optimiser(denoiser, stage_config())
    adam, muon = ([p for group in part.param_groups for p in group["params"]] for part in optimiser.parts)
    matrices = {id(m.weight) for m in denoiser.transformer.layers.modules() if isinstance(m, torch.nn.Linear)}
    assert {id(p) for p in muon} == matrices
    trained = {id(p) for p in denoiser.parameters() if p.requires_grad}
    assert {id(p) for p in adam} == trained - matrices, "every weight once, frozen ones never"
    before = {id(p): p.detach().clone() for p in denoiser.parameters()}
    for rate, moved in ((0.0, False), (0.01, True)):
        for p in denoiser.parameters():
            p.grad = torch.randn_like(p)
        optimiser.step(rate, FINITE)
        assert all(bool((p != before[id(p)]).any()) == moved for p in (*adam, *muon))
    assert len(Optimiser(denoiser, replace(stage_config(), muon=False)).parts) == 1


def test_the_discriminator_learns_twice_as_fast_and_both_forget_fast():
    module = torch.nn.ModuleDict({"discriminator": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)})
    stages = stage_config("decoder"), stage_config()
    for one, stage, first in ((module, stages[0], 0.5), (module["decoder"], stages[1], 0.9)):
        betas = [group["betas"] for part in Optimiser(one, stage).parts for group in part.param_groups]
        assert {beta[0] for beta in betas} == {first}
    optimiser, before = Optimiser(module, replace(stages[0], weight_decay=0.0)), copy.deepcopy(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step(0.01, FINITE)
    moved = {name: (module[name].weight - before[name].weight).abs().mean().item() for name in module}
    assert moved["discriminator"] == pytest.approx(2 * moved["decoder"], rel=0.01)


def test_weight_decay_is_that_of_the_stage_and_on_matrices_alone():
    """A step without gradients moves by weight decay alone: rate x decay of each weight."""
    module = torch.nn.ModuleDict(
        {"discriminator": torch.nn.Conv2d(2, 3, 3), "decoder": torch.nn.Linear(2, 2)}
    )
    before, optimiser = (
        copy.deepcopy(module),
        Optimiser(module, replace(stage_config("decoder"), weight_decay=0.5)),
    )
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step(0.1, FINITE)
    for name, times in (("discriminator", 2), ("decoder", 1)):
        assert torch.allclose(module[name].weight, before[name].weight * (1 - times * 0.1 * 0.5))
        assert torch.equal(module[name].bias, before[name].bias)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_step_that_is_left_out_moves_nothing_and_spoils_nothing(odd):
    """Whatever the gradients are: training goes on as if that step had never been, also if it is the first
    one, to the last bit of weights, momentum, squares and counts.
    """
    runs = []
    for steps in ((False, True, False, False, True, True), (True, True, True)):
        denoiser = make_denoiser()
        optimiser = Optimiser(denoiser, stage_config())
        random = torch.Generator().manual_seed(1)
        for finite in steps:
            for p in denoiser.parameters():
                p.grad = torch.randn(p.shape, generator=random) if finite else torch.full_like(p, odd)
            optimiser.step(0.01, torch.tensor(finite))
        kept = [state for part in optimiser.state_dict() for state in part["state"].values()]
        runs.append([*denoiser.parameters(), *(x for state in kept for _, x in sorted(state.items()))])
    assert len(runs[0]) == len(runs[1]) > 2 * len(list(make_denoiser().parameters()))
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(*runs, strict=True))


def test_a_moving_average_stands_still_with_its_weights():
    """Where a step was left out; what a pass that was not finite has left in a buffer does not come along."""
    module = torch.nn.BatchNorm1d(2)
    average = MovingAverage(module, 0.9)
    average.update(module, 0, FINITE)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(torch.nan)
        module.num_batches_tracked.fill_(7)
    before = copy.deepcopy(average.module.state_dict())
    average.update(module, 40, ~FINITE)
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())
    module.running_mean.zero_()
    average.update(module, 41, FINITE)
    assert average.module.weight.mean().item() == pytest.approx(1 + 2 * 9 / 51)
    assert average.module.num_batches_tracked == 7
