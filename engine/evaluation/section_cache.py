"""SectionCache: finished parts of an evaluation on disk, so that a stopped one can be continued."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ..data.cache import content_of
from ..files import write_whole
from .section import Scope, Section

VERSION = 3  # raise it when a part measures something else


class SectionCache:
    """The finished parts of one evaluation (`key`), each in a file of the folder; parts of others are
    ignored.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key

    def find(self, name: str) -> tuple[Section, float] | None:
        """A finished part and the seconds it took; None if it is not finished."""
        try:
            kept = json.loads(self._file(name).read_text("utf-8"))
            if kept["key"] != self.key:
                return None
            return Section(kept["title"], kept["figures"], kept["lines"]), kept["seconds"]
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: it is measured again
            return None

    def keep(self, name: str, section: Section, seconds: float) -> None:
        """Saves a part; its pictures are in the report's folder."""
        self.folder.mkdir(exist_ok=True)
        kept = {"key": self.key, **asdict(section), "seconds": seconds}
        write_whole(self._file(name), json.dumps(kept, indent=1) + "\n")

    def drop(self, name: str) -> None:
        """Removes a part: before its pictures are replaced, and when the report is written."""
        self._file(name).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def key_of(scope: Scope) -> str:
    """A digest of everything on which the figures depend."""
    player, truth = scope.player, scope.truth is not None
    held = [content_of(r.directory) for r in scope.clips.recordings] if scope.clips else []
    arithmetic = [player.precision, player.device.type, player.states is not None]
    routes = [[r.kind, r.seed, r.warmup.tolist(), r.actions.tolist()] for r in scope.routes]
    about = [VERSION, player.checkpoint.digest(), scope.seed, asdict(scope.size), scope.most, truth]
    return hashlib.sha256(json.dumps([*about, *arithmetic, held, routes]).encode()).hexdigest()[:16]
