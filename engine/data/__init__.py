"""Recordings, and what training reads of them."""
