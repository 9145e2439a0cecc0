"""The house: which room may import which, and how large its files and functions may grow."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {  # a program may import these other programs, and every room
    "benchmarks": "report train_rlpa",
    "studies": "evaluation train_rlpa",
    "chat": "evaluation train_rlpa",
    "evaluation": "train_rlpa",
    "train_rlpa": "",
    "report": "",
    "tiny": "",
}
ROOMS = {  # a room may import these rooms, all of which stand below it
    "records": "command_line dry_run packing simulator rewards dialogue learners model kernels worlds endpoints config",
    "command_line": "learners endpoints config",
    "dry_run": "learners model kernels config",
    "scheduler": "sampler simulator config",
    "packing": "dialogue learners model kernels config",
    "sampler": "dialogue learners model kernels config",
    "simulator": "rewards worlds endpoints config",
    "rewards": "dialogue worlds endpoints config",
    "dialogue": "config",
    "learners": "model worlds config",
    "model": "kernels",
    "kernels": "",
    "worlds": "endpoints",
    "endpoints": "config",
    "config": "",
}
MOVING = {"world": "worlds", "second_world": "worlds", "plain_text": "endpoints", "throttle": "endpoints",
          "processes": "learners", "sharding": "learners"}  # fmt: skip
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for room in {*PROGRAMS, *ROOMS, *MOVING}
    for path in ((ROOT / f"{room}.py",) if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).glob("*.py")))
}


def room_of(module: str) -> str:
    """Return the room, or the program, that a module belongs to."""
    room = module.partition(".")[0]
    return MOVING.get(room, room)


def imports(module: str) -> Iterator[str]:
    """Yield the modules of the house that a module imports, anywhere in its code."""
    for node in ast.walk(MODULES[module]):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]  # `from kernels import backend`
            found = [name if name in MODULES else node.module for name in whole]
        yield from (name for name in found if room_of(name) in PROGRAMS | ROOMS)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each function of the house with the name of its module; the benchmarks are measured by nobody."""
    for module, tree in MODULES.items():
        if room_of(module) != "benchmarks":
            yield from ((module, node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_one_way(module):
    """Guards a leaf that imports a program: it can then neither be read nor be tested without all of the trainer."""
    room = room_of(module)
    allowed = {room, *ROOMS[room].split()} if room in ROOMS else {room, *PROGRAMS[room].split(), *ROOMS}
    assert {name for name in imports(module) if room_of(name) not in allowed} == set()


def test_nothing_runs_in_a_circle():
    """Guards two files that only work together, in one order of imports; and arrows above that point up."""
    order = [*PROGRAMS, *ROOMS]
    for room, targets in (PROGRAMS | ROOMS).items():
        assert all(order.index(target) > order.index(room) for target in targets.split()), room
    graph = {module: set(imports(module)) - {module} for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_the_house_stays_small():
    """Guards a trainer that nobody can read in one sitting any more, for it has grown a little with each change."""
    lengths = [(f.end_lineno - f.lineno + 1, module, f.name) for module, f in functions()]
    assert median(length for length, *_ in lengths) <= 10 and max(lengths) < (81,)
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_every_room_is_in_the_table():
    """Guards a new file or folder whose imports nobody looks at."""
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    assert found - {*PROGRAMS, *ROOMS, *MOVING, "tests", "runs"} == set()


def test_what_is_public_is_described():
    """Guards functions that everybody may call and nobody has explained: at most one in twenty."""
    trees = (tree for module, tree in MODULES.items() if room_of(module) != "benchmarks")
    scopes = [scope for tree in trees for scope in ast.walk(tree) if isinstance(scope, ast.Module | ast.ClassDef)]
    public = [node for scope in scopes for node in scope.body
              if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]  # fmt: skip
    assert sum(ast.get_docstring(node) is not None for node in public) >= 0.95 * len(public)
