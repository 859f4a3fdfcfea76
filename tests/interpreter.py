"""Running kernel checks in Triton's interpreter: Triton decides at import whether it interprets, so in a child process.

A test file names its checks and calls `main` when it is run as a script; its tests read what `report_of` says of each.
While they run, memory that was not written holds NaN, and no load or store may leave the tensors of its launch.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def report_of(path: str) -> dict[str, str]:
    """What each check of the file said: "" or the error."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    results: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return results


@contextlib.contextmanager
def checked_addresses() -> Iterator[None]:
    """While active, a launch in this process's interpreter raises IndexError where it leaves the tensors it was given.

    The host's memory goes on beyond a tensor, so that a stray load mostly reads something; on a GPU it may fault, and
    a stray store goes unnoticed. Descriptors are checked too. A table of addresses gives what they are addresses of.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from s2o_inductor.kernels import triton_moe_addresses

    given = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    tables = triton_moe_addresses._tables
    lent: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}  # by where a table lies: what it holds, and spans
    spans: list[tuple[int, int]] = []  # of the launch, sorted: first byte, and the first one after the last element

    def note(executor: GridExecutor, args: Any, kwargs: Any) -> Any:
        result = given(executor, args, kwargs)
        tensors = [*result[0], *result[1].values()]
        spans[:] = _spans(tensors)
        for x in tensors:
            if isinstance(x, torch.Tensor) and x.data_ptr() in lent and x.tolist() == lent[x.data_ptr()][0]:
                spans.extend(lent[x.data_ptr()][1])
        spans.sort()
        return result

    def lend(lists: Any) -> Any:
        found = tables(lists)
        for table, tensors in zip(found, lists, strict=True):
            lent[table.data_ptr()] = [x.data_ptr() for x in tensors], list(_spans(tensors))
        return found

    def check(pointers: Any, mask: Any, what: str) -> None:
        at = pointers.data[mask.data]
        if not at.size:
            return
        first, end = int(at.min()), int(at.max()) + pointers.get_element_ty().primitive_bitwidth // 8
        span = spans[bisect.bisect_right(spans, (first, sys.maxsize)) - 1] if spans else (0, 0)
        if not span[0] <= first <= end <= span[1]:
            raise IndexError(f"{what} of bytes [{first - span[0]}, {end - span[0]}) of {span[1] - span[0]}")

    def checked_load(builder: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask, "load")
        return load(builder, pointers, mask, *rest, **options)

    def checked_store(builder: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "store")
        return store(builder, pointers, value, mask, *rest)

    try:
        GridExecutor._init_args_hst = note
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
        triton_moe_addresses._tables = lend
        yield
    finally:
        GridExecutor._init_args_hst = given
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        triton_moe_addresses._tables = tables


def _spans(arguments: list[Any]) -> Iterator[tuple[int, int]]:
    """The first byte of each tensor and the one after its last element."""
    for x in arguments:
        x = getattr(x, "base", x)  # of a descriptor
        if isinstance(x, torch.Tensor) and x.numel():
            last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
            yield x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def main(checks: dict[str, Callable[[], None]]) -> None:
    """Runs the checks, or those whose name has a part named on the command line, and prints the report."""
    from s2o_inductor.testing import poisoned_memory

    results = {}
    torch.set_num_threads(1)
    for name, run in checks.items():
        if len(sys.argv) > 1 and not any(part in name for part in sys.argv[1:]):
            continue
        try:
            with poisoned_memory(), checked_addresses():
                run()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc(limit=-6)
    print(json.dumps(results))
