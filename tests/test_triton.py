"""Run the Triton kernels' tests where there is no GPU: interpreted, each file in a process of its own.

The interpreter must be chosen before a kernel's module is imported, so these tests cannot run in this process. On a
machine with CUDA run them directly: `pytest tests/triton_*.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="there is no Triton for this system")


def minor(module) -> list[int]:
    """Return a module's version up to the minor one."""
    return [int(number) for number in module.__version__.split(".")[:2]]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        minor(triton) < [3, 7] and minor(numpy) >= [2, 4],
        reason="Triton before 3.7 takes the bound of a loop by int() of an array with one element, which numpy 2.4"
        " refuses: pip install 'numpy<2.4' for its interpreter",
    ),
]
FOLDER = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("triton_*.py")))
def test_interpreted(file):
    """Guards every kernel's numerics: all tests of the file ran, and passed, under TRITON_INTERPRET=1."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-W", "ignore::RuntimeWarning", str(FOLDER / file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 0, done.stdout[-5000:] + done.stderr[-2000:]
