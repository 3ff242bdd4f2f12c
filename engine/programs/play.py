"""Plays a world: python play.py [name=value ...]

Without options a window opens and you walk through the world that the network in assets/ draws; F1 shows the
keys. Where there is no display, a recorded walk is played into a video, rollplay.mp4. Often used options:
  checkpoint=FILE   which network; out=DIR of training has it as decoder.safetensors
  game=true         the real game instead, with the same keys: world=NAME, or world=gym world.id=ID
  start=WHERE       where a generated game starts: the name of a start inside the checkpoint (1, 2, ...), a
                    recording DIR or DIR:FRAME, any picture
  record=DIR        records frames and keys: of the real game to train on, of a generated one to replay
  video=FILE.mp4    films what is seen (FILE.webp: a moving picture)
  policy=NAME       who plays: keyboard, a recording DIR to replay, or explore (walks by the map) scripted
                    (like a person) random taps idle spin walls (runs into them)
  display=headless  no window, as fast as it can      frames=N   stop after so many      seed=N      threads=N
All options with their defaults: engine/config.py, PlayConfig. The last line of output is JSON with figures.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..config import PlayConfig, UserError, load_config
from ..errors import refuse, run_program
from ..play.timings import seconds_since_start
from ..shipped import shipped
from ..worlds.base import ActionSpace

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
HEADLESS_FRAMES = 300
HEADLESS_VIDEO = "rollplay{}.mp4"
WALK = "assets/walk"  # a recording in the shipped world
NAMED = 20  # actions without a key, in words


def choose_display(config: PlayConfig) -> PlayConfig:
    """Decides on window or headless and fills in what a game without a player needs.

    Raises UserError where a window is insisted on and there is no display.
    """
    if config.display != "headless":
        from ..play.ui.screen import display_trouble, seen_by_somebody

        trouble = display_trouble()
        if config.display == "window" and trouble:
            said = f"No window can be opened here ({trouble})"
            raise UserError(f"{said}; start play.py on a desktop, or with display=headless video=FILE.mp4.")
        if not trouble and (config.display == "window" or seen_by_somebody()):
            return replace(config, display="window")
        why = trouble or "SDL draws into nothing"
        print(f"There is no display here ({why}), so a recorded walk or a policy plays into a video.")
        print("For a window start play.py on a desktop, or through one that is forwarded (ssh -X).")
        config = replace(config, video=config.video or free_name(HEADLESS_VIDEO), policy=showing(config))
    policy = "explore" if config.policy == "keyboard" else config.policy
    return replace(config, display="headless", policy=policy)


def showing(config: PlayConfig) -> str:
    """Who plays where nobody can: of the shipped world the recorded walk that came with it."""
    walk, given = shipped(WALK), (config.start, config.seed)
    untouched = config.checkpoint == PlayConfig.checkpoint and config.game == "dream" and not any(given)
    return str(walk) if config.policy == "keyboard" and untouched and walk.is_dir() else config.policy


def free_name(pattern: str) -> str:
    """The first of "", -2, -3, … in place of {} that makes the name of no file here."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(name for name in map(pattern.format, numbers) if not os.path.lexists(name))


def open_playthrough(config: PlayConfig, check: Callable[[ActionSpace], None] | None = None) -> Any:
    """The game with its policy, recording and film; what is quick to check comes before torch, and all that
    may be refused, such as keys by `check`, before anything is written.
    """
    from ..play.game import open_game
    from ..play.playthrough import Playthrough, check_policy

    replay = check_policy(config.policy)
    if replay:
        config = replace(config, precision=replay.precision(config.precision))
    game = open_game(config)
    tell_keyless(game.action_space)
    try:
        if check:
            check(game.action_space)
        return Playthrough(config, game, replay)
    except BaseException:
        game.close()
        raise


def tell_keyless(space: Any) -> None:
    """Says which actions only policies and recordings can use; F1 shows them in a window."""
    left = [name for name, codes in zip(space.names, space.bindings, strict=True) if not codes]
    if left:
        names = ", ".join(left[:NAMED]) + (", ..." if len(left) > NAMED else "")
        said = f"{len(left)} of {len(space)} actions have no key ({names})"
        print(f"play.py: {said}; '+world.keys.{left[0]}=[Left]' gives one its key.", file=sys.stderr)


def play_headless(config: PlayConfig) -> dict[str, Any]:
    """As fast as it can, without a window → figures."""
    from tqdm import tqdm

    playthrough = open_playthrough(config)
    first_frame_s = seconds_since_start()
    wanted = config.frames or (playthrough.replay.left if playthrough.replay else HEADLESS_FRAMES)
    try:
        with tqdm(total=wanted, unit="frame", desc="play", mininterval=0.5) as bar:
            while playthrough.timings.steps < wanted and not (playthrough.over or playthrough.trouble):
                playthrough.advance()
                bar.update(playthrough.timings.steps - bar.n)
    finally:
        playthrough.close()
    return {**playthrough.figures(), "first_frame_s": round(first_frame_s, 2)}


def play_window(config: PlayConfig) -> dict[str, Any]:
    """In a window, at the world's rate → figures."""
    from ..play.ui.keys import check_bindings
    from ..play.ui.loop import Loop

    loop = Loop(config, lambda: open_playthrough(config, check_bindings))
    figures = loop.run().figures()
    schedule = loop.stepper.schedule
    figures |= {"first_frame_s": round(loop.first_frame_s, 2)}
    return figures | {"late": schedule.late, "dropped": schedule.dropped} | loop.latency.figures()


def main(arguments: list[str]) -> int:
    """The program → its exit code."""
    # libgomp's threads wait for one another many times a step. Sleeping each time (PASSIVE) makes a step of
    # two threads slower than one thread's; spinning for milliseconds, as by default, takes the cores from
    # window and recorder. So they spin for some tenths of a millisecond (docs/log.md). Read when torch is
    # loaded, which happens after the window is open.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # no greeting on stdout
    return run_program("play.py", lambda: _play(arguments))


def _play(arguments: list[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        config = choose_display(load_config("play", PlayConfig, arguments))
        figures = play_window(config) if config.display == "window" else play_headless(config)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        return refuse("play.py", "stopped; what was recorded is complete.", 128 + number)
    for what, path in (("recording", config.record), ("video", config.video)):
        if path:
            print(f"The {what} is in {os.path.abspath(path)}")
            figures[what] = path
    print(json.dumps(figures))
    return 0


def _end(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def program() -> int:
    """The command line's program → its exit code."""
    for number in ENDING:  # a logout and a terminal that goes close files, as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)
    return main(sys.argv[1:])
