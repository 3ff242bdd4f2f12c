"""Plays a world: python play.py [name=value ...]; python play.py --help says more."""

import sys

from engine.programs.play import program

if __name__ == "__main__":
    sys.exit(program())
