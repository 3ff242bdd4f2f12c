"""Every number that users give has bounds, beside its field, and one sentence for what is beyond them."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from engine.bounds import Checked, short_seed
from engine.config import PlayConfig, StateConfig, TrainConfig, UserError, WorldConfig, load_config

NUMBERS = {int: int, float: float, list[int]: int, list[float]: float}


def kinds_below(kind: type) -> list[type[Checked]]:
    """A config's class and those of its parts."""
    hints = get_type_hints(kind)
    below = [hints[one.name] for one in fields(kind) if is_dataclass(hints[one.name])]
    return list(dict.fromkeys([kind, *(found for part in below for found in kinds_below(part))]))


CONFIGS = list(dict.fromkeys([*kinds_below(TrainConfig), *kinds_below(PlayConfig)]))
FIELDS = [
    (kind, one)
    for kind in CONFIGS
    for one in fields(kind)
    if get_type_hints(kind)[one.name] in NUMBERS and one.name != "seed"
]


def refusal(kind: type, **values) -> str:
    with pytest.raises(UserError) as caught:
        kind(**values)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 200
    return said


@pytest.mark.parametrize(
    "kind, one", FIELDS, ids=lambda value: getattr(value, "name", None) or value.__name__
)
def test_every_number_has_bounds(kind, one):
    hint = get_type_hints(kind)[one.name]
    bounds, number = one.metadata.get("bounds", {}), NUMBERS[hint]
    lower, upper = (
        [bounds[name] for name in pair if name in bounds] for pair in (("least", "above"), ("most", "below"))
    )
    assert len(lower) == len(upper) == 1 and math.isfinite(lower[0]) and math.isfinite(upper[0])
    kind()  # the defaults are within them
    wrong = [number(lower[0]) - 1, number(upper[0]) + 1, "x", None, True]
    wrong += [math.nan, math.inf, -math.inf] if number is float else [1.5, math.nan, 2**70]
    wrong += [bounds["above"]] if "above" in bounds else []
    wrong += [bounds["below"]] if "below" in bounds else []
    for value in wrong:
        given = [value, value] if hint in (list[int], list[float]) else value
        said = refusal(kind, **{one.name: given})
        assert said.startswith(f"{kind.section}.{one.name} must be".lstrip(".")), said


@pytest.mark.parametrize(
    "kind, values, word",
    [
        (WorldConfig, {"keys": 5}, "world.keys must be a mapping"),
        (WorldConfig, {"keys": {"left": "A"}}, "world.keys must be a mapping"),
        (WorldConfig, {"keys": {1: ["A"]}}, "world.keys must be a mapping"),
        (WorldConfig, {"name": 5}, "world.name must be text"),
        (StateConfig, {"names": 10_000 * ["x"]}, "model.state.names must be a list"),
        (TrainConfig, {"world": 5}, "world must be"),
        (TrainConfig, {"quick": 1}, "quick must be true or false"),
    ],
)
def test_types_are_checked(kind, values, word):
    assert word in refusal(kind, **values)


@pytest.mark.parametrize(
    "options, word",
    [
        ("model.denoiser.ladder=[0.8,0.5,1.0]", "ascending"),
        ("model.denoiser.ladder=[0.5,0.5,1.0]", "ascending"),
        ("model.denoiser.ladder=[0.5,nan,1.0]", "model.denoiser.ladder must be"),
        ("stages.denoiser.betas=[0.9]", "two numbers"),
        ("model.autoencoder.widths=[]", "one to eight"),
        ("world.fps=nan", "world.fps must be"),
        ("world.height=100", "multiples of 32"),
        ("stages.distill.ema=2", "stages.distill.ema must be at least 0 and below 1, not 2.0."),
    ],
)
def test_the_command_line_is_checked(options, word):
    with pytest.raises(UserError, match=word.replace("[", r"\[")):
        load_config("train", TrainConfig, options.split())


def test_seeds_of_any_size():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**63, 2**70, -1, -(2**70), 1_795_000_000_123_456_789]
    short = [short_seed(seed) for seed in seeds]
    assert short[:3] == seeds[:3] and len(set(short)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in short)
    assert [TrainConfig(seed=seed).seed for seed in seeds] == short
    assert [PlayConfig(seed=seed).seed for seed in seeds] == seeds, (
        "a recording tells the seed that was given"
    )
    assert load_config("train", TrainConfig, [f"seed={-(2**70)}"]).seed == short_seed(-(2**70))


@pytest.mark.parametrize(
    "option, given",
    [
        (
            "model={denoiser:{ladder:[0.2,0.6,1.0],layers:5}}",
            ["model.denoiser.ladder", "model.denoiser.layers"],
        ),
        ("model.denoiser={layers:5}", ["model.denoiser.layers"]),
        ("model.denoiser.layers=5", ["model.denoiser.layers"]),
        ("++model.denoiser.layers=5", ["model.denoiser.layers"]),
        ("preset=toy", ["preset"]),
    ],
)
def test_options_are_known_by_their_full_names(option, given):
    """Whatever the spelling, later stages ask whether an option was given."""
    assert load_config("train", TrainConfig, [option]).given == given
