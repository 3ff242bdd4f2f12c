"""UserError: bad input, told in one sentence."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and what to do; programs print it and exit 2."""
