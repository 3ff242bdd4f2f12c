"""Speed: how long a step takes, as in play: one game, decoding included."""

from __future__ import annotations

import numpy as np

from ..config import PlayConfig
from ..data.policies import make_policy
from ..device import threads
from ..rollout.session import Session
from .section import Scope, Section


def speed(scope: Scope) -> Section:
    """Milliseconds of a step under the scripted policy: median and 99th percentile."""
    session = Session(scope.player)
    policy = make_policy("scripted", session.action_space, scope.seed)
    session.reset(scope.seed, *scope.start())
    count = min(scope.size.steps, session.step_ms.maxlen)
    with threads(PlayConfig.threads):
        for _ in range(count):
            session.step(policy({}, session.action_space))
    p50, p99 = np.percentile(session.step_ms, (50, 99))
    section = Section("Speed", {"step_ms_p50": p50, "step_ms_p99": p99, "fps_p50": 1000 / p50})
    section.figures["real_time"] = 1000 / p50 / session.fps
    section.round(2)
    section.say(
        f"A step, decoding included, takes {p50:.1f} ms at the median of {count} under the script and "
        f"{p99:.1f} ms at the 99th percentile: {1000 / p50:.0f} frames a second, "
        f"{section.figures['real_time']:.2f} times real time."
    )
    return section
