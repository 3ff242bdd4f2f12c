"""Checkpoints come back as they were, others are refused in a sentence, a failed write costs nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import engine.model.checkpoint
from engine.config import AutoencoderConfig, DenoiserConfig, ModelConfig, UserError, WorldConfig
from engine.model.autoencoder import Autoencoder
from engine.model.checkpoint import Checkpoint, apply_overrides, read_about, save_checkpoint, weights_digest
from engine.model.networks import load_denoiser, make_denoiser

MODEL = ModelConfig(
    AutoencoderConfig(channels=4, widths=[8, 8, 8, 8], depth=1),
    DenoiserConfig(
        64, 2, 32, patch=2, conv_width=8, conv_in_layers=1, conv_out_layers=1, action_history=3, sink_frames=2
    ),
)  # fmt: skip
WORLD = WorldConfig(
    "test", height=64, width=96, tics=3, fps=11.5, keys={"left": ["A"], "right": ["D", "Right"]}
)


def networks(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    modules = {
        "autoencoder": Autoencoder(MODEL.autoencoder),
        "denoiser": make_denoiser(MODEL, WORLD),
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
    for name, module in loaded.items():
        checkpoint.load_into(name, module)
        expected = made[name].state_dict()
        for key, value in module.state_dict().items():
            assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), (name, key)


def test_tensors_besides_the_networks_travel_along(tmp_path):
    extras = {
        "starts.a.frames": torch.randint(256, (3, 64, 96, 3), dtype=torch.uint8),
        "starts.a.actions": torch.rand(3, 2),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, networks(), MODEL, WORLD, extras, card={"title": "A hall", "games": 24})
    checkpoint = Checkpoint(path)
    assert checkpoint.about["card"] == {"title": "A hall", "games": 24}
    assert checkpoint.extras.keys() == extras.keys() and checkpoint.modules == ["autoencoder", "denoiser"]
    for name, value in extras.items():
        found = checkpoint.extras[name]
        assert found.dtype == value.dtype and torch.equal(found, value)
    assert not Checkpoint(save(tmp_path / "plain.safetensors")).extras


def test_two_names_of_one_tensor_can_be_saved(tmp_path):
    modules = networks()
    layers = modules["denoiser"].transformer.layers
    layers[1].mlp_in.weight = layers[0].mlp_in.weight
    again = networks(1)["denoiser"]
    Checkpoint(save(tmp_path / "model.safetensors", modules)).load_into("denoiser", again)
    assert torch.equal(*(layer.mlp_in.weight for layer in again.transformer.layers))


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


def test_digests_tell_weights_apart(tmp_path):
    first, again, other = networks(0), networks(0), networks(1)
    assert weights_digest(first["autoencoder"]) == weights_digest(again["autoencoder"])
    assert weights_digest(first["autoencoder"]) != weights_digest(other["autoencoder"])
    files = [save(tmp_path / f"{i}.safetensors", modules) for i, modules in enumerate((first, again, other))]
    first["autoencoder"].decoder[0].weight.data += 1
    parts = [weights_digest(x["autoencoder"], without=("decoder",)) for x in (first, again, other)]
    assert parts[0] == parts[1] != parts[2], "of the encoder alone"
    digests = [Checkpoint(file).digest() for file in files]
    assert digests[0] == digests[1] != digests[2]


def test_the_header_can_be_read_alone(tmp_path):
    path = save(tmp_path / "model.safetensors", origin={"made_from": {"motion": "abc"}})
    assert read_about(path) == Checkpoint(path).about and read_about(path)["format"] == 2
    assert "no checkpoint" in refusal(read_about, tmp_path / "none.safetensors")
    path.write_bytes(b"no checkpoint at all")
    assert "not a readable checkpoint" in refusal(read_about, path)


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
        "older format": lambda head: head.update(format=1),
        "no format": lambda head: head.pop("format"),
        "no world": lambda head: head.pop("world"),
        "no list of modules": lambda head: head.pop("modules"),
        "unknown option": lambda head: head["model"]["denoiser"].update(colour=1),
        "wrong type": lambda head: head["model"].update(denoiser=5),
        "impossible value": lambda head: head["model"]["denoiser"].update(head_dim=48),
        "a size beyond all memory": lambda head: head["model"]["denoiser"].update(context_frames=10**9),
        "a size that is no number": lambda head: head["model"]["denoiser"].update(width=float("nan")),
        "a size that is text": lambda head: head["model"]["denoiser"].update(width="64"),
        "a size that is a fraction": lambda head: head["model"]["denoiser"].update(layers=2.5),
        "widths that are one": lambda head: head["model"]["autoencoder"].update(widths=8),
        "no widths": lambda head: head["model"]["autoencoder"].update(widths=[]),
        "a level that is no number": lambda head: head["model"]["denoiser"].update(ladder=[0.5, None, 1]),
        "levels of another window": lambda head: head["model"]["denoiser"].update(ladder=[0.5, 1]),
        "a level of nan": lambda head: head["model"]["denoiser"].update(ladder=[0.5, float("nan"), 1]),
        "a world of another kind": lambda head: head.update(world=[1]),
        "a world without a rate": lambda head: head["world"].update(fps=0),
        "a picture beyond all memory": lambda head: head["world"].update(height=2**20, width=2**20),
        "keys that are none": lambda head: head["world"].update(keys=5),
        "keys without a list": lambda head: head["world"].update(keys={"left": "A"}),
        "a state without kinds": lambda head: head["model"]["state"].update(names=["x"]),
        "a state of an unknown kind": lambda head: head["model"]["state"].update(names=["x"], kinds=["y"]),
        "more parts": lambda head: head["model"].update(colour={}),
        "modules that are numbers": lambda head: head.update(modules=[1]),
        "a format that is text": lambda head: head.update(format="2"),
        "an origin that is text": lambda head: head.update(origin="x"),
        "made from a list": lambda head: head.update(origin={"made_from": []}),
        "scores that are none": lambda head: head.update(scores=5),
        "deeply nested": lambda head: "[" * 100_000,
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
        assert "do not fit" in refusal(
            checkpoint.load_into, "denoiser", make_denoiser(replace(MODEL, denoiser=config), WORLD)
        )
    assert "do not fit" in refusal(checkpoint.load_into, "autoencoder", networks()["denoiser"])


def made_of(head: dict) -> tuple:
    """What a header makes of the two networks, by their names."""
    sizes = ModelConfig(AutoencoderConfig(**head["autoencoder"]), DenoiserConfig(**head["denoiser"]))
    return {
        "autoencoder": lambda: Autoencoder(sizes.autoencoder),
        "denoiser": lambda: make_denoiser(sizes, WORLD),
    }


@pytest.mark.parametrize("name", ["autoencoder", "denoiser"])
def test_networks_are_built_from_the_file(tmp_path, name):
    made = networks()
    built = Checkpoint(save(tmp_path / "model.safetensors", made)).build(name, made_of(asdict(MODEL))[name])
    for key, value in built.state_dict().items():
        assert torch.equal(value, made[name].state_dict()[key]), key


@pytest.mark.parametrize(
    "part, sizes",
    [
        ("denoiser", {"width": 4096, "layers": 4096}),
        ("denoiser", {"layers": 4096}),
        ("denoiser", {"layers": 1}),
        ("denoiser", {"conv_width": 4096}),
        ("autoencoder", {"widths": [4096, 4096, 4096, 4096]}),
        ("autoencoder", {"depth": 4096}),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(tmp_path, part, sizes):
    """A network of 4,096 layers of that width would take three petabytes; 1 GB more is refused here."""
    path = rewrite(save(tmp_path / "m.safetensors"), lambda head: head["model"][part].update(sizes))
    checkpoint = Checkpoint(path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        said = refusal(checkpoint.build, part, made_of(checkpoint.about["model"])[part])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "do not fit" in said


def test_headers_alone_are_checked_too(tmp_path):
    path = save(tmp_path / "model.safetensors")
    for change in (
        lambda head: "[1]",
        lambda head: head.update(format=99),
        lambda head: head.update(origin=5),
    ):
        refusal(read_about, rewrite(save(path), change))


def test_what_a_game_would_remember_is_bounded(tmp_path):
    """No weight tells how many frames are remembered, so the file's size says nothing of it."""

    def endless(head: dict) -> None:
        head["model"]["denoiser"].update(context_frames=4096, sink_frames=4096)
        head["world"].update(height=256, width=256)

    model, world = MODEL, replace(WORLD, height=256, width=256)
    modules = {"denoiser": make_denoiser(model, world)}
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, modules, model, world)
    assert load_denoiser(Checkpoint(path)).config.context_frames == 8
    assert "remember 8195 frames" in refusal(load_denoiser, Checkpoint(rewrite(path, endless)))
    # little to remember, but each of a start's tokens would be compared with each other
    small, wide = tmp_path / "small.safetensors", {"context_frames": 4096, "sink_frames": 1}
    save_checkpoint(small, {"denoiser": make_denoiser(MODEL, WORLD)}, MODEL, WORLD)
    many = rewrite(small, lambda head: head["model"]["denoiser"].update(wide))
    assert "remember 4100 frames" in refusal(load_denoiser, Checkpoint(many))


