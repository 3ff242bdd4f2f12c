"""Each variant plays what its name says; rows are skipped and resumed; the page has the files' table."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from games import Game, make_denoiser, make_game, make_states, play
from torch import Tensor

from engine.config import TrainConfig, UserError, load_config
from engine.data.recording import Recorder
from engine.evaluation import ablate, ablation, stage, table, variants
from engine.evaluation.section import Section
from engine.evaluation.variants import VARIANTS, FrameByFrame, OnePass, SinkAtIndex, Sinkless, SinkRefreshed
from engine.model.world_model import Generator
from engine.rollout.rollout import Rollout
from engine.rollout.session import Session

ROOT = Path(__file__).resolve().parent.parent


def flipped(game: Game, step: int) -> Game:
    """The game, all keys of one step being others."""
    other = game.played.clone()
    other[step] = 1 - other[step]
    return game._replace(played=other)


def changed(a: Tensor, b: Tensor) -> list[bool]:
    """Which of the frames differ."""
    return [bool((x - y).abs().max() > 1e-5) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind, seen", [(Rollout, True), (Sinkless, False)])
def test_without_a_sink_the_start_is_forgotten(kind, seen):
    denoiser, game = make_denoiser(), make_game(start=14)  # far beyond what the ring has seen
    other = game.latents.clone()
    other[:, 0] += 1
    first = play(kind(Generator(denoiser), 2), game)
    second = play(kind(Generator(denoiser), 2), game._replace(latents=other))
    assert any(changed(first, second)) is seen
    assert kind(Generator(denoiser)).start_frames == 4, "the same start for both"


def test_a_config_without_a_sink_plays_like_a_game_without():
    game = make_game(start=14)
    without = play(Rollout(Generator(make_denoiser(sink_frames=0)), 2), game)
    assert not any(changed(without, play(Sinkless(Generator(make_denoiser()), 2), game)))


def test_a_sink_at_its_index_differs_once_it_should_have_moved():
    denoiser, game = make_denoiser(), make_game(frames=6)
    apart = changed(
        play(Rollout(Generator(denoiser), 2), game), play(SinkAtIndex(Generator(denoiser), 2), game)
    )
    assert apart[0] is False and all(apart[2:])


def test_a_refreshed_sink_is_the_newest_frame_with_keys(monkeypatch):
    monkeypatch.setattr(variants, "REFRESH", 5)
    denoiser, game = make_denoiser(), make_game()
    fixed, fresh = Rollout(Generator(denoiser), 2), SinkRefreshed(Generator(denoiser), 2)
    for number, action in enumerate([None, *game.played], start=4):  # the window's first frame after this
        for rollout in (fixed, fresh):
            if action is None:
                rollout.reset(game.latents, game.before, game.seed)
            else:
                rollout.step(action)
        cache, ring = fresh.cache, fresh.cache.ring
        if number < 9:
            assert torch.equal(cache.buffer[:, :, :, ring], fixed.cache.buffer[:, :, :, ring])
        if number == 9:  # frame 8 is pending, 7 is the newest in the ring
            keys, values = cache.buffer[:, :, :, 7 % ring].clone().unbind(1)
        if number >= 9 and number < 14:
            turned = denoiser.transformer.positions.shift(keys, torch.tensor(number - 4 - 7))
            assert torch.allclose(cache.buffer[:, 0, :, ring], turned, atol=1e-5)
            assert torch.equal(cache.buffer[:, 1, :, ring], values)
    assert not torch.equal(cache.buffer[:, 1, :, ring], values), "and renewed again"
    fresh.reset(game.latents, game.before, game.seed)
    assert int(fresh.made) == 0, "a new game has its own"


@pytest.mark.parametrize("kind, passes", [(FrameByFrame, 3), (OnePass, 1)])
@pytest.mark.parametrize("told", [False, True], ids=["keys alone", "with states"])
def test_frame_by_frame_obeys_at_once_and_takes_a_pass_a_level(kind, passes, told):
    denoiser, states, game = make_denoiser(told), make_states() if told else None, make_game(frames=6)
    rollout, seen = kind(Generator(denoiser, states), 2), []
    rollout.reset(game.latents, game.before, game.seed, game.states if told else None)
    denoiser.register_forward_hook(lambda module, args, made: seen.append((made.shape[1], args[1][0, 0])))
    rollout.speculate()
    frames = [rollout.step(action) for action in game.played]
    assert len(seen) == passes * len(frames) and {size for size, _ in seen} == {1}
    assert torch.tensor([level for _, level in seen[:passes]]).tolist() == pytest.approx(
        [1, 0.8, 0.5][:passes]
    )
    other = play(kind(Generator(denoiser, states), 2), flipped(game, 4))
    assert changed(torch.stack(frames), other)[:5] == [False] * 4 + [True]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_plays_a_checkpoint(name, tiny_checkpoint):
    session = Session(variants.open_variant(name, tiny_checkpoint, "cpu", "fp32"))
    assert type(session.rollout) is VARIANTS[name].rollout
    start = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8)
    session.reset(0, start, None, [{"x": 9.0 * n, "y": 40.0, "angle": 7.0 * n} for n in range(4)])
    assert bool(session.state()) is (name != "stateless")
    session.speculate()
    made = [session.step(np.eye(3, dtype=np.float32)[number % 3]) for number in range(3)]
    assert np.std(made) > 1 and not np.array_equal(made[0], made[2])


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Parts of the evaluation that only tell that they were called, and how the game was played."""
    calls = []

    def fake(scope, **options) -> Section:
        assert options == {} and not scope.size.settings, "latency as it plays, and no other way"
        return Section("", {"psnr_64": 20.0 + len(calls), "drift_2min_scripted_true": 1.5})

    def drift(scope) -> Section:
        calls.append(scope.folder.name)
        return Section("", {"rollout": scope.player.rollout.__name__})

    for name in ("speed", "fidelity", "control", "latency"):
        monkeypatch.setattr(ablation, name, fake)
    monkeypatch.setattr(ablation, "drift", drift)
    return calls


