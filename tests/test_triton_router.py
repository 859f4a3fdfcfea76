"""The Triton kernels of routers in Triton's interpreter.

`s2o::top_k` gives the places and the bits that a stable sort gives, and `s2o::mm_float32` is as exact as a product in
float32. Tensor cores cut off where the interpreter rounds: that shows on a GPU, in tests/gpu/test_router_gpu.py.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2o_inductor import router_ops
from s2o_inductor.testing import assert_close_to_gold

ODD = (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45)
LAYOUTS = ("rows", "columns", "every other", "three dimensions", "one row for all")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(
    draw: random.Random, rows: int, columns: int, dtype: torch.dtype, layout: str, device: str = "cpu"
) -> Tensor:
    """Scores of which a drawn share are odd or equal, laid out in memory in a drawn way."""
    share = draw.choice((0.0, 0.3, 1.0))
    values = [draw.choice(ODD) if draw.random() < share else draw.gauss(0.0, 1.0) for _ in range(rows * columns)]
    x = torch.tensor(values, device=device).to(dtype).view(rows, columns)
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "every other":
        return torch.stack([x, x * 0], dim=-1)[..., 0]
    if layout == "three dimensions":
        return x.view(rows, 1, columns).transpose(0, 1)
    return x[:1].expand(rows, columns) if layout == "one row for all" else x


def check(x: Tensor, k: int) -> None:
    from s2o_inductor.kernels import triton_top_k

    values, ids = (found.cpu() for found in triton_top_k.top_k(x, k))
    gold, places = router_ops._impl(x.cpu(), k)
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    assert torch.equal(ids, places) and values.dtype == x.dtype and values.is_contiguous() and ids.is_contiguous()
    assert torch.equal(values.view(bits), gold.view(bits))


@given(
    seed=st.integers(0, 2**20), rows=st.integers(0, 5), columns=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS), share=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=25, derandomize=True, database=None, deadline=None)
def check_any(seed: int, rows: int, columns: int, dtype: torch.dtype, layout: str, share: float) -> None:
    k = max(1, min(columns, round(share * columns), router_ops.MAX_CHOICES))
    check(numbers(random.Random(seed), rows, columns, dtype, layout), k)


def check_size(columns: int, k: int, rows: int, seed: int = 0) -> None:
    check(numbers(random.Random(seed), rows, columns, torch.float32, "rows"), k)


def check_many_rows() -> None:
    """Several rows of a program, the last one not full."""
    from s2o_inductor.kernels import triton_top_k

    before = triton_top_k._MANY_ROWS
    try:
        triton_top_k._MANY_ROWS = 1
        for columns in (3, 200):
            rows = 2 * triton_top_k.config_of(9, columns).rows + 1
            check_size(columns, 2, rows)
    finally:
        triton_top_k._MANY_ROWS = before


def check_product(rows: int, depth: int, columns: int, processors: int, turned: bool) -> None:
    """Against float64, with as many parts as a device of so many multiprocessors gets; NaN stays in its own row."""
    from s2o_inductor.kernels import triton_scores

    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(n, depth, generator=generator).half() for n in (rows, columns))
    if turned:
        a, b = (x.T.contiguous().T for x in (a, b))
    before = triton_scores._processors
    try:
        triton_scores._processors = lambda _: processors
        found = triton_scores.mm_float32(a, b.T)
        a[0] = math.nan
        odd = triton_scores.mm_float32(a, b.T)
    finally:
        triton_scores._processors = before
    assert torch.equal(odd[1:], found[1:]) and odd[0].isnan().all()
    gold, low = a[1:].double() @ b.T.double(), a[1:].float() @ b.T.float()
    assert_close_to_gold(found[1:], low, gold, what="scores", condition=2.0)


CHECKS: dict[str, Callable[[], None]] = {
    "any": check_any,
    "many rows": check_many_rows,
    **{f"{k} of {n}": functools.partial(check_size, n, k, 2) for n, k in ((512, 22), (8, 2), (1024, 64), (1, 1))},
    **{
        f"product {sizes}": functools.partial(check_product, *sizes)
        for sizes in (
            (3, 300, 40, 4, False), (2, 512, 33, 8, True), (16, 48, 16, 1, True), (70, 200, 70, 9, False),
            (1030, 144, 16, 1, False),
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreter.report_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str, report: dict[str, str]) -> None:
    assert not report[name], report[name]


@given(rows=st.integers(1, 100_000), columns=st.integers(1, router_ops.MAX_COLUMNS))
@settings(max_examples=50)
def test_a_program_holds_whole_rows(rows: int, columns: int) -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import triton_top_k

    config = triton_top_k.config_of(rows, columns)
    for size in (config.rows, config.keys, config.warps):
        assert size >= 1 and size & (size - 1) == 0
    # 64 bits of each number: what a thread holds stays in its registers.
    assert config.keys >= columns and config.rows * config.keys <= 32 * 32 * config.warps


@given(
    rows=st.integers(1, 100_000), columns=st.integers(1, 2000), depth=st.integers(1, 20_000),
    processors=st.integers(1, 200),
)  # fmt: skip
@settings(max_examples=50)
def test_parts_have_work_and_no_sum_is_cut_for_nothing(rows: int, columns: int, depth: int, processors: int) -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import triton_scores

    tile = triton_scores.tiles_of(rows)[0]
    parts = triton_scores.parts_of(tile, rows, columns, depth, processors)
    tiles = -(-rows // tile.rows) * -(-columns // tile.keys)
    assert 1 <= parts <= -(-depth // (2 * tile.depth))
    assert parts == 1 or tiles < processors


if __name__ == "__main__":
    interpreter.main(CHECKS)
