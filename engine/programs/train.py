"""Trains everything: python train.py stage=NAME [name=value ...]

stage=all makes a playable world from nothing: it collects, then trains every stage with its share of the
time, and goes on where it was stopped. Each stage is also a command of its own, reads what the one before it
wrote, takes max_minutes=M and goes on where it was stopped:
  collect      policies play the real game and record it
  autoencoder  learns to turn frames into latents and back
  state        learns where the player is and looks, from keys, and what is to be seen from there
  denoiser     learns the next frames from recorded ones
  distill      goes on with that on its own games, so that they stay sharp and on course
  decoder      learns to draw crisp pictures
  evaluate     measures a checkpoint against the real game (not part of stage=all)
Besides: pack makes the small file that ships (checkpoint=FILE out=FILE), precision compares arithmetic, and
ablate measures a checkpoint that plays without parts of the method (checkpoint=FILE out=DIR). What evaluate
measures: docs/evaluation.md; routes=FILE gives it other routes, quick=true takes some three minutes.

Often used options:
  world=NAME    doom_gathering doom_arena doom_defend doom_home (pip install '.[doom]'), or gym ('.[gym]')
                with world.id=CartPole-v1 or world.id=my_module:MyGame-v0, a module beside train.py or on
                PYTHONPATH
  preset=NAME   toy (a minute, shows only that all runs) · laptop (overnight on 2 cores) · gpu (one big GPU,
                meant for under 25 minutes)
  data=DIR      recordings; those of generated games are left out     out=DIR  checkpoints, figures, pictures
  frames=N      collect, all: how many frames policies play; 0 none      max_minutes=M  seed=N  threads=N
  device=NAME   auto · cpu · cuda · cuda:1 · mps (untested)
  again=true    train anew what was made from something else than what is there now
Ctrl-C, SIGTERM and a closed terminal save before they stop; while a file `pause` lies in out=DIR, training
waits.
All options with their defaults: engine/config.py, TrainConfig.
Several processes: torchrun --nproc-per-node N train.py ...
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from ..config import TrainConfig, UserError, load_config
from ..data.dataset import recorded_world
from ..device import is_lack_of_memory
from ..errors import refuse, run_program
from ..model.layers import choose_kernels
from ..stage_config import TRAINED
from ..train.parallel import open_ranks
from ..train.stop import Stop, Stopped

UNTOUCHED = "what is finished stays, and the same command continues"


def run(config: TrainConfig, stop: Stop) -> dict[str, Any]:
    """The stage that `config.stage` names → its figures."""
    given = [option for option in config.given if option.partition(".")[0] == "model"]
    if given and config.stage in ("pack", "evaluate", "ablate", "precision"):
        said = f"stage={config.stage} takes the networks as their checkpoint has them"
        raise UserError(f"{said}; leave out {', '.join(given)}.")
    if config.stage in ("all", *TRAINED):
        config.world = recorded_world(config.data, config.world, config.given)
        with open_ranks(config.device) as ranks:
            if config.stage == "all":
                from ..train.pipeline import train_all

                return train_all(config, ranks, stop)
            from ..train.loop import train_stage

            return train_stage(config, ranks, stop)
    if config.stage == "collect":
        from ..data.collection import collect as work
    elif config.stage == "evaluate":
        from ..evaluation import evaluate as work
    elif config.stage == "ablate":
        from ..evaluation import ablate as work
    elif config.stage == "pack":
        from ..model.packing import pack as work
    else:
        from ..evaluation.precision import precision as work
    return work(config)


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    return run_program("train.py", lambda: _train(arguments))


def _train(arguments: list[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    stop = Stop()
    try:
        with stop.listening():
            config = load_config("train", TrainConfig, arguments)
            if config.threads:
                torch.set_num_threads(config.threads)
            choose_kernels(config.kernels)
            figures = run(config, stop)
    except Stopped as stopped:
        return refuse("train.py", str(stopped) or f"stopped; {UNTOUCHED}.", stopped.code)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        said = "There is too little memory for this"
        how = "lower stages.NAME.batch and raise stages.NAME.accumulate, or choose smaller networks"
        raise UserError(f"{said}; {how}.") from None
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures))
    return 0


def program() -> int:
    """The command line's program → its exit code."""
    return main(sys.argv[1:])
