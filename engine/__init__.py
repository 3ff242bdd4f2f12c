"""Rollplay's library: an interactive neural game engine."""

__version__ = "0.1.0"
