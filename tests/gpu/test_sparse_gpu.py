"""S2O sparse attention on a GPU: random calls against a float64 replay, long ones, and beyond 2^31 elements.

Needs a CUDA device; `OMP_NUM_THREADS=1 pytest -n 15 tests/gpu` compiles kernels side by side, and the replays on the
CPU leave each other their cores. Unwritten memory holds NaN (conftest.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sparse_cases import SparseProblem, random_case, sparse_problem
from test_sparse_backend import Attention, Packed, compiled, packed_positions, relative
from torch import Tensor

import s2o_inductor
from s2o_inductor.sparse_policy import GEOMETRIES, Geometry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("seed", range(200))
def test_random_cases(seed: int) -> None:
    random_case(seed, device="cuda", small=False).check()


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.5])
def test_default_geometry_at_4096(budget: float) -> None:
    sparse_problem(
        1, (8, 2), (4096, 4096), (128, 128), torch.bfloat16, sharpness=3.0, device="cuda", budgets=(budget,),
        max_density=0.5, geometry=GEOMETRIES["cuda"],
    ).check()  # fmt: skip


@pytest.mark.parametrize("masked", [{"padded": True}, {"packed": "again"}], ids=["padded", "packed"])
@pytest.mark.parametrize("geometry", [GEOMETRIES["cuda"], Geometry(block=64, clusters=1)], ids=["ours", "small blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_heads(masked: dict[str, Any], geometry: Geometry, dtype: torch.dtype) -> None:
    """Rows of 64 float8 channels are the narrowest that products take."""
    sparse_problem(
        2, (4, 1), (999, 2900), (64, 64), dtype, device="cuda", geometry=geometry, max_density=0.4, **masked
    ).check()  # fmt: skip


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("float8", [True, False])
def test_keys_far_from_zero(width: int, float8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all keys have in common ranks none of them, and is not what float8 products are rounded by."""
    from s2o_inductor.kernels import triton_sparse_order

    monkeypatch.setattr(triton_sparse_order, "FLOAT8", float8)
    case = sparse_problem(
        1, (4, 1), (700, 2900), (width, 64), torch.bfloat16, offset=20.0, device="cuda", max_density=0.3
    )  # fmt: skip
    if torch.cuda.get_device_capability() >= (9, 0):
        assert case.ranking().k.dtype == (torch.float8_e4m3fn if float8 else torch.bfloat16)
    case.check()


def test_beyond_two_to_the_31_elements() -> None:
    """The last tiles of 600,000 tokens in a fused QKV projection: offsets of keys pass 2^31 elements."""
    length = 600_000
    fused = torch.randn(1, length, 48, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in (fused[:, :, :2], fused[:, :, 32:33], fused[:, :, 40:41]))
    assert k.stride(2) * (length - 1) > 2**31
    case = SparseProblem(q[:, :, -200:] * 2, k, v, geometry=GEOMETRIES["cuda"], max_density=0.02)
    case.check_replay(case.run(), *case.order())


def test_bitwise_repeatable_and_the_same_in_ranges() -> None:
    case = sparse_problem(
        2, (8, 2), (3000, 3000), (128, 128), torch.bfloat16, device="cuda", padded=True, max_density=0.3
    )  # fmt: skip
    first = case.run()
    for options in ({}, {}, {"workspace_bytes": 1 << 20}):
        again = case.run(**options)
        for field in dataclasses.fields(first):
            assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name


