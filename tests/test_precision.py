"""Lower precisions: the products in 8 bits, and the stage that compares pictures."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import train
from engine.config import TrainConfig, UserError, load_config
from engine.device import Float8Linear, cast_weights, pick_precision


def test_a_product_in_8_bits_is_near_the_true_one():
    """Rows of very different sizes, each with its own scale: as near as four bits of mantissa allow."""
    linear = nn.Linear(256, 96)
    x = torch.randn(2, 5, 256) * torch.logspace(-3, 3, 5)[:, None]
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 2, 96)[:, None]
        true, made = linear(x), Float8Linear(linear)(x)
    assert made.shape == true.shape and made.dtype == torch.bfloat16
    off = (made - true).norm(dim=-1) / true.norm(dim=-1)  # of each row
    assert 0.005 < off.mean() < 0.05 and off.max() < 0.1


def test_only_large_products_of_layers_are_in_8_bits():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(256, 128)
            self.part = nn.Module()
            self.part.layers = nn.ModuleList([nn.Linear(128, 256), nn.Linear(64, 64)])

    network = Network()
    cast_weights(network, "fp8")
    big, small = network.part.layers
    assert isinstance(big, Float8Linear) and big.weight.dtype == torch.float8_e4m3fn
    assert small.weight.dtype == network.first.weight.dtype == torch.bfloat16


def test_precisions_are_named():
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    assert pick_precision("fp8", torch.device("cpu")) == "fp8"
    with pytest.raises(UserError, match="precision must be one of auto, fp32, bf16, fp16, fp8, not 'int3'"):
        load_config("train", TrainConfig, ["precision=int3"])
    with pytest.raises(UserError, match="precision=fp8 is for play and evaluation"):
        load_config("train", TrainConfig, ["precision=fp8", "stage=denoiser"])
    assert load_config("train", TrainConfig, ["precision=fp8", "stage=evaluate"]).precision == "fp8"


def test_the_stage_compares_pictures(tiny_checkpoint, capsys):
    code = train.main(["stage=precision", f"checkpoint={tiny_checkpoint}", "device=cpu", "steps=4"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert figures["fp32"]["psnr_16"] == 99 and figures["fp32"]["step_ms_p50"] > 0
    for name in ("bf16", "fp16", "fp8"):
        assert 30 < figures[name]["psnr_1"] < 99, name
