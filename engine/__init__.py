"""Rollplay's library: an interactive neural game engine."""

from pathlib import Path

__version__ = "0.1.0"

# A clone keeps kernels/ beside engine/; setup.cfg installs it as engine.kernels. Looking there too makes
# `engine.kernels` this clone's own, whether nothing, this clone or another one is installed.
if (_clone := Path(__file__).resolve().parent.parent).joinpath("setup.cfg").is_file():
    __path__.append(str(_clone))
