"""The Triton kernels of routed experts in Triton's interpreter, and the choices their host side makes.

The operator runs as it does on a GPU, gradients included. What the interpreter cannot show, a GPU does: see
tests/gpu/test_moe_gpu.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import check, leaves, random_case, separate_experts, typed
from test_moe_op import Problem, problem

from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec

CASES: dict[str, dict[str, Any]] = {
    "relu2": {"spec": ExpertSpec("relu2")},
    "relu": {"spec": ExpertSpec("relu")},
    "relu, weighted input": {"spec": ExpertSpec("relu", score="input"), "routing": "outside", "bias": True},
    "weights on hidden rows": {"spec": ExpertSpec("silu", "half", "hidden"), "bias": True},
    "weights on the input": {"spec": ExpertSpec("silu", "half_swapped", "input", transposed=True), "bias": True},
    "GPT-OSS": {
        "spec": ExpertSpec("silu", "interleaved", transposed=True, alpha=1.702, limit=1.5, shift=1.0), "bias": True,
    },
    "two tensors, odd sizes": {"spec": ExpertSpec("gelu", "separate"), "width": 23, "inner": 37},
    "two tensors, weighted input": {"spec": ExpertSpec("gelu_tanh", "separate", "input"), "dtype": torch.float32},
    "choices outside": {"spec": ExpertSpec("relu", "half"), "routing": "outside", "bias": True},
    "one expert takes all": {"spec": ExpertSpec("relu2"), "routing": "one_expert", "tokens": 60},
    "weights in no tiles": {"spec": ExpertSpec("identity", "interleaved"), "strided": True},
    "no choice is an expert's": {"spec": ExpertSpec("relu2"), "experts": 3, "ids": -1},
}  # fmt: skip


def case(name: str) -> Problem:
    fields = {"tokens": 8, "choices": 2, "experts": 5, "width": 24, "inner": 40, **CASES[name]}
    dtype, ids = fields.pop("dtype", torch.float16), fields.pop("ids", None)
    made = typed(problem(**fields), dtype)
    return made if ids is None else dataclasses.replace(made, ids=torch.full_like(made.ids, ids))


def check_every_tile_height() -> None:
    """Tiles as high as experts of few and of many rows get them, the plan's and the products'."""
    from s2o_inductor.kernels import cuda_moe

    made, original, heights = case("relu2"), cuda_moe.facts_of, []
    try:
        for mean in (1, 15, 40, 100):
            facts = cuda_moe.Facts(torch.float16, 5 * mean, 5, 4, 48 << 10)
            heights.append(facts.height)
            cuda_moe.facts_of = lambda *_, facts=facts: facts
            check(made)
    finally:
        cuda_moe.facts_of = original
    assert heights == [16, 32, 64, 128]


def check_squares_kept() -> None:
    """What bfloat16, whose products the interpreter has not, keeps of relu2; nothing kept is computed again."""
    from s2o_inductor.kernels import cuda_moe

    original = cuda_moe._keeps_hidden
    try:
        cuda_moe._keeps_hidden = lambda *_: True
        for keep in (True, False):
            check(case("relu2"), keep=keep)
        check(typed(problem(ExpertSpec("relu2", score="input"), 40, 2, 5, 24, 40, bias=True), torch.float16))
    finally:
        cuda_moe._keeps_hidden = original


def check_gradients_of_weights_in_turn() -> None:
    """Several blocks of an expert's gradient in one program, fewer in the last, over several steps of rows."""
    from s2o_inductor.kernels import cuda_moe, triton_moe_backward
    from s2o_inductor.kernels.triton_moe_tiles import Tile

    before = cuda_moe.outer_tiles, triton_moe_backward._BLOCKS, triton_moe_backward._PROGRAMS
    try:
        cuda_moe.outer_tiles = lambda *_: [Tile(16, 16, 4, 1, depth=16)]
        triton_moe_backward._BLOCKS, triton_moe_backward._PROGRAMS = 4, 1
        for score in ("output", "input"):
            check(typed(problem(ExpertSpec("relu2", score=score), 40, 2, 5, 24, 40), torch.float16))
    finally:
        cuda_moe.outer_tiles, triton_moe_backward._BLOCKS, triton_moe_backward._PROGRAMS = before


def check_shared_tiles() -> None:
    """Programs that go through many tiles compute what as many programs as tiles do."""
    from s2o_inductor.kernels import cuda_moe
    from s2o_inductor.kernels.triton_moe_tiles import Tile

    originals = cuda_moe.first_tiles, cuda_moe.second_tiles
    results = []
    try:
        for programs in (0, 3):
            tiles = [Tile(16, 32, 4, 2, 32, 2, programs)]
            cuda_moe.first_tiles = cuda_moe.second_tiles = lambda *_, tiles=tiles: tiles
            names = ("weights on the input", "two tensors, odd sizes", "GPT-OSS")
            results.append([leaves(case(name)).run(moe_experts) for name in names])
    finally:
        cuda_moe.first_tiles, cuda_moe.second_tiles = originals
    for single, shared in zip(*results, strict=True):
        for name, x in single.items():
            assert torch.equal(x, shared[name]), name