def test_captured_in_a_cuda_graph() -> None:
    """No call waits for the device or chooses by what a tensor holds, so a replay follows its inputs."""
    case = sparse_problem(
        1, (4, 2), (2000, 2000), (128, 128), torch.bfloat16, device="cuda", budgets=(0.0, 0.1, 0.3, 0.3)
    )
    case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for x in (case.q, case.k, case.v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    fresh = case.run()
    assert torch.equal(captured.output, fresh.output) and torch.equal(captured.bundles, fresh.bundles)


def test_documents_move_in_a_cuda_graph() -> None:
    """Where documents begin is read on the device: a replay follows ids that changed."""
    case = sparse_problem(
        2, (4, 2), (2500, 3000), (128, 128), torch.bfloat16, device="cuda", packed="in a row", budgets=(0.3,),
        geometry=Geometry(bundle=64), padded=True,
    )  # fmt: skip
    case.check()
    ids = torch.arange(3000, device="cuda").expand(2, -1)
    queries, keys = (x.contiguous() for x in case.documents)
    case = dataclasses.replace(case, documents=(queries, keys))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for size in (1100, 900):
        keys.copy_(ids // size % 2)  # of the second size, one comes back
        queries.copy_(keys[:, 500:])
        graph.replay()
        fresh = dataclasses.replace(case).check()
        assert torch.equal(captured.output, fresh.output) and torch.equal(captured.bundles, fresh.bundles)


@torch.no_grad()
def test_packed_documents_through_the_backend() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, heads, 6144, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    k[:, :, ::61] *= 4
    positions = packed_positions(4000, 100, 2044, batch=2).cuda()
    model = Packed()
    output = compiled(model, budget=0.5, audit=6144)(q, k, v, positions)
    exact = model(*(x.float() for x in (q, k, v)), positions)  # the audit counts the output's rounding as error too
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert (site["route"], site["exact"]) == ("cuda-s2o", False)
    assert 0.0 < site["sparse"]["density"] < 1.0
    error = relative(output.float(), exact)
    assert error < 0.1 and site["sparse"]["error"] == pytest.approx(error**2, rel=0.3)


@pytest.mark.parametrize("kind", ["special", "kernels"])
@pytest.mark.parametrize(
    "geometry", [GEOMETRIES["cuda"], Geometry(), Geometry(tile=64), Geometry(sink=0, bundle=128, block=128)]
)
@pytest.mark.parametrize(
    ("lengths", "width"), [((2048, 2048), 128), ((1777, 2311), 128), ((300, 4500), 64), ((1, 1000), 64)]
)
def test_both_attention_kernels(
    lengths: tuple[int, int], width: int, geometry: Geometry, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of Gluon's, the one with loading warps first, against the float64 replay, and Triton's against it."""
    from s2o_inductor.kernels import hopper_sparse

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for Hopper")
    if kind == "special" and (hopper_sparse.special is None or geometry.tile != 128):
        pytest.skip("the kernel with loading warps takes tiles of 128 queries, in a Triton that has what it needs")
    if kind == "kernels":
        monkeypatch.setattr(hopper_sparse, "special", None)
    case = sparse_problem(
        2, (4, 1), lengths, (width, width), torch.bfloat16, sharpness=2.0, device="cuda", geometry=geometry,
        budgets=(0.0, 0.1, 0.4, 0.9),
    )  # fmt: skip
    ran: list[bool] = []
    launch = hopper_sparse.attend
    monkeypatch.setattr(hopper_sparse, "attend", lambda *arguments: ran.append(launch(*arguments)) or ran[-1])
    kernels: list[Any] = []
    start = hopper_sparse.try_launch

    def try_launch(kernel: Any, *arguments: Any) -> bool:
        if kernel.__name__ == "attend_kernel":
            kernels.append(kernel)
        return start(kernel, *arguments)

    monkeypatch.setattr(hopper_sparse, "try_launch", try_launch)
    found = case.check()
    assert ran and all(ran)
    assert {kernel is getattr(hopper_sparse, kind).attend_kernel for kernel in kernels} == {True}
    monkeypatch.setattr(hopper_sparse, "attend", lambda *_: False)
    other = case.check()
    same = found.bundles == other.bundles
    assert same.float().mean() > 0.9  # rounding may move a stop that was close
    if same.all():
        assert torch.equal(found.pairs, other.pairs) and torch.equal(found.visible, other.visible)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"heads": (8, 2), "lengths": (2600, 2600)}, {}),
        ({"heads": (4, 2), "lengths": (900, 2900), "widths": (64, 64)}, {}),
        ({"heads": (4, 1), "lengths": (700, 2900), "dtype": torch.float16}, {}),
        ({"heads": (8, 1), "lengths": (300, 4700)}, {}), ({"heads": (7, 1), "lengths": (300, 2900)}, {}),
        ({"batch": 2, "heads": (2, 2), "lengths": (900, 2900)}, {}),
        ({"heads": (4, 1), "lengths": (1500, 4500)}, {"window": 2100}),
        ({"heads": (4, 1), "lengths": (300, 2900)}, {"causal": False}),
        ({"heads": (4, 1), "lengths": (700, 2900), "offset": 20.0}, {}),
        ({"heads": (1, 1), "lengths": (400, 1500)}, {"geometry": Geometry(sink=0, clusters=8, block=64, bundle=64)}),
    ],
)  # fmt: skip
def test_both_score_kernels(
    fields: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Gluon's against the reference, and what it lists against what Triton's lists."""
    from s2o_inductor.kernels import hopper_sparse

    if torch.cuda.get_device_capability() != (9, 0) or hopper_sparse.scoring is None:
        pytest.skip("the Gluon kernel is for Hopper, in a Triton that has what it needs")
    fields = {"widths": (128, 128), "dtype": torch.bfloat16, **fields}
    options = {"geometry": GEOMETRIES["cuda"], "max_density": 0.3, **options}
    case = sparse_problem(**fields, sharpness=3.0, device="cuda", **options)
    ran: list[bool] = []
    score = hopper_sparse.score
    monkeypatch.setattr(hopper_sparse, "score", lambda *arguments: ran.append(score(*arguments)) or ran[-1])
    case.check()
    assert ran and all(ran)
    ranking = case.ranking()
    found, count = case.order(ranking)
    monkeypatch.setattr(hopper_sparse, "score", lambda *_: False)
    other, same = case.order(ranking)
    assert torch.equal(count, same)
    runs = case.k.shape[2] // case.geometry.run
    lists = [torch.zeros(*x.shape[:3], runs + 1).scatter_(3, x.long() + 1, 1.0)[..., 1:] for x in (found, other)]
    assert (lists[0] * lists[1]).sum() > 0.99 * count.sum()  # rounding moves few runs to the bin beside theirs


def hopper_tails(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What Hopper's kernel marks of each tail from here on; None for one that it does not take."""
    from s2o_inductor.kernels import hopper_sparse

    if torch.cuda.get_device_capability() != (9, 0) or hopper_sparse.tails is None:
        pytest.skip("the kernel is for Hopper, in a Triton that has what it needs")
    marks: list[Tensor | None] = []
    launch = hopper_sparse.tail

    def tail(*arguments: Any) -> Tensor | None:
        marks.append(launch(*arguments))
        return marks[-1]

    monkeypatch.setattr(hopper_sparse, "tail", tail)
    return marks


@pytest.mark.parametrize(
    ("lengths", "geometry", "dtype"),
    [
        ((2048, 2048), GEOMETRIES["cuda"], torch.bfloat16), ((1777, 2311), Geometry(), torch.bfloat16),
        ((300, 9000), GEOMETRIES["cuda"], torch.float16), ((1, 1700), Geometry(sink=0, block=128), torch.float16),
        ((500, 3000), Geometry(clusters=1, block=64, sink=64, bundle=128), torch.bfloat16),
    ],
)  # fmt: skip
def test_tail_on_hopper(
    lengths: tuple[int, int], geometry: Geometry, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the float64 replay, with heads that leave much, little and nothing."""
    marks = hopper_tails(monkeypatch)
    case = sparse_problem(
        2, (4, 1), lengths, (128, 128), dtype, sharpness=2.0, device="cuda", geometry=geometry,
        budgets=(0.0, 0.1, 0.4, 0.9), max_density=0.3,
    )  # fmt: skip
    found, again = case.check(), case.run()
    assert marks and all(x is not None for x in marks)
    assert torch.equal(found.output, again.output) and torch.equal(found.lse, again.lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tail_that_outweighs_on_hopper(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read of keys that weigh far more than the rest, so much that float16 does not hold their weights."""
    from s2o_inductor.kernels import cuda_sparse

    marks = hopper_tails(monkeypatch)
    case = sparse_problem(
        1, (2, 1), (200, 1700), (128, 128), dtype, sharpness=1.0, device="cuda", geometry=GEOMETRIES["cuda"],
        budgets=(1e-9,),
    )  # fmt: skip
    case.q = case.q + 4
    case.k[:, :, :1024] += 0.5
    table, listed = case.order()
    found = cuda_sparse.attend(case.q, case.k, case.v, table.cuda(), 0 * listed.cuda(), **case.options)
    assert len(marks) == 1 and marks[0] is not None and (marks[0] == 1).any()
    case.check_replay(found, table, 0 * listed)


def test_rows_that_are_not_finite_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no measure for the float8 numbers of the others, and keys to come reach nobody."""
    marks = hopper_tails(monkeypatch)
    case = sparse_problem(
        1, (2, 1), (2048, 2048), (128, 128), torch.bfloat16, device="cuda", geometry=GEOMETRIES["cuda"],
        budgets=(0.3,), max_density=0.3,
    )  # fmt: skip
    found, q, k = case.run().output, case.q.clone(), case.k.clone()
    case.q[:, :, 1999], case.q[:, :, 2001] = float("nan"), float("inf")
    spoiled = case.run().output
    assert len(marks) == 2 and all(x is not None for x in marks)
    assert torch.equal(spoiled[:, :, :1920], found[:, :, :1920])  # the tile's own order is another one
    assert torch.isfinite(spoiled[:, :, 2002:]).all() and torch.isfinite(spoiled[:, :, 1920:1999]).all()
    case.q, case.k = q, k
    case.k[:, :, 1700:] = float("nan")
    assert torch.equal(case.run().output[:, :, :1664], found[:, :, :1664])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_through_the_backend(padded: bool) -> None:
    """A compiled model under a budget: near the exact result, by the error that the audit reports."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, heads, 4096, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    k[:, :, ::61] *= 4
    padding = torch.arange(4096, device="cuda") >= torch.tensor([[0], [700]], device="cuda")
    model = Attention()
    inputs = (q, k, v, padding) if padded else (q, k, v)
    output = compiled(model, budget=0.5, audit=4096)(*inputs)
    exact = model(*(x.float() for x in inputs[:3]), *inputs[3:])  # the audit counts the output's rounding as error too
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert (site["route"], site["exact"]) == ("cuda-s2o", False)
    assert 0.0 < site["sparse"]["density"] < 1.0
    seen = padding[:, None, :, None].expand_as(exact) if padded else torch.ones_like(exact, dtype=torch.bool)
    error = relative(output[seen].float(), exact[seen])
    assert error < 0.1
    if not padded:
        assert site["sparse"]["error"] == pytest.approx(error**2, rel=0.3)
