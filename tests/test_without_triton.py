"""Where Triton is not installed (macOS, Windows): everything is imported, trains and plays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = {f"engine.kernels.{name}" for name in ("attention", "norm", "rope", "rope_triton")}
CODE = """
import importlib, sys
sys.modules["triton"] = None  # to all who look for it, it is not there
for name in {modules}:
    importlib.import_module(name)

from pathlib import Path
from engine.config import TrainConfig
from engine.model.checkpoint import Checkpoint
from engine.programs import play
from engine.stage_config import DenoiserStageConfig
from engine.train.loop import Training

path = Path({checkpoint!r})
made = Checkpoint(path)
config = TrainConfig("denoiser", world=made.world, model=made.model, data={out!r}, device="cpu")
config.out, config.weights, config.precision = {out!r}, str(path), "fp32"
config.stages.denoiser = DenoiserStageConfig(batch=2, clip=8)
training = Training(config)
before = [p.detach().clone() for p in training.module.parameters() if p.requires_grad]
assert training.iterate(0.0)["finite"]
after = [p for p in training.module.parameters() if p.requires_grad]
assert any((one != other).any() for one, other in zip(before, after, strict=True))
options = ["display=headless", "device=cpu", "precision=fp32", "frames=3", "policy=random"]
sys.exit(play.main([*options, "checkpoint=" + str(path)]))
"""


def modules() -> list[str]:
    """All of them, but for the kernels in Triton."""
    files = sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    parts = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in parts]
    names = [f"engine.{name}" if name.startswith("kernels") else name for name in names]
    return [name for name in names if name not in KERNELS and not name.endswith("__main__")]


def test_it_trains_and_plays(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint.parent / "walk", tmp_path / "walk")
    code = CODE.format(modules=modules(), checkpoint=str(tiny_checkpoint), out=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, **pipes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == 3
