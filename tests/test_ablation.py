"""Each variant plays what its name says; rows are skipped and resumed; the page has the files' table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import DenoiserConfig, StageConfig, TrainConfig, UserError, load_config
from engine.denoiser import Denoiser
from engine.distillation import DistillLoss
from engine.evaluation import ablate, ablation, table, variants
from engine.evaluation.section import Section
from engine.evaluation.variants import VARIANTS, FrameByFrame, OnePass, SinkAtIndex, Sinkless, SinkRefreshed
from engine.recording import Recorder
from engine.rollout import Rollout
from engine.session import Session

ROOT = Path(__file__).resolve().parent.parent
KEYS, SHAPE = 3, (2, 4, 6)
SMALL = {"width": 32, "layers": 2, "head_dim": 16, "patch": 2, "fine": 8, "stem": 1, "head": 1}
SMALL |= {"window": 3, "recent": 3, "sink": 1, "ladder": [0.5, 0.8, 1.0], "correction": 0.9}


def tiny(**changes) -> Denoiser:
    """An untrained denoiser whose every weight matters."""
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(**{**SMALL, **changes}), KEYS, *SHAPE)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            small = parameter.ndim == 4 or name.startswith("motion")
            parameter.add_((0.04 if small else 0.2) * torch.randn_like(parameter))
    return denoiser.eval()


def game(start: int = 4, frames: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start latents and their actions, then the actions to play (frames, b, k), and seeds."""
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(2, start, *SHAPE, generator=random)
    before = (torch.rand(2, start, KEYS, generator=random) < 0.5).float()
    played = (torch.rand(frames, 2, KEYS, generator=random) < 0.5).float()
    return latents, before, played, torch.arange(2) + 11


def play(kind: type[Rollout], denoiser: Denoiser, latents, before, played, seed) -> Tensor:
    """→ the emitted frames (frames, b, c, y, x)."""
    rollout = kind(denoiser, len(latents))
    rollout.reset(latents, before, seed)
    return torch.stack([rollout.step(action) for action in played])


def flipped(played: Tensor, step: int) -> Tensor:
    """The actions (frames, b, k), all keys of one step being others."""
    other = played.clone()
    other[step] = 1 - other[step]
    return other


