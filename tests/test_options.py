"""Options of the command line: text is taken as it stands, the rest has a grammar."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from engine.config import PlayConfig, TrainConfig, UserError, load_config
from engine.options import split_texts
from engine.shipped import shipped

CONFIGS = shipped("configs")
WORDS = ["2026_10_03", "1e5", "0x1f", "007", "1:30", "true", "null", "~", "", "???", "lr=0.1/day", "a=b=c"]
WORDS += [
    "größe 🙂",
    "a#b",
    "a (1), b",
    "[a, b]",
    "{a: b}",
    "it's",
    '"quoted"',
    "'quoted'",
    "back\\slash\\",
]
WORDS += ["${oc.env:HOME}", "\\${a}", " spaces ", "*?$%@|&;", "a\nb", "\udcff", "-", "C:\\games\\'1'"]


def test_text_is_what_stands_behind_the_first_equals_sign() -> None:
    for text in WORDS:
        words = [f"record={text}", f"world.id={text}", "frames=7", f"start={text}"]
        texts = {name: text for name in ("record", "world.id", "start")}
        assert split_texts(PlayConfig, words, CONFIGS) == (texts, ["frames=7"])


def test_texts_arrive_in_the_config() -> None:
    """Beside numbers, lists and files of values, over which the command line is laid."""
    words = [*("out=a", "world.name=a#(b", "model.denoiser.ladder=[0.4,0.7,1.0]", "preset=toy")]
    words += ["world=doom_arena", "data=\\${x} ???", "world.keys.forward=[#,1]", "+world.keys.jump=Left Ctrl"]
    config = load_config("train", TrainConfig, [*words, "starts=[a:1,2026_10_03:2]", "out=1e5"])
    assert (config.out, config.data, config.starts) == ("1e5", "\\${x} ???", ["a:1", "2026_10_03:2"])
    assert (config.preset, config.frames, config.model.denoiser.ladder) == ("toy", 400, [0.4, 0.7, 1.0])
    assert (config.world.name, config.world.scenario) == ("a#(b", "deathmatch")
    keys = config.world.keys
    assert (keys["forward"], keys["jump"], keys["backward"]) == (["#", "1"], ["Left Ctrl"], ["S", "Down"])
    assert config.given[:4] == ["out", "world.name", "model.denoiser.ladder", "preset"]


@pytest.mark.parametrize(
    "given, meant",
    [
        ("[a:1,b:2]", ["a:1", "b:2"]),
        ("[ größe 1:3 , a#(b:4]", ["größe 1:3", "a#(b:4"]),
        ("""["a, b:1",'c,d:2',it's:3]""", ["a, b:1", "c,d:2", "it's:3"]),
        ("[2026_10_03,1e5,null,${a}]", ["2026_10_03", "1e5", "null", "${a}"]),
        ("[[x]:1,{y}:2]", ["[x]:1", "{y}:2"]),
        ("a, b:3", ["a, b:3"]),
        ("[]", []),
        ("", []),
    ],
)
def test_lists_of_text(given: str, meant: list[str]) -> None:
    assert split_texts(TrainConfig, [f"starts={given}"], CONFIGS) == ({"starts": meant}, [])


@pytest.mark.parametrize(
    "word, said",
    [
        ("frames=many", "frames=many"),
        *((f"frames={text}", "frames must be a whole number") for text in ("", "1,2", "3 # x", "1e3")),
        pytest.param("seed=" + 5000 * "9", "seed must be a whole number", id="more digits than Python reads"),
        ("++max_minutes=17,5", "max_minutes must be a number"),
        ("quick=maybe", "quick must be true or false"),
        ("model.denoiser.ladder=[a]", "ladder"),
        ("ot=x", "ot=x"),
        ("world.ketys=x", "world.ketys"),
        ("out", "out"),
        ("+new=x", "new"),
        ("out.more=x", "out.more"),
        ("preset=none (1)", "choose one of gpu, laptop, toy"),
        ("world.keys.fly=[F]", "+world.keys.fly"),
    ],
)
def test_what_is_no_option(word: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("train", TrainConfig, [word])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_text_that_may_be_none() -> None:
    @dataclass
    class Maybe:
        name: str | None = None
        size: int = 0

    assert split_texts(Maybe, ["name=null", "size=3"], CONFIGS) == ({"name": None}, ["size=3"])
    assert split_texts(Maybe, ["name=1e5"], CONFIGS) == ({"name": "1e5"}, [])
