"""Which device and precision are taken; GPUs are make-believe here."""

from __future__ import annotations

import logging

import pytest
import torch

from engine.config import UserError
from engine.device import pick_device, pick_precision
from engine.programs import play, train
from engine.train.parallel import backend


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs and a Mac's → what became the thread's own, in turn, and what was tried out."""
    chosen, tried = [], []

    def choose(device: torch.device) -> None:
        if device.index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal")
        chosen.append(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(torch, "empty", lambda *size, device: tried.append(str(device)))
    return chosen, tried


@pytest.mark.parametrize(
    "name, local, device",
    [
        ("auto", None, "cuda:0"),
        ("cuda", None, "cuda:0"),
        ("cuda:1", None, "cuda:1"),
        ("auto", 1, "cuda:1"),
        ("cuda", 0, "cuda:0"),
    ],
)
def test_a_gpu_that_is_taken_is_taken_everywhere(name, local, device, gpus):
    chosen, tried = gpus
    assert str(pick_device(name, local)) == device
    assert chosen == tried == [device], "and no other one is touched"


@pytest.mark.parametrize("name, local", [("cuda:2", None), ("cuda", 2), ("auto", 3)])
def test_a_gpu_that_is_not_there_is_refused(name, local, gpus):
    with pytest.raises(UserError, match="cannot be used here"):
        pick_device(name, local)
    assert gpus == ([], [])


def test_processes_do_not_share_one_gpu(gpus):
    with pytest.raises(UserError, match="give device=cuda instead of cuda:1"):
        pick_device("cuda:1", 0)
    assert gpus == ([], [])


def test_mps_is_taken_where_it_is_and_said_to_be_untested(gpus, caplog):
    with caplog.at_level(logging.WARNING):
        device = pick_device("mps")
    assert device.type == "mps" and "untested" in caplog.text and gpus == ([], ["mps"])
    assert pick_precision("auto", device) == "fp32", "nothing is measured there"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
@pytest.mark.parametrize("program", [play, train])
@pytest.mark.parametrize("name", ["mps", "meta", "abacus", "cuda:99"])
def test_a_device_that_is_not_to_be_had_is_refused_in_words(name, program, tiny_checkpoint, tmp_path, capsys):
    if program is play:
        options = [f"checkpoint={tiny_checkpoint}", "display=headless", "frames=1"]
    else:
        options = ["stage=precision", f"checkpoint={tiny_checkpoint}", "steps=1"]
    assert program.main([*options, f"device={name}"]) == 2
    err = capsys.readouterr().err
    assert f"The device {name!r} cannot be used here; try device=cpu." in err
    assert len(err.strip().splitlines()) == 1


def test_what_exchanges_gradients():
    """NCCL between GPUs alone: also for processes that train on CPUs of a machine with GPUs."""
    names = "auto", "cuda", "cpu", "cpu:0", "mps"
    assert [backend(name, True) for name in names] == ["nccl", "nccl", "gloo", "gloo", "gloo"]
    assert {backend(name, False) for name in names} == {"gloo"}