def changed(a: Tensor, b: Tensor) -> list[bool]:
    """Which of the frames differ."""
    return [bool((x - y).abs().max() > 1e-5) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind, seen", [(Rollout, True), (Sinkless, False)])
def test_without_a_sink_the_start_is_forgotten(kind, seen):
    denoiser, (latents, before, played, seed) = tiny(), game(start=14)  # far beyond what the ring has seen
    other = latents.clone()
    other[:, 0] += 1
    first, second = (play(kind, denoiser, x, before, played, seed) for x in (latents, other))
    assert any(changed(first, second)) is seen
    assert kind(denoiser).start_frames == 4, "the same start for both"


def test_a_config_without_a_sink_plays_and_trains():
    denoiser, (latents, before, played, seed) = tiny(sink=0), game(start=14)
    same = play(Rollout, denoiser, latents, before, played, seed)
    assert not any(changed(same, play(Sinkless, tiny(), latents, before, played, seed)))
    actions = before.clone()
    denoiser.train()
    assert all(denoiser.loss(latents, actions, 2)[0].isfinite() for _ in range(4))
    pace = StageConfig(batch=2, unroll=3, critic_turns=1)
    losses = DistillLoss(denoiser, tiny(sink=0), tiny(sink=0), pace)
    assert all(losses((latents, actions))[0].isfinite() for _ in range(2))
    with pytest.raises(UserError, match="sink not negative"):
        DenoiserConfig(sink=-1)


def test_a_sink_at_its_index_differs_once_it_should_have_moved():
    denoiser, given = tiny(), game()
    apart = changed(play(Rollout, denoiser, *given), play(SinkAtIndex, denoiser, *given))
    assert apart[0] is False and all(apart[2:])


def test_a_refreshed_sink_is_the_newest_frame_with_keys(monkeypatch):
    monkeypatch.setattr(variants, "REFRESH", 5)
    denoiser, (latents, before, played, seed) = tiny(), game()
    fixed, fresh = Rollout(denoiser, 2), SinkRefreshed(denoiser, 2)
    for number, action in enumerate([None, *played], start=4):  # the window's first frame after this
        for rollout in (fixed, fresh):
            _ = rollout.reset(latents, before, seed) if action is None else rollout.step(action)
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
    fresh.reset(latents, before, seed)
    assert int(fresh.made) == 0, "a new game has its own"


@pytest.mark.parametrize("kind, passes", [(FrameByFrame, 3), (OnePass, 1)])
def test_frame_by_frame_obeys_at_once_and_takes_a_pass_a_level(kind, passes):
    denoiser, (latents, before, played, seed) = tiny(commit_position=1), game()
    rollout, seen = kind(denoiser, 2), []
    rollout.reset(latents, before, seed)
    denoiser.register_forward_hook(lambda module, args, made: seen.append((made.shape[1], args[1][0, 0])))
    rollout.prepare()
    frames = [rollout.step(action) for action in played]
    assert len(seen) == passes * len(played) and {size for size, _ in seen} == {1}
    assert torch.tensor([level for _, level in seen[:passes]]).tolist() == pytest.approx(
        [1, 0.8, 0.5][:passes]
    )
    other = play(kind, denoiser, latents, before, flipped(played, 4), seed)
    assert changed(torch.stack(frames), other)[:5] == [False] * 4 + [True]


def test_frozen_keys_belong_to_the_frame_that_enters():
    config = DenoiserConfig(**SMALL)
    changes = VARIANTS["frozen"].changes(config)
    denoiser, (latents, before, played, seed) = tiny(**changes), game()
    rollout = Rollout(denoiser, 2)
    rollout.reset(latents, before, seed)
    for number, action in enumerate(played):
        rollout.step(action)
        caused = before[:, -1] if number < 2 else played[number - 2]
        assert torch.equal(rollout.cache.held[:, -1], caused), "window - 1 frames later"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_plays_a_checkpoint(name, tiny_checkpoint, tmp_path):
    session = Session(variants.open_variant(name, tiny_checkpoint, "cpu", "fp32"))
    config, clean = session.rollout.config, session.rollout.window.clean
    assert clean.shape[1] == config.window == len(session.rollout.ladder[0]) == {"ladder_2": 2}.get(name, 3)
    assert type(session.rollout) is VARIANTS[name].rollout
    start = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8)
    session.reset(0, start)
    session.prepare()
    made = [session.step(np.eye(3, dtype=np.float32)[number % 3]) for number in range(3)]
    assert np.std(made) > 1 and not np.array_equal(made[0], made[2])


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Parts of the evaluation that only tell that they were called, and how the game was played."""
    calls = []

    def fake(scope, **options) -> Section:
        assert options in ({}, {"only_own": True})
        return Section("", {"psnr_64": 20.0 + len(calls), "drift_1min_true": 1.5})

    def drift(scope) -> Section:
        calls.append(scope.folder.name)
        return Section("", {"window": scope.player.denoiser.config.window})

    for name in ("speed", "fidelity", "control", "latency"):
        monkeypatch.setattr(ablation, name, fake)
    monkeypatch.setattr(ablation, "drift", drift)
    return calls


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    """`train.py`'s options, for a short recording."""
    from engine.checkpoint import Checkpoint

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
    out, some = tmp_path / "out", "variants=[full,ladder_2,no_sink]"
    first = ablate(options(some, "max_minutes=1e-9"))
    assert first["measured"] == [] and first["left"] == ["full", "ladder_2", "no_sink"]
    assert ablate(options("variants=[full,ladder_2]"))["measured"] == measured == ["full", "ladder_2"]
    (out / "full.json").write_text((out / "full.json").read_text()[:50])  # cut short
    again = ablate(options(some))
    assert again["measured"] == ["full", "no_sink"] and again["skipped"] == ["ladder_2"]
    row = json.loads((out / "ladder_2.json").read_text())
    assert row["figures"]["window"] == 2 and row["machine"] and row["size"]["clips"] == ablation.SHORT.clips
    assert ablate(options(some, "seed=1"))["measured"] == ["full", "ladder_2", "no_sink"], "another seed"


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
        (["row=a", "variants=[c1,c2]"], "single variant"),
        (["checkpoint="], "needs checkpoint=FILE"),
    ],
)
def test_what_cannot_be_measured_is_said(options, more, said):
    with pytest.raises(UserError, match=said):
        ablate(options(*more))


def test_the_table_has_the_variants_in_order_and_then_other_rows(tmp_path):
    common = {"checkpoint": "abc", "seed": 0, "precision": "fp32", "machine": "a computer"}
    rows = [
        {"row": "window_1", "variant": "window_1", "figures": {"drift_1min": 1.234, "fps_p50": 39.0}},
        {"row": "made_otherwise", "variant": "full", "figures": {}},
        {"row": "full", "variant": "full", "figures": {"drift_1min": 1.0, "drift_1min_true": 1.5}},
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
    with pytest.raises(ValueError, match="each once"):
        table.write_table(tmp_path, document)


def test_the_page_has_the_table_of_the_committed_rows(tmp_path):
    copy = shutil.copy(ROOT / "docs" / "rolling-forcing.md", tmp_path)
    table.write_table(ROOT / "docs" / "ablation", Path(copy))
    committed = (ROOT / "docs" / "rolling-forcing.md").read_text("utf-8")
    assert Path(copy).read_text("utf-8") == committed, "run python -m engine.evaluation.table"