def test_scales_of_another_size_are_refused(tmp_path):
    """They would be multiplied to a tensor of any size before anybody compared it."""
    path = save(tmp_path / "model.safetensors")
    with safe_open(path, framework="pt") as file:
        head, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name = "denoiser.transformer.patch_in.weight"
    save_file(tensors | {name + "#scale": torch.ones(1000, 1, 1)}, path, metadata=head)
    assert "do not fit" in refusal(Checkpoint(path).load_into, "denoiser", networks()["denoiser"])


def test_what_was_trained_stays_but_for_what_is_given():
    made = DenoiserConfig(layers=6, ladder=[0.4, 0.7, 1.0], correction=0.6)
    wanted = DenoiserConfig(layers=2, ladder=[0.5, 0.8, 1.0], correction=0.9)
    free, section = ("ladder", "correction"), "model.denoiser"
    assert apply_overrides(made, wanted, [], section, free) == made, (
        "what the preset says of it is not the user's word"
    )
    assert apply_overrides(made, wanted, ["stage", "model.denoiser.ladder"], section, free) == replace(
        made, ladder=[0.5, 0.8, 1.0]
    )
    said = refusal(apply_overrides, made, wanted, ["model.denoiser.layers"], section, free)
    assert "model.denoiser.layers=2" in said and "6" in said
    assert apply_overrides(made, replace(wanted, layers=6), ["model.denoiser.layers"], section, free) == made


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

    monkeypatch.setattr(engine.model.checkpoint, "save_file", half)
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