@pytest.fixture
def options(tiny_checkpoint, tmp_path, monkeypatch):
    """`train.py`'s options, for a short recording and no simulator."""
    from engine.model.checkpoint import Checkpoint

    monkeypatch.setitem(sys.modules, "vizdoom", None)
    monkeypatch.setattr(stage, "QUICK", replace(stage.QUICK, reference=8))
    world = Checkpoint(tiny_checkpoint).world
    with Recorder(tmp_path / "data" / "a", world, "true", 0, lossless=True) as recorder:
        for number in range(40):
            picture = np.random.default_rng(number).integers(0, 255, (96, 128, 3), np.uint8)
            recorder.add(picture, [0, 0, 0], reset=number == 0, t_ns=number)
    plain = ["stage=ablate", "quick=true", "precision=fp32", "device=cpu", "unseen=true"]
    plain += [f"checkpoint={tiny_checkpoint}", f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}"]
    return lambda *more: load_config("train", TrainConfig, [*plain, *more])


def test_rows_are_written_one_by_one_and_skipped_when_they_are_there(
    measured, options, tmp_path, monkeypatch
):
    out, some = tmp_path / "out", "variants=[full,stateless,no_sink]"
    first = ablate(options(some, "max_minutes=1e-9"))
    assert first["measured"] == [] and first["left"] == ["full", "stateless", "no_sink"]
    assert ablate(options("variants=[full,stateless]"))["measured"] == measured == ["full", "stateless"]
    (out / "full.json").write_text((out / "full.json").read_text()[:50])  # cut short
    again = ablate(options(some))
    assert again["measured"] == ["full", "no_sink"] and again["skipped"] == ["stateless"]
    row = json.loads((out / "stateless.json").read_text())
    assert (
        row["figures"]["rollout"] == "Rollout"
        and row["machine"]
        and row["size"]["routes"] == ablation.SHORT.routes
    )
    assert ablate(options(some, "seed=1"))["measured"] == ["full", "stateless", "no_sink"], "another seed"


def test_a_row_of_another_checkpoint_has_a_name_of_its_own(measured, options, tmp_path):
    assert ablate(options("row=undistilled"))["measured"] == ["undistilled"]
    assert ablate(options("row=alone", "variants=[window_1]"))["measured"] == ["alone"]
    row = json.loads((tmp_path / "out" / "alone.json").read_text())
    assert (row["row"], row["variant"]) == ("alone", "window_1")


@pytest.mark.parametrize(
    "more, said",
    [
        (["variants=[ful]"], "no variant 'ful'"),
        (["row=a/b"], "letters and digits"),
        (["row=a", "variants=[full,no_sink]"], "single variant"),
        (["checkpoint="], "needs checkpoint=FILE"),
    ],
)
def test_what_cannot_be_measured_is_said(options, more, said):
    with pytest.raises(UserError, match=said):
        ablate(options(*more))


def test_the_table_has_the_variants_in_order_and_then_other_rows(tmp_path):
    common = {"checkpoint": "abc", "seed": 0, "precision": "fp32", "machine": "a computer"}
    rows = [
        {
            "row": "window_1",
            "variant": "window_1",
            "figures": {"drift_2min_scripted": 1.234, "fps_p50": 39.0},
        },
        {"row": "made_otherwise", "variant": "full", "figures": {}},
        {
            "row": "full",
            "variant": "full",
            "figures": {"drift_2min_scripted": 1.0, "drift_2min_scripted_true": 1.5},
        },
    ]
    for row in rows:
        (tmp_path / f"{row['row']}.json").write_text(json.dumps(row | common))
    document = tmp_path / "page.md"
    document.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    for _ in range(2):  # the second time changes nothing
        table.write_table(tmp_path, document)
        text = document.read_text()
        assert text.startswith(f"before\n\n{table.BEGIN}\n") and text.endswith(f"{table.END}\n\nafter\n")
    titles = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][2:]
    assert titles == [
        ["| the full method", "1"],
        ["| frame by frame, all levels", "1.23"],
        ["| made otherwise", "–"],
        ["| the true world under the same keys", "1.5"],
    ]
    assert text.count("`abc`") == 1 and "old" not in text
    document.write_text("no place for it")
    with pytest.raises(UserError, match="each once"):
        table.write_table(tmp_path, document)


def test_the_page_has_the_table_of_the_committed_rows(tmp_path):
    copy = shutil.copy(ROOT / "docs" / "rolling-forcing.md", tmp_path)
    table.write_table(ROOT / "docs" / "ablation", Path(copy))
    committed = (ROOT / "docs" / "rolling-forcing.md").read_text("utf-8")
    assert Path(copy).read_text("utf-8") == committed, "run python -m engine.evaluation.table"
