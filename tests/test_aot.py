"""Every kernel, in every configuration that ships, compiled for sm_80, sm_90 and sm_100 without a GPU (`tests/aot.py`).

Guards what no interpreter shows: code that does not compile, registers that spill to memory, shared memory that a card
does not have, and lengths that would compile anew.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="there is no Triton for this system")

from kernels.backend import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled: unset TRITON_INTERPRET", allow_module_level=True)

import aot  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", aot.SHARED_LIMIT)
@pytest.mark.parametrize("case", aot.CASES, ids=lambda case: case.name)
def test_compiles_without_spills(case, arch):
    """Guards against a tile that is too large: spills, a stack frame, or more shared memory than the card has."""
    used = aot.compile_ahead(case, arch)
    assert max(used["spills"], used["stack"], used["local"]) == 0, used
    assert used["shared"] <= aot.SHARED_LIMIT[arch], used


def test_every_kernel_has_a_case():
    """Guards a kernel that nobody compiles."""
    assert {case.kernel for case in aot.CASES} == aot.all_kernels()


@pytest.mark.parametrize("case", aot.CASES, ids=lambda case: case.name)
def test_lengths_do_not_recompile(case):
    """Guards one binary per length: an integer is a row stride of whole tiles, or exempt from specialisation."""
    parameters = {p.name: p for p in case.kernel.params}
    for name, kind in case.types.items():
        if kind in ("i32", "i64"):
            fixed = name in case.aligned or name in aot.MODEL_SIZES
            assert parameters[name].do_not_specialize or fixed, name
    assert set(case.types) | set(case.constants) == set(parameters)


@pytest.mark.parametrize("case", aot.head_cases(), ids=lambda case: case.name)
def test_rows_of_logits_move_16_bytes_at_a_time(case):
    """Guards the loads that the floor assumes: a length the compiler knows nothing of makes them 4 bytes each."""
    assert aot.compile_ahead(case, 90)["wide"] >= 4