def check_ways_to_plan() -> None:
    """Choices compared with each other, counted in two ways, or sorted: the same plan, and the same bits of results."""
    from s2o_inductor.kernels import triton_moe_plan as plans
    from s2o_inductor.kernels.launching import Config

    made, found, before = leaves(case("choices outside")), [], plans._way
    # Of an expert more choices than a tile has rows, and then fewer; and in several blocks, strided, with strangers.
    few = [made.ids, torch.tensor([[2] * 5, [2] * 5, [2] * 5, [4] * 5, [-1, 0, 9, 2, 2]])]
    many = [torch.randint(-1, 6, (71, 6), generator=torch.Generator().manual_seed(seed))[:, ::2] for seed in (0, 1)]
    many += [torch.full((90, 2), expert, dtype=torch.int32) for expert in (4, 5)]
    ways: list[Any] = [
        None, (plans._rank_kernel, Config(16, 256, 4, 1), 0), (plans._rank_kernel, Config(16, 256, 4, 1), 16),
        (plans._count_kernel, Config(32, 64, 4, 1), 16), (plans._count_kernel, Config(64, 32, 4, 1), 16),
    ]  # fmt: skip
    try:
        for way in ways:
            plans._way = lambda *_, way=way: way
            found.append(([plans.Plan.of(ids, 5, 16) for ids in few + many], made.run(moe_experts)))
    finally:
        plans._way = before
    (sorts, first), *rest = found
    for others, results in rest:
        for plan, other in zip(sorts, others, strict=True):
            for name in ("keys", "order", "firsts"):
                assert torch.equal(getattr(plan, name).long(), getattr(other, name).long()), name
            for rows in (16, 32):
                tiles, count = plan.tiles(rows), int(plan.tiles(rows)[0, 0])
                assert torch.equal(tiles[: count + 1, :3][1:], other.tiles(rows)[: count + 1, :3][1:])
                assert count == int(other.tiles(rows)[0, 0]) <= plan.bound(rows) == tiles.shape[0] - 1
        assert all(torch.equal(x, results[name]) for name, x in first.items())


def check_only_what_is_wanted() -> None:
    """A gradient is the same whether it is alone or among others, and nothing else is computed with it."""
    made = leaves(typed(problem(ExpertSpec("silu", "half", "input"), 5, 2, 3, 8, 8, bias=True), torch.float16))
    whole = made.run(moe_experts)
    for name, x in made.tensors().items():
        frozen = {other: y.detach() for other, y in made.tensors().items() if other != name}
        part = dataclasses.replace(made, **frozen)
        out = moe_experts(part.z, part.w1, part.w2, part.ids, part.p, spec=part.spec, b1=part.b1, b2=part.b2)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        assert torch.equal(torch.autograd.grad(out, [x], grad)[0], whole[name]), name


def check_repeats_and_ignores_strangers() -> None:
    """The same bits every time, and NaN in a token touches no other one and no expert that it did not choose."""
    made = leaves(case("weights on hidden rows"))
    first = made.run(moe_experts)
    assert all(torch.equal(x, y) for x, y in zip(first.values(), made.run(moe_experts).values(), strict=True))
    ids = torch.where(made.ids == 4, 3, made.ids)
    ids[0] = 4
    z = made.z.detach().clone()
    z[0] = float("nan")
    found = dataclasses.replace(made, ids=ids, z=z.requires_grad_()).run(moe_experts)
    assert found["output"][0].isnan().all() and found["output"][1:].isfinite().all()
    for name in ("w1", "w2", "b1"):
        assert found[name][4].isnan().any() and found[name][:4].isfinite().all(), name


def check_nothing_to_do() -> None:
    for tokens, choices in ((0, 2), (3, 0)):
        made = problem(ExpertSpec("silu", "half"), tokens, choices, bias=True).to(torch.float16)
        for function in (moe_experts, separate_experts):
            assert all(not x.any() for x in made.run(function).values())


def check_separate(name: str) -> None:
    """Experts that are separate tensors give the bits of stacked ones, and are stacked only if they lie oddly."""
    from s2o_inductor.kernels import cuda_moe
    from s2o_inductor.kernels.triton_moe_addresses import Addresses

    made, original, found = leaves(case(name)), cuda_moe.matrices, []
    cuda_moe.matrices = lambda given: found.append(original(given)) or found[-1]
    try:
        separate = made.run(separate_experts)
    finally:
        cuda_moe.matrices = original
    if made.z.dtype == torch.float32:
        # numpy's products in float32 depend on how their operands lie; those of float16 are exact before their sum.
        check(made, function=separate_experts)
    else:
        for what, x in made.run(moe_experts).items():
            assert torch.equal(x, separate[what]), what
    assert len(found) == 2 and sum(map(len, found)) == 2 * (2 if made.w3 is None else 3)
    odd = name in ("two tensors, odd sizes", "weights in no tiles")
    assert all(isinstance(x, Addresses) != odd for given in found for x in given)


