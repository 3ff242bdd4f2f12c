"""stage=pack: small, near to what was trained, nothing overwritten."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import train
from engine.config import ModelConfig, WorldConfig
from engine.model import packing
from engine.model.checkpoint import Checkpoint, save_checkpoint


class Net(nn.Module):
    """Of every kind of weight one that is large and one that is small."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(128, 96), nn.Linear(8, 8)
        self.conv, self.norm = nn.Conv2d(16, 24, 5), nn.BatchNorm2d(24)


def networks(seed: int) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"states": Net(), "other": Net()}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "starts_of", lambda config, source: {"starts.1.frame": torch.ones(2, 2)})
    modules = networks(0)
    with torch.no_grad():
        modules["other"].large.weight[5] = 0
        modules["other"].conv.weight[3] *= 1000  # a channel of its own scale
    extras = {"frames": torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8), "state": torch.rand(5, 3)}
    world = WorldConfig("hall", keys={"go": ["W"]})
    path = tmp_path / "trained.safetensors"
    save_checkpoint(path, modules, ModelConfig(), world, extras, minutes=3)
    return modules, extras, path


def run(capsys, *options: str) -> tuple[int, str, str]:
    code = train.main(["stage=pack", *options])
    return code, *capsys.readouterr()


def test_it_is_small_and_near_to_what_was_trained(trained, tmp_path, capsys):
    modules, extras, path = trained
    code, out, _ = run(capsys, f"checkpoint={path}", f"out={tmp_path}/ship")
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    packed = Checkpoint(tmp_path / "ship" / "hall.safetensors")
    assert told["checkpoint"] == str(packed.path)
    assert told["megabytes"] == pytest.approx(packed.path.stat().st_size / 1e6, abs=1e-3)
    assert packed.about["card"]["world"] == "hall" and packed.about["minutes"] == 3
    assert packed.about["packed_from"] == Checkpoint(path).digest()
    worst = 0.0
    for name, module in networks(1).items():
        packed.load_into(name, module)
        for key, value in module.state_dict().items():
            true = modules[name].state_dict()[key]
            assert value.dtype == true.dtype
            if value.ndim < 2:
                assert torch.equal(value, true), (name, key)
                continue
            error = float((value - true).norm() / true.norm())
            worst = max(worst, error)
            assert 0 < error < (5e-4 if name == "states" or "small" in key else 0.01), (name, key, error)
        if name == "other":
            weight = module.conv.weight.flatten(1)
            true = modules[name].conv.weight.flatten(1)
            assert ((weight - true).norm(dim=1) < 0.01 * true.norm(dim=1)).all(), "each channel for itself"
            assert not module.large.weight[5].any() and module.large.weight[4].any()
    assert told["error"] == pytest.approx(worst, abs=1e-5) and told["matrix"].startswith("other.")
    for name, value in (extras | {"starts.1.frame": torch.ones(2, 2)}).items():
        assert torch.equal(packed.extras[name], value) and packed.extras[name].dtype == value.dtype
    sizes = [sum(p.numel() for p in module.parameters()) for module in modules.values()]
    assert packed.path.stat().st_size < 2.1 * sizes[0] + 1.2 * sizes[1] + 6000


def test_nothing_is_overwritten_unless_told(trained, tmp_path, capsys):
    _, _, path = trained
    target = tmp_path / "ship.safetensors"
    target.write_bytes(b"somebody's")
    code, out, err = run(capsys, f"checkpoint={path}", f"out={target}")
    assert code == 2 and not out and "again=true" in err and target.read_bytes() == b"somebody's"
    assert run(capsys, f"checkpoint={path}", f"out={target}", "again=true")[0] == 0
    before = path.read_bytes()
    code, _, err = run(capsys, f"checkpoint={path}", f"out={path}", "again=true")
    assert code == 2 and path.read_bytes() == before
    code, _, err = run(capsys, f"checkpoint={target}", f"out={tmp_path}/twice.safetensors")
    assert code == 2 and "packed already" in err and not (tmp_path / "twice.safetensors").exists()


def test_it_needs_a_checkpoint(tmp_path, capsys):
    code, _, err = run(capsys, f"out={tmp_path}")
    assert code == 2 and "checkpoint=FILE" in err
    code, _, err = run(capsys, f"checkpoint={tmp_path}/none.safetensors", f"out={tmp_path}")
    assert code == 2 and "no checkpoint" in err
