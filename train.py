"""Trains everything: python train.py stage=NAME [name=value ...]; python train.py --help says more."""

import sys

from engine.programs.train import program

if __name__ == "__main__":
    sys.exit(program())
