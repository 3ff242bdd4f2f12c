"""What programs print: in every encoding, even where it has no letter for it."""

from __future__ import annotations

import io
import sys


def escape_what_cannot_be_printed() -> None:
    """Output of this process never fails: a letter that its encoding lacks comes as an escape (\\u2192)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no console
            stream.reconfigure(errors="backslashreplace")
