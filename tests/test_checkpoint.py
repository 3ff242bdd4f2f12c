"""Checkpoints come back as they were, others are refused in a sentence, a failed write costs nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import engine.checkpoint
from engine.autoencoder import Autoencoder
from engine.checkpoint import Checkpoint, save_checkpoint, weights_digest
from engine.config import AutoencoderConfig, DenoiserConfig, ModelConfig, UserError, WorldConfig
from engine.denoiser import Denoiser

MODEL = ModelConfig(
    AutoencoderConfig(channels=4, widths=[8, 8, 8, 8], depth=1),
    DenoiserConfig(
        64,
        2,
        32,
        patch=2,
        fine=8,
        stem=1,
        head=1,
        motion=8,
        motion_layers=1,
        window=3,
        recent=3,
        ladder=[0.5, 0.8, 1.0],
        sink=2,
    ),
)
WORLD = WorldConfig(
    "test", height=64, width=96, tics=3, fps=11.5, keys={"left": ["A"], "right": ["D", "Right"]}
)


def networks(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    modules = {
        "autoencoder": Autoencoder(MODEL.autoencoder),
        "denoiser": Denoiser(MODEL.denoiser, 2, 4, 4, 6),
    }
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        modules["autoencoder"].encode(torch.randint(256, (4, 3, 64, 96), dtype=torch.uint8))  # its statistics
    return {name: module.eval() for name, module in modules.items()}


def save(path: Path, modules: dict[str, nn.Module] | None = None, **about) -> Path:
    save_checkpoint(path, modules or networks(), MODEL, WORLD, **about)
    return path


def rewrite(path: Path, change) -> Path:
    """The file again with its header changed by `change(head)`, or replaced by what that returns."""
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["rollplay"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    changed = change(head)
    text = changed if isinstance(changed, str) else json.dumps(head)
    save_file(tensors, path, metadata={"rollplay": text})
    return path


def refusal(action, *args) -> str:
    """The one sentence with which `action` is refused."""
    with pytest.raises(UserError) as caught:
        action(*args)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 400, said
    return said


def test_round_trip(tmp_path):
    about = {"seed": 3, "scores": {"psnr": 21.5}, "licence": "whose"}
    made, loaded = networks(0), networks(1)
    checkpoint = Checkpoint(save(tmp_path / "new" / "model.safetensors", made, **about))
    assert checkpoint.model == MODEL and checkpoint.world == WORLD
    assert {key: checkpoint.about[key] for key in about} == about
    packed = 0
    for name, module in loaded.items():
        checkpoint.load_into(name, module)
        expected = made[name].state_dict()
        for key, value in module.state_dict().items():
            true = expected[key]
            error = (value.double() - true.double()).norm() / true.double().norm().clamp_min(1e-9)
            rows = name == "denoiser" and value.ndim == 2 and value.numel() > 4096
            packed += rows
            assert value.dtype == true.dtype and error < (0.01 if rows else 5e-4), (name, key, float(error))
    assert packed >= 8, "the large matrices are stored as 8-bit rows"
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in made.items()}
    assert checkpoint.path.stat().st_size < 1.3 * sizes["denoiser"] + 2.2 * sizes["autoencoder"] + 2e4


@torch.no_grad()
def test_loaded_networks_do_the_same(tmp_path):
    made, loaded = networks(0), networks(1)
    checkpoint = Checkpoint(save(tmp_path / "model.safetensors", made))
    for name, module in loaded.items():
        checkpoint.load_into(name, module)
    frames = torch.randint(256, (3, 3, 64, 96), dtype=torch.uint8)
    latents, again = (modules["autoencoder"].encode(frames) for modules in (made, loaded))
    assert (latents - again).norm() < 0.01 * latents.norm()
    torch.manual_seed(4)
    one, other = (modules["denoiser"].transformer for modules in (made, loaded))
    tokens = torch.randn(3, 64)
    for a, b in zip(one.layers, other.layers, strict=True):
        expected = a.attention.qkv(tokens)
        assert (expected - b.attention.qkv(tokens)).norm() < 0.02 * expected.norm()


def test_a_row_of_zeros_survives(tmp_path):
    made, loaded = networks(0), networks(1)
    with torch.no_grad():
        made["denoiser"].transformer.layers[0].mlp_in.weight[5] = 0
    Checkpoint(save(tmp_path / "model.safetensors", made)).load_into("denoiser", loaded["denoiser"])
    weight = loaded["denoiser"].transformer.layers[0].mlp_in.weight
    assert not weight[5].any() and weight.isfinite().all() and weight[4].any()


def test_digests_tell_weights_apart(tmp_path):
    first, again, other = networks(0), networks(0), networks(1)
    assert weights_digest(first["autoencoder"]) == weights_digest(again["autoencoder"])
    assert weights_digest(first["autoencoder"]) != weights_digest(other["autoencoder"])
    files = [save(tmp_path / f"{i}.safetensors", modules) for i, modules in enumerate((first, again, other))]
    digests = [Checkpoint(file).digest() for file in files]
    assert digests[0] == digests[1] != digests[2]


def test_no_file(tmp_path):
    assert "no checkpoint" in refusal(Checkpoint, tmp_path / "none.safetensors")
    assert "no checkpoint" in refusal(Checkpoint, tmp_path), "a directory is none either"


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
def test_a_truncated_file(tmp_path, share):
    path = save(tmp_path / "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "not a readable checkpoint" in refusal(Checkpoint, path)


def test_other_kinds_of_files(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.ones(3)}, path)
    assert "not a readable checkpoint" in refusal(Checkpoint, path)
    path.write_bytes(pickle.dumps({"weight": [1, 2]}))
    assert "not a readable checkpoint" in refusal(Checkpoint, path)
    path.write_bytes(os.urandom(5000))
    assert "not a readable checkpoint" in refusal(Checkpoint, path)
    save_file({"weight": torch.ones(3)}, path)
    assert "another program" in refusal(Checkpoint, path)
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    assert "another program" in refusal(Checkpoint, path)


@pytest.mark.parametrize(
    "change",
    {
        "format": lambda head: head.update(format=99),
        "no format": lambda head: head.pop("format"),
        "no world": lambda head: head.pop("world"),
        "no list of modules": lambda head: head.pop("modules"),
        "unknown option": lambda head: head["model"]["denoiser"].update(colour=1),
        "wrong type": lambda head: head["model"].update(denoiser=5),
        "impossible value": lambda head: head["model"]["denoiser"].update(head_dim=48),
        "not an object": lambda head: "[1, 2]",
        "not JSON": lambda head: "{",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_config_that_is_not_understood(tmp_path, change):
    path = rewrite(save(tmp_path / "model.safetensors"), change[1])
    refusal(lambda: Checkpoint(path).load_into("denoiser", networks()["denoiser"]))


def test_weights_that_do_not_fit(tmp_path):
    checkpoint = Checkpoint(save(tmp_path / "model.safetensors"))
    wide = DenoiserConfig(**{**asdict(MODEL.denoiser), "width": 128})
    deep = DenoiserConfig(**{**asdict(MODEL.denoiser), "layers": 3})
    for config in (wide, deep):
        assert "do not fit" in refusal(checkpoint.load_into, "denoiser", Denoiser(config, 2, 4, 4, 6))
    assert "do not fit" in refusal(checkpoint.load_into, "autoencoder", networks()["denoiser"])


def test_a_stage_that_is_not_there(tmp_path):
    modules = networks()
    checkpoint = Checkpoint(save(tmp_path / "model.safetensors", {"autoencoder": modules["autoencoder"]}))
    assert "holds no denoiser" in refusal(checkpoint.load_into, "denoiser", modules["denoiser"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O")])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, error):
    path = save(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def half(tensors, file, metadata) -> None:
        Path(file).write_bytes(before[:1000])
        raise error

    monkeypatch.setattr(engine.checkpoint, "save_file", half)
    assert "could not be written" in refusal(save, path, networks(1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_nothing_half_written_has_the_files_name(tmp_path, monkeypatch):
    path, seen, whole = tmp_path / "model.safetensors", [], os.replace

    def watched(source, target) -> None:
        seen.append((Path(source).suffix, path.exists(), os.listdir(tmp_path)))
        Path(target).parent.joinpath("copy").write_bytes(Path(source).read_bytes())
        whole(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save(path)
    assert seen == [(".tmp", False, ["model.safetensors.tmp"])]
    assert (tmp_path / "copy").read_bytes() == path.read_bytes(), "it was whole before it got its name"
    assert sorted(os.listdir(tmp_path)) == ["copy", "model.safetensors"]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    refusal(save, tmp_path / "file" / "model.safetensors")
