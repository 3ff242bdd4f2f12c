"""House rules that a machine can check: import arrows, who imports what, the README's tree, sizes, paths."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each package and those that it may import.
ARROWS = {
    "config": "",
    "kernels": "",
    "worlds": "config",
    "data": "worlds config",
    "model": "data worlds kernels config",
    "rollout": "model data worlds config",
    "train": "rollout model data worlds config",
    "evaluation": "train rollout model data worlds config",
    "play": "rollout model data worlds config",
    "benchmark": "rollout model kernels config",
    "programs": "play train evaluation rollout model data worlds config",
}
# The files in engine/ itself; they count as config.
FLAT = "__init__ bounds config console device errors files options shipped stage_config".split()

FOLDERS = ("engine", "kernels")
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
)
PROGRAMS = [file for file in SOURCES if "/" not in file]


def module_of(file: str) -> str:
    """engine/worlds/doom.py → engine.worlds.doom; kernels/ is installed inside engine."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"engine.{name}" if name.split(".")[0] == "kernels" else name


def imports_of(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that `file` imports, anywhere in it; relative names made absolute."""
    package = module_of(file).split(".")
    if not file.endswith("/__init__.py"):
        package.pop()
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join(base + ([node.module] if node.module else []))
            yield node.lineno, name
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


FILE_OF = {module_of(file): file for file in SOURCES}
IMPORTS = {file: list(imports_of((ROOT / file).read_text("utf-8"), file)) for file in SOURCES}


def importers(package: str) -> set[str]:
    """The files that import `package` or something in it."""
    return {
        file
        for file, names in IMPORTS.items()
        if any(name == package or name.startswith(f"{package}.") for _, name in names)
    }


def tracked() -> list[Path]:
    """The files that git knows and that exist."""
    command = ["git", "ls-files", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs git and a clone: {error}")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def package_of(file: str) -> str:
    """engine/worlds/doom.py → worlds; engine/data/recording.py → data; play.py → programs."""
    parts = file.removesuffix(".py").split("/")
    if len(parts) == 1:
        return "programs"
    if parts[0] == "kernels":
        return "benchmark" if parts[1] == "benchmark" else "kernels"
    return "config" if parts[1] in FLAT else parts[1]


def arrows(file: str, imports: list[tuple[int, str]]) -> list[str]:
    """What is wrong with the project's own imports of `file`, one sentence each."""
    own, wrong = package_of(file), []
    for line, name in imports:
        target = package_of(FILE_OF[name]) if name in FILE_OF else own
        if target != own and target not in ARROWS[own].split():
            wrong.append(f"{file}:{line} imports {FILE_OF[name]}, but {own} is not above {target}")
    return sorted(set(wrong))


def test_every_file_has_a_package() -> None:
    new = [file for file in SOURCES if package_of(file) not in ARROWS]
    assert not new, f"say in tests/test_layout.py with which package {', '.join(new)} counts"


def test_arrows_point_down() -> None:
    """The table has an order: each package stands below all that it may import."""
    for number, (package, below) in enumerate(ARROWS.items()):
        wrong = set(below.split()) - set(list(ARROWS)[:number])
        assert not wrong, f"{package} may not import {', '.join(wrong)}, which stands below it in the table"


def test_imports_point_down() -> None:
    wrong = [sentence for file in SOURCES for sentence in arrows(file, IMPORTS[file])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "file, line",
    [
        ("engine/config.py", "import engine.worlds.base"),  # up
        ("engine/config.py", "from . import worlds"),  # up, as a name of its package
        ("engine/worlds/base.py", "def f():\n    from ..data.recording import Recorder"),  # late and relative
        ("engine/device.py", "from engine.train.optim import Optimiser"),
        ("engine/train/loop.py", "from ..evaluation import stage"),  # sideways
        ("kernels/reference.py", "import engine.config"),
        ("engine/evaluation/drift.py", "import engine.kernels"),  # past the model
    ],
)
def test_the_arrow_check_sees(file: str, line: str) -> None:
    assert arrows(file, list(imports_of(line, file)))


def test_who_may_import_what() -> None:
    within_ui = {file for file in SOURCES if file.startswith("engine/play/ui/")}
    within_kernels = {file for file in SOURCES if file.startswith("kernels/")}
    assert importers("pygame") <= {"play.py"} | within_ui
    assert importers("hydra") | importers("omegaconf") <= {"engine/config.py", *PROGRAMS}
    assert importers("engine.kernels") <= {"engine/model/layers.py"} | within_kernels
    assert not importers("kernels"), "say engine.kernels: another distribution is called kernels"
    library = within_kernels - {"kernels/benchmark/__main__.py"}  # a program: it times the player's step, too
    inside = {name for file in library for _, name in IMPORTS[file] if name.split(".")[0] == "engine"}
    above = sorted(name for name in inside if not f"{name}.".startswith("engine.kernels."))
    assert not above, f"kernels imports nothing of engine, so not {', '.join(above)}"


@pytest.mark.parametrize("file", SOURCES)
def test_importing_does_no_work(file: str) -> None:
    """At the top of a module stand imports, definitions, constants: no loops, no bare calls, no switches."""
    definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.AugAssign
    allowed = definition | ast.Import | ast.ImportFrom | ast.If
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guarded_import = isinstance(node, ast.Try) and isinstance(node.body[0], ast.Import | ast.ImportFrom)
        switch = isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute) for t in node.targets)
        # an operation's gradient: PyTorch has no decorator for it
        call = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        gradient = isinstance(call, ast.Attribute) and call.attr == "register_autograd"
        fine = isinstance(node, allowed) and not switch or gradient
        assert fine or docstring or guarded_import, f"{file}:{node.lineno} does work when it is imported"


