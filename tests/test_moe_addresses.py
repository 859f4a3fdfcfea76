"""Kernels that find experts by their addresses, compiled for Hopper by the installed Triton, which needs no GPU."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import compile_moe

from s2o_inductor.moe_spec import ExpertSpec

SPECS = {
    "out times in": ExpertSpec("silu", "half"),
    "in times out": ExpertSpec("silu", "interleaved", transposed=True),
}


def pieces(spec: ExpertSpec, separate: bool) -> dict[str, tuple[set[int], int]]:
    """Bytes that each asynchronous load of the products takes at once, and how many tiles the copy engine fetches."""
    shape = compile_moe.Shape(32, 2, 4, 256, 384, spec, False, 132, 227 << 10, 90, separate)
    walk, found = (compile_moe.whole_call, shape), {}
    for job in compile_moe._jobs_of([walk]):
        result = compile_moe.compile_one(*job)
        loads = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", result["ptx"])
        tiles = len(re.findall(r"cp\.async\.bulk\.tensor", result["ptx"]))
        found[result["kernel"]] = ({int(size, 0) for size in loads}, tiles)
    return found


@pytest.mark.parametrize("name", SPECS)
def test_weights_are_read_sixteen_bytes_at_a_time(name: str) -> None:
    # In a process of its own: what Triton compiles for is a setting of a process.
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        separate, stacked = pool.submit(pieces, SPECS[name], True), pool.submit(pieces, SPECS[name], False)
    assert "_addresses_kernel" in separate.result() and "_addresses_kernel" not in stacked.result()
    for kernel in ("_first_kernel", "_second_kernel"):
        sizes, tiles = separate.result()[kernel]
        assert sizes == {16} and tiles < stacked.result()[kernel][1], kernel
