"""The house: which room may import which, and how large its files and functions may grow."""

from __future__ import annotations

import ast
import graphlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {  # a program may import these other programs, and every room
    "benchmarks": "studies report train_rlpa",
    "studies": "evaluation tiny train_rlpa",
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
    "simulator": "rewards dialogue worlds endpoints config",
    "rewards": "dialogue worlds config",
    "dialogue": "",
    "learners": "model worlds config",
    "model": "kernels",
    "kernels": "",
    "worlds": "",
    "endpoints": "config",
    "config": "",
    "untrusted": "",  # what others wrote is read and cleaned everywhere: every room may import it
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_bytes())
    for room in PROGRAMS | ROOMS
    for path in ((ROOT / f"{room}.py",) if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).glob("*.py")))
}


def room_of(module: str) -> str:
    """Return the room, or the program, that a module belongs to."""
    return module.partition(".")[0]


def imports(module: str) -> set[str]:
    """Return the other modules of the house that a module imports, anywhere in its code."""
    found: set[str] = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}  # `from kernels import backend`
            found |= {name if name in MODULES else node.module for name in whole}
    return {name for name in found if room_of(name) in PROGRAMS | ROOMS} - {module}


def public_definitions() -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Yield the public functions, classes and methods, each with the name of its module."""
    for module, tree in MODULES.items():
        for scope in (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef)):
            for node in scope.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    yield module, node


def test_arrows_point_one_way():
    """Guards a leaf that imports a program: it can then neither be read nor be tested without all of the trainer."""
    allowed = {room: {room, *targets.split(), *ROOMS} for room, targets in PROGRAMS.items()}
    allowed |= {room: {room, *targets.split(), "untrusted"} for room, targets in ROOMS.items()}
    wrong = [(one, other) for one in MODULES for other in imports(one) if room_of(other) not in allowed[room_of(one)]]
    assert wrong == []


def test_every_arrow_is_used():
    """Guards a table of arrows that allows more than there is: a new import must be a decision."""
    used = {room: {room_of(x) for m in MODULES if room_of(m) == room for x in imports(m)} for room in PROGRAMS | ROOMS}
    unused = {room: set(targets.split()) - used[room] for room, targets in (PROGRAMS | ROOMS).items()}
    assert {room: targets for room, targets in unused.items() if targets} == {}


def test_nothing_runs_in_a_circle():
    """Guards two files that only work together, in one order of imports; and arrows above that point up."""
    order = [*PROGRAMS, *ROOMS]
    for room, targets in (PROGRAMS | ROOMS).items():
        assert all(order.index(target) > order.index(room) for target in targets.split()), room
    graph = {module: imports(module) for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)  # CycleError names a circle


def test_every_room_is_in_the_table():
    """Guards a new file or folder whose imports nobody looks at."""
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    assert {room for room in found if not room.startswith(".")} - {*PROGRAMS, *ROOMS, "tests", "runs"} == set()


def test_the_house_stays_small():
    """Guards a trainer that nobody can read in one sitting any more, for it has grown a little with each change."""
    nodes = [(module, node) for module, tree in MODULES.items() for node in ast.walk(tree)]
    lengths = [(x.end_lineno - x.lineno + 1, module, x.name) for module, x in nodes if isinstance(x, ast.FunctionDef)]
    assert median(length for length, *_ in lengths) <= 10 and max(lengths)[0] <= 80, max(lengths)
    most = {"train_rlpa.py": 800, "README.md": 140}
    assert {name: n for name, limit in most.items() if (n := (ROOT / name).read_bytes().count(b"\n")) > limit} == {}
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_one_place_prints():
    """Guards a line that a stranger's name, text or message gets onto a terminal as it came: all is said by `say`."""
    found = []
    for module in (name for name in MODULES if room_of(name) not in ("benchmarks", "untrusted")):
        for node in (x.func for x in ast.walk(MODULES[module]) if isinstance(x, ast.Call)):
            name = ast.unparse(node)
            if name in ("print", "tqdm.write", "traceback.print_exc", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{module}, line {node.lineno}: {name}")
    assert found == []


@pytest.mark.parametrize("module", [m for m, tree in MODULES.items() if m.startswith("benchmarks.")
                                    and "__main__" in ast.unparse(tree)])  # fmt: skip
def test_every_benchmark_explains_itself(module, monkeypatch, capsys):
    """Guards --help that is a traceback, or that starts an hour's run."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


def test_what_is_public_is_described():
    """Guards functions that everybody may call and nobody has explained: at most one in twenty."""
    public = list(public_definitions())
    silent = [f"{module}.{node.name}" for module, node in public if ast.get_docstring(node) is None]
    assert len(silent) <= 0.05 * len(public), silent


def reads_by_locale(call: ast.Call) -> bool:
    """Say whether a call opens text, or a program's pipes, in whatever encoding the machine has."""
    whole, given = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
    name, modes = whole.rpartition(".")[2], [x.value for x in call.args if isinstance(x, ast.Constant)]
    if "encoding" in given or whole in ("os.open", "checkpoints.write_text"):  # the latter is ours
        return False
    binary = any(isinstance(mode, str) and "b" in mode for mode in modes) or "buffering=0" in ast.unparse(call)
    methods = name in ("read_text", "write_text") and "." in whole
    return methods or "text" in given and name in ("run", "Popen") or name == "open" and not binary


def test_own_files_are_read_alike_in_any_locale():
    """Guards a program that does not start in zh_CN.GBK, and a run that is written in Latin-1."""
    calls = [(module, x) for module, tree in MODULES.items() for x in ast.walk(tree) if isinstance(x, ast.Call)]
    assert [f"{module}:{call.lineno}" for module, call in calls if reads_by_locale(call)] == []