@pytest.mark.parametrize("file", [f for f in SOURCES if "__main__" in (ROOT / f).read_text("utf-8")])
def test_programs_end_as_run_program_says(file: str) -> None:
    """In every encoding, and with a sentence for every error; those of engine/programs do so in `main`."""
    text = (ROOT / file).read_text("utf-8")
    started = re.split(r'^if __name__ == "__main__":$', text, flags=re.MULTILINE)[1].strip()
    if started != "sys.exit(program())":
        assert re.fullmatch(r"sys\.exit\((run_program\(.*\)|main\(\))\)", started), (
            f"{file} begins: {started}"
        )
        assert "run_program(" in text, file


def test_tests_call_nothing_private() -> None:
    """Where they need to, the seam is wrong. Named tuples and libraries have theirs."""
    allowed = {"_replace", "_asdict", "_python_dispatch", "_pytree", "_is_mkldnn_bf16_supported"}
    found = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            own = isinstance(getattr(node, "value", None), ast.Name) and node.value.id == "self"
            if re.match(r"_[a-z]", name) and name not in allowed and not own:
                found.append(f"{path.name}:{node.lineno} {name}")
    assert not found, ", ".join(found)


def test_worlds_and_recordings_need_no_torch() -> None:
    """Collecting and reading data run in processes that must start quickly."""
    code = "import sys, engine.worlds, engine.data.recording; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_are_this_clones() -> None:
    import engine.kernels

    assert Path(engine.kernels.__file__) == ROOT / "kernels" / "__init__.py"


def test_setup_lists_the_packages() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    folders = {module_of(f"{Path(file).parent.as_posix()}/__init__.py") for file in SOURCES if "/" in file}
    data = {"engine.configs", "engine.assets"}  # folders of files that come along
    assert set(setup["options"]["packages"].split()) == folders | data


def test_files_stay_short() -> None:
    long = {file: len((ROOT / file).read_text("utf-8").splitlines()) for file in SOURCES}
    long = {file: lines for file, lines in long.items() if lines > 300}
    assert not long, f"over 300 lines, so probably two nouns in one file: {long}"


def tree_of(readme: str) -> set[str]:
    """Paths in the fenced block under "## The tree": a line's first word each, indented below its folder."""
    block = re.search(r"^## The tree$.*?^```\w*$(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block, 'README.md has no fenced block under a heading "## The tree"'
    listed, parents = set(), []
    for line in filter(str.strip, block[1].splitlines()):
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        parents = [parent for parent in parents if parent[0] < indent]
        path = "".join(folder for _, folder in parents) + name
        listed.add(path.rstrip("/"))
        if name.endswith("/"):
            parents.append((indent, name))
    return listed


def test_readme_tree_is_the_tree() -> None:
    """Every tracked file is listed, or lies in a listed folder of which the README lists no single file."""
    files = {path.relative_to(ROOT) for path in tracked()}
    listed = tree_of((ROOT / "README.md").read_text("utf-8"))
    opened = {Path(path).parent.as_posix() for path in listed}  # folders whose files are listed one by one
    whole = listed - opened
    missing = sorted(
        file.as_posix()
        for file in files
        if not file.parts[0].startswith(".")
        and not any(path.as_posix() in whole for path in (file, *file.parents))
    )
    assert not missing, f"the README's tree lacks {', '.join(missing)}"
    stale = sorted(path for path in listed if not (ROOT / path).exists())
    assert not stale, f"the README's tree lists what is not there: {', '.join(stale)}"


def test_the_clone_stays_small() -> None:
    sizes = sorted(((path.stat().st_size, path.name) for path in tracked()), reverse=True)
    total = sum(size for size, _ in sizes)
    assert total < 20e6, f"tracked files take {total / 1e6:.1f} MB; the largest are {sizes[:3]}"


def test_no_path_of_one_machine() -> None:
    """A path that exists on one machine only is of no use to anybody else."""
    pattern = re.compile(r"(?<![\w./-])/(?:work|root|home|Users|mnt)/\w+")
    found = []
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture or weights
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)
