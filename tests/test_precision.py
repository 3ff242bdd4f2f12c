"""Precisions have names, and a stage that compares their pictures."""

from __future__ import annotations

import json

import pytest
import torch

from engine.config import TrainConfig, UserError, load_config
from engine.device import pick_precision
from engine.programs import train


def test_precisions_are_named():
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    assert pick_precision("fp8", torch.device("cpu")) == "fp8"
    with pytest.raises(UserError, match="precision must be one of auto, fp32, bf16, fp16, fp8, not 'int3'"):
        load_config("train", TrainConfig, ["precision=int3"])
    with pytest.raises(UserError, match="precision=fp8 is for play and evaluation"):
        load_config("train", TrainConfig, ["precision=fp8", "stage=denoiser"])
    assert load_config("train", TrainConfig, ["precision=fp8", "stage=evaluate"]).precision == "fp8"


@pytest.mark.slow
def test_the_stage_compares_pictures(tiny_checkpoint, capsys):
    code = train.main(["stage=precision", f"checkpoint={tiny_checkpoint}", "device=cpu", "steps=4"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert figures["fp32"]["psnr_16"] == 99 and figures["fp32"]["step_ms_p50"] > 0
    for name in ("bf16", "fp16", "fp8"):
        assert 30 < figures[name]["psnr_1"] < 99, name