def check_many_addresses() -> None:
    """More than one launch hands over, for an odd number of experts, of lists of which one is stacked."""
    from s2o_inductor.kernels.triton_moe_addresses import Addresses, matrices

    lists = [[torch.randn(2, 4) for _ in range(77)] for _ in range(3)]
    lists[1][5] = lists[1][5].mT.contiguous().mT
    one, stacked, other = matrices(lists)
    assert torch.equal(stacked, torch.stack(lists[1]))
    for found, tensors in ((one, lists[0]), (other, lists[2])):
        assert isinstance(found, Addresses) and found.shape == (77, 2, 4) and found.mT.stride() == (0, 1, 4)
        assert found.table.tolist() == [x.data_ptr() for x in tensors]


CHECKS: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: check(case(name))) for name in CASES},
    "nothing kept": lambda: check(case("weights on the input"), keep=False),
    **{f"random {seed}": (lambda seed=seed: check(*random_case(seed))) for seed in range(12)},
    **{f"separate: {name}": (lambda name=name: check_separate(name)) for name in CASES},
    "many addresses": check_many_addresses,
    "programs that share tiles": check_shared_tiles,
    "squares kept": check_squares_kept,
    "ways to plan": check_ways_to_plan,
    "every tile height": check_every_tile_height,
    "weights' gradients in turn": check_gradients_of_weights_in_turn,
    "only what is wanted": check_only_what_is_wanted,
    "repeats and ignores strangers": check_repeats_and_ignores_strangers,
    "nothing to do": check_nothing_to_do,
}


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreter.report_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_experts_kernels_in_the_interpreter(name: str, report: dict[str, str]) -> None:
    assert report[name] == "", report[name]


@pytest.mark.parametrize(
    ("spec", "dtype", "columns", "hidden"),
    [
        (ExpertSpec("relu2"), torch.bfloat16, 40, True), (ExpertSpec("relu"), torch.float16, 40, True),
        (ExpertSpec("relu2", score="input"), torch.bfloat16, 40, True),
        # Squares beyond the dtype's exponents, rows that no copy engine reads, and more to know than h.
        (ExpertSpec("relu2"), torch.float16, 40, False), (ExpertSpec("relu2"), torch.bfloat16, 37, False),
        (ExpertSpec("relu2", limit=1.0), torch.bfloat16, 40, False),
        (ExpertSpec("relu2", score="hidden"), torch.bfloat16, 40, False),
        (ExpertSpec("relu2", "separate"), torch.bfloat16, 80, False), (ExpertSpec("silu"), torch.bfloat16, 40, False),
    ],
)  # fmt: skip
def test_hidden_rows_are_kept_where_they_say_all(
    spec: ExpertSpec, dtype: torch.dtype, columns: int, hidden: bool
) -> None:
    from s2o_inductor.kernels import cuda_moe

    w2: Any = torch.empty(2, 24, 40)
    assert cuda_moe._keeps_hidden(cuda_moe.Operands(spec, (w2.mT,), w2, None, None, columns), dtype) == hidden


@settings(max_examples=60)
@given(tokens=st.integers(1, 100_000), choices=st.integers(1, 22), experts=st.integers(1, 600),
       width=st.integers(1, 8000), dtype=st.sampled_from((torch.bfloat16, torch.float32)),
       room=st.sampled_from((48 << 10, 227 << 10)))  # fmt: skip
def test_tiles_and_parts_fit_the_call(
    tokens: int, choices: int, experts: int, width: int, dtype: torch.dtype, room: int
) -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import cuda_moe

    facts = cuda_moe.Facts(dtype, tokens * choices, experts, 132, room)
    assert 1 <= facts.parts(width, width) <= max(1, width // 64)
    for tiles in (
        cuda_moe.first_tiles(facts, width, True), cuda_moe.second_tiles(facts, width), cuda_moe.hidden_tiles(facts),
        cuda_moe.outer_tiles(facts, width, 3 * width),
    ):  # fmt: skip
        for tile in tiles:
            for size in (tile.rows, tile.keys, tile.depth):
                assert size >= 16 and size & (size - 1) == 0
    # Shares of the gradient of p are counted in blocks of the first config's columns.
    assert len({tile.keys for tile in cuda_moe.hidden_tiles(facts)}) == 1


def main() -> None:
    from s2o_inductor import moe_ops
    from s2o_inductor.kernels import cuda_moe

    moe_ops.kernels_of = lambda device, site="": cuda_moe  # what a CUDA device would run
    interpreter.main(CHECKS)


if __name__ == "__main__":
    main()
