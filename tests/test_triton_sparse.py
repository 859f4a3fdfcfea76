"""The sparse Triton kernels in Triton's interpreter: their choice against the reference, their result given it.

The order is exact up to bins, so outputs are compared with a replay of the kernels' own selection; see
tests/sparse_cases.py. What the interpreter cannot show, a GPU does: see tests/gpu/test_sparse_gpu.py.
"""

from __future__ import annotations

import dataclasses
import fractions
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from sparse_cases import SparseProblem, random_case, sparse_problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from s2o_inductor.kernels import reference
from s2o_inductor.kernels.reference_sparse import representatives, sparse_attention, tiles_of
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.sparse_policy import GEOMETRIES, Geometry, SparsePolicy
from s2o_inductor.testing import assert_close_to_gold

CASES: dict[str, dict[str, Any]] = {
    "stopped by the density": {"max_density": 0.4, "budgets": (0.01,)},
    "a budget for each head, one of them 0": {"budgets": (0.0, 0.3), "lengths": (300, 330), "sharpness": 4.0},
    "padding": {"batch": 2, "padded": True, "max_density": 0.5, "budgets": (0.2,), "lengths": (60, 300)},
    "window": {"window": 190, "max_density": 0.4, "lengths": (120, 420)},
    "window and padding": {"batch": 2, "padded": True, "window": 190, "lengths": (70, 420), "layout": "gaps"},
    "documents": {"packed": "in a row", "max_density": 0.5, "lengths": (300, 640), "batch": 2},
    "documents of whole tiles": {"packed": "tiles", "budgets": (0.3,), "lengths": (160, 640)},
    "documents that come back, padding and a window": {
        "packed": "again", "padded": True, "window": 300, "batch": 2, "max_density": 0.5, "lengths": (260, 520),
    },
    "not causal": {"causal": False, "max_density": 0.3, "lengths": (130, 340)},
    "groups of four, widths apart": {
        "heads": (4, 1), "widths": (40, 72), "budgets": (0.5,), "lengths": (60, 300), "layout": "every_other",
    },
    "float32": {"dtype": torch.float32, "max_density": 0.4},
    "float32, runs longer than a step": {
        "dtype": torch.float32, "geometry": Geometry(bundle=64, sink=64, block=64, run=64), "lengths": (20, 330),
        "max_density": 0.5,
    },
    "float32, all representatives of few tiles": {
        "dtype": torch.float32, "widths": (144, 16), "heads": (8, 1), "lengths": (20, 330), "max_density": 0.4,
        "geometry": Geometry(bundle=64, sink=64, block=64, tile=32),
    },
    "blocks of 16": {
        "geometry": Geometry(tile=32, sink=16, bundle=64, sub_means=4, run=4, block=16, clusters=2),
        "lengths": (70, 170), "max_density": 0.5,
    },
    "blocks larger than a tile, single keys": {
        "geometry": Geometry(tile=32, bundle=64, sink=0, block=64, run=1), "lengths": (140, 301), "max_density": 0.5,
    },
    "no sinks, one mean": {
        "geometry": Geometry(bundle=64, sink=0, block=128, sub_means=1, limit=0.1),
        "lengths": (30, 300), "max_density": 0.5,
    },
    "the sizes of CUDA": {"geometry": GEOMETRIES["cuda"], "lengths": (100, 1124), "max_density": 0.3},
    "the sizes of CUDA with sinks, padding": {
        "geometry": dataclasses.replace(GEOMETRIES["cuda"], sink=512, bundle=64), "padded": True, "batch": 2,
        "heads": (1, 1), "lengths": (20, 1044), "max_density": 0.3,
    },
    "all in the dense part": {"lengths": (5, 40)},
    "fewer queries than means": {"lengths": (3, 400), "max_density": 0.3},
    "negative scale": {"scale": -0.3, "max_density": 0.3, "lengths": (128, 320)},
    "scale zero": {"scale": 0.0, "max_density": 0.3, "lengths": (128, 320)},
    "rounded keys": {"widths": (64, 16), "max_density": 0.4, "lengths": (140, 420)},
    "rounded keys far from 0, padding and a window": {
        "widths": (64, 16), "offset": 20.0, "padded": True, "window": 230, "lengths": (120, 420), "max_density": 0.4,
    },
    "rounded keys in blocks of 16": {
        "widths": (64, 16), "offset": 20.0, "lengths": (70, 170), "max_density": 0.5,
        "geometry": Geometry(tile=32, sink=16, bundle=64, sub_means=4, run=4, block=16, clusters=8),
    },
    "rounded keys in blocks larger than a tile, documents": {
        "widths": (128, 16), "packed": "in a row", "lengths": (300, 640), "max_density": 0.5,
        "geometry": Geometry(bundle=64, sink=256, block=256, clusters=16, rounds=2),
    },
    "rounded keys of no block": {"widths": (64, 16), "lengths": (5, 40)},
    "more than a segment of keys": {"lengths": (20, 4700), "max_density": 0.05, "heads": (1, 1)},
}  # fmt: skip


def check_exact_products(**fields: Any) -> None:
    """The same with keys as they are, where they could be rounded."""
    from s2o_inductor.kernels import triton_sparse_order

    with mock.patch.object(triton_sparse_order, "FLOAT8", False):
        case = sparse_problem(**fields)
        assert case.ranking().k.dtype == case.k.dtype and not case.ranking().arguments["FLOAT8"]
        case.check()


def check_ranges(**fields: Any) -> None:
    """Tiles worked on one at a time give what all at once do, bit for bit: nothing depends on how work is laid out."""
    case = sparse_problem(max_density=0.4, **fields)
    whole, parts = case.run(), case.run(workspace_bytes=1)
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(whole, field.name), getattr(parts, field.name)), field.name


def check_chunks(**fields: Any) -> None:
    """A prefill in chunks of whole tiles gives what it does at once."""
    case = sparse_problem(lengths=(320, 320), max_density=0.4, **fields)
    whole = case.run()
    first = dataclasses.replace(case, q=case.q[:, :, :128], k=case.k[:, :, :128], v=case.v[:, :, :128]).run()
    second = dataclasses.replace(case, q=case.q[:, :, 128:]).run()
    assert torch.equal(torch.cat([first.output, second.output], dim=2), whole.output)
    assert torch.equal(torch.cat([first.lse, second.lse], dim=2), whole.lse)
    assert torch.equal(torch.cat([first.bundles, second.bundles], dim=2), whole.bundles)


def check_future() -> None:
    """Keys and values that come after a tile change nothing in it, its choice included."""
    case = sparse_problem(lengths=(300, 300), max_density=0.4)
    changed = dataclasses.replace(case, k=case.k.clone(), v=case.v.clone())
    changed.k[:, :, 256:] *= -3
    changed.v[:, :, 256:] += 1
    first, second = case.run(), changed.run()
    assert torch.equal(first.output[:, :, :256], second.output[:, :, :256])
    assert not torch.equal(first.output[:, :, 256:], second.output[:, :, 256:])


def check_explicit_table() -> None:
    """A caller's table in any order; all of it read is exact attention, half of it what the replay says."""
    from s2o_inductor.kernels import cuda_sparse

    case = sparse_problem(lengths=(150, 300), budgets=(1e-9,))
    table, listed = case.order()
    for row, count in zip(table.view(-1, table.shape[3]), listed.flatten().tolist(), strict=True):
        row[:count] = row[torch.randperm(count, generator=torch.Generator().manual_seed(3))]
    options = {**case.options, "budgets": (0.0,)}
    result = cuda_sparse.attend(case.q, case.k, case.v, table[..., : int(listed.max())], listed, **options)
    visible = torch.ones(150, 300, dtype=torch.bool).tril(150)
    gold, _ = reference.attention(case.q.double(), case.k.double(), case.v.double(), visible=visible)
    low, _ = reference.attention(case.q, case.k, case.v, visible=visible)
    assert_close_to_gold(result.output, low, gold)
    assert torch.equal(result.pairs, result.visible)
    half = listed // 2
    part = cuda_sparse.attend(case.q, case.k, case.v, table, half, **options)
    dataclasses.replace(case, budgets=(1e-9,)).check_replay(part, table, half)


def check_representatives(**fields: Any) -> None:
    """Queries of a few kinds, one in seven in the part of another kind: each mean is of one kind, all of it."""
    case = sparse_problem(**fields)
    group, sub = case.q.shape[1] // case.k.shape[1], case.geometry.sub_means
    of_kind = 20 * torch.randn(sub, case.q.shape[3], generator=torch.Generator().manual_seed(5))
    before, expected = case.k.shape[2] - case.q.shape[2], []
    for start, end in tiles_of(case.q.shape[2], case.k.shape[2], case.geometry.tile):
        parts = torch.arange(end - start).tensor_split(min(sub, end - start))
        kind = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])
        kind[::7] = kind[::7].flip(0)
        q = case.q[:, :, start - before : end - before]
        q.copy_(of_kind[kind] + q / 8)
        expected.append(torch.stack([q[0, :, kind == i].double().mean(dim=1) for i in range(len(parts))], dim=1))
        torch.testing.assert_close(representatives(q[0].double(), case.geometry), expected[-1])
    actual, eps = case.representatives(case.ranking()), torch.finfo(case.q.dtype).eps
    for t, means in enumerate(expected):
        found = actual[0, :, t, :group, : means.shape[1]].flatten(0, 1)
        torch.testing.assert_close(found.double(), means, rtol=2 * eps, atol=2 * eps)


def check_heavy_tail(nothing_else: bool) -> None:
    """A tail of far more mass than what was read, or of all mass there is: its scores overflow or vanish beside that.

    The keys [64, 128) are in the prefix of both tiles, of which nothing is listed.
    """
    from s2o_inductor.kernels import cuda_sparse

    case = sparse_problem(lengths=(128, 320), budgets=(1e-9,))
    case.q = case.q + 4
    case.k[:, :, 64:128] += -20 if nothing_else else 2  # each 1 is 16 nats of the scores
    if nothing_else:
        at = torch.arange(320)
        case.keys = ((at >= 64) & (at < 128))[None]
    table, listed = case.order()
    options = {**case.options, "budgets": (1e-9,)}
    result = cuda_sparse.attend(case.q, case.k, case.v, table, 0 * listed, **options)
    without = {**options, "geometry": dataclasses.replace(case.geometry, clusters=0)}
    dropped = cuda_sparse.attend(case.q, case.k, case.v, table, 0 * listed, **without)
    assert (result.lse - dropped.lse > 12).all() and (result.lse < -110).all() == nothing_else
    case.check_replay(result, table, 0 * listed)


def check_marked_halves() -> None:
    """What Hopper's kernel leaves of a tail: halves of tiles that it marks get theirs, others keep what they have."""
    case = sparse_problem(lengths=(128, 576), max_density=0.4)  # the second half of a tile, and the first of the next

    def left(*marks: int) -> Tensor:
        """The output with these marks of each tile's halves."""
        halves = torch.tensor(marks, dtype=torch.int8).expand(1, 2, 2, 2).contiguous()
        with mock.patch("s2o_inductor.kernels.hopper_sparse.tail", return_value=halves):
            return case.run().output

    found, without, whole = left(0, 1), left(0, 0), case.run().output
    assert torch.equal(found[:, :, 64:], without[:, :, 64:])
    assert_close_to_gold(found[:, :, :64], whole[:, :, :64], whole[:, :, :64].double(), what="marked half")
    assert (without != whole).any(dim=3).float().mean() > 0.9


def check_rounded_variances() -> None:
    """Over units of their own they fit float8, whatever they are; here in float16, which the interpreter rounds to."""
    from s2o_inductor.kernels.launching import Config, launch
    from s2o_inductor.kernels.triton_sparse_tail import round_kernel

    x = torch.randn(45, 64).square() * torch.logspace(-36, 36, 45)[:, None]
    x[7], x[8, 3], x[9, 5] = 0.0, float("inf"), float("nan")
    rounded, units = torch.empty(45, 64, dtype=torch.float16), torch.empty(45)
    arguments = {"x_ptr": x, "rounded_ptr": rounded, "units_ptr": units, "rows": 45, "D": 64}
    launch(round_kernel, [Config(32, 0, 4, 1)], lambda _: 2, lambda _: arguments)
    assert (units.log2() == units.log2().round()).all() and not rounded[7].any()
    usual = x.isfinite().all(dim=1) & (x.amax(dim=1) > 1e-30) & (x.amax(dim=1) < 1e30)
    most = rounded[usual].amax(dim=1)
    assert usual.sum() > 30 and (most >= 128).all() and (most <= 256).all()
    apart = (rounded.float() * units[:, None] - x)[usual].abs()
    assert (apart <= 1e-3 * x[usual] + 1e-7 * units[usual, None]).all()


def check_budgets_are_monotone() -> None:
    """A smaller budget never reads less; budget 0 is exact attention, whatever the density."""
    case = sparse_problem(lengths=(100, 320), max_density=0.3)
    read = [dataclasses.replace(case, budgets=(b,), max_density=1.0).run().bundles for b in (0.9, 0.3, 1e-9)]
    assert all((a <= b).all() for a, b in itertools.pairwise(read)) and (read[0] < read[-1]).any()
    exact = dataclasses.replace(case, budgets=(0.0,)).run()
    full = sparse_attention(case.q.double(), case.k.double(), case.v.double(), budgets=(0.0,), geometry=case.geometry)
    low = sparse_attention(case.q, case.k, case.v, budgets=(0.0,), geometry=case.geometry)
    assert_close_to_gold(exact.output, low.output, full.output)
    assert torch.equal(exact.bundles, full.bundles) and not exact.tail.any()


def check_documents() -> None:
    """One document is no document; of two of whole tiles each gives what it gives alone, bit for bit."""
    case = sparse_problem(lengths=(384, 384), max_density=0.4)
    whole = case.run()
    one = dataclasses.replace(case, documents=(torch.full((1, 384), 7),) * 2).run()
    two = dataclasses.replace(case, documents=((torch.arange(384) // 128 > 0)[None].long(),) * 2).run()
    behind = dataclasses.replace(case, q=case.q[:, :, 128:], k=case.k[:, :, 128:], v=case.v[:, :, 128:]).run()
    for name in ("output", "lse", "bundles"):
        first, last = getattr(two, name), getattr(behind, name)
        rows = last.shape[2]
        assert torch.equal(getattr(one, name), getattr(whole, name)), name
        assert torch.equal(first[:, :, -rows:], last), name
        assert torch.equal(first[:, :, :-rows], getattr(whole, name)[:, :, :-rows]), name


def check_poisoned_blocks() -> None:
    """NaN in keys behind the prefix of a tile, which the programs that rank it pass by, does not change its order."""
    case = sparse_problem(lengths=(640, 640), widths=(64, 16), max_density=0.4)
    changed = dataclasses.replace(case, k=case.k.clone())
    changed.k[:, :, 512:] = float("nan")
    clean, other = case.order()[0], changed.order()[0]
    assert (clean[:, :, 3] >= 0).any() and torch.equal(clean[:, :, :4], other[:, :, :4])


def check_other_documents() -> None:
    """Keys of the document before change no row, and their NaN none of a tile without a row of it."""
    ids = (torch.arange(512) >= 200).long()[None]
    case = sparse_problem(lengths=(512, 512), max_density=0.4, heads=(1, 1), documents=(ids, ids))
    clean = case.run()
    with mock.patch("torch.empty", torch.zeros):  # bins of 0 come first: none that was not written is read
        assert torch.equal(case.run().output, clean.output)
    for own in (0, 1):
        other = (ids != own)[:, None, :, None]
        for poison in (-3.0, float("nan")):
            changed = dataclasses.replace(
                case, k=case.k.masked_fill(other, poison), v=case.v.masked_fill(other, poison)
            )
            rows = ids[0] == own
            if poison != poison:  # 0 times NaN: keys of a tile are multiplied with all of its rows
                rows &= (torch.arange(512) < 128) | (torch.arange(512) >= 256)
            assert torch.equal(changed.run().output[:, :, rows], clean.output[:, :, rows]), (own, poison)


CHECKS: dict[str, Callable[[], Any]] = {
    **{name: (lambda fields=fields: sparse_problem(**fields).check()) for name, fields in CASES.items()},
    **{f"random {seed}": (lambda seed=seed: random_case(seed).check()) for seed in range(4)},
    "tiles in ranges": check_ranges,
    "prefill in chunks": check_chunks,
    "rounded keys, tiles in ranges": lambda: check_ranges(widths=(64, 16)),
    "rounded keys, prefill in chunks": lambda: check_chunks(widths=(64, 16), offset=20.0),
    "rounded keys, NaN in later blocks": check_poisoned_blocks,
    "keys that could be rounded": lambda: check_exact_products(widths=(64, 16), max_density=0.4, lengths=(60, 420)),
    "no look into the future": check_future,
    "documents by themselves": check_documents,
    "no look into other documents": check_other_documents,
    "a table of the caller's": check_explicit_table,
    "means of like queries": lambda: check_representatives(heads=(3, 1), lengths=(300, 300)),
    "means of like queries, float32": lambda: check_representatives(
        heads=(4, 2), lengths=(130, 300), dtype=torch.float32, widths=(40, 16), geometry=Geometry(sub_means=16)
    ),
    "a tail that outweighs the rest": lambda: check_heavy_tail(False),
    "a tail and nothing else": lambda: check_heavy_tail(True),
    "halves that are left": check_marked_halves,
    "rounded variances": check_rounded_variances,
    "budgets are monotone, 0 is exact": check_budgets_are_monotone,
}


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreter.report_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_sparse_kernels_in_the_interpreter(name: str, report: dict[str, str]) -> None:
    assert report[name] == "", report[name]


def test_ranges_cover_all_tiles_and_fit_the_workspace() -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import cuda_sparse, triton_sparse_order
    from s2o_inductor.kernels.triton_sparse_tiles import Tiling

    density = fractions.Fraction(1, 10)
    for queries, keys, window in ((131_072, 131_072, None), (70_000, 131_072, 4096), (5, 131_072, None), (9, 9, None)):
        tiling = Tiling(queries, keys, True, window, GEOMETRIES["cuda"])
        for most in (1, 64 << 20, 1 << 40):
            found = sorted(cuda_sparse.ranges(tiling, density, 8, 4, most))
            assert [tile for first, count in found for tile in range(first, first + count)] == [*range(tiling.count)]
            assert len(found) == 1 or most < 1 << 40
            for first, count in found:
                assert count == 1 or 8 * count * triton_sparse_order.row_bytes(tiling, first, count, density, 4) <= most


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_of_scores_take_whole_tiles_and_little_memory(dtype: torch.dtype) -> None:
    """The last configuration fits a Hopper: exact products hold every operand in shared memory, in float32."""
    pytest.importorskip("triton")
    from s2o_inductor.kernels import triton_sparse_order as ordering
    from s2o_inductor.kernels.launching import block_width

    for tile in (16, 32, 64, 128):
        assert all(tile % config.rows == 0 for config in ordering.representatives_configs(dtype, tile))
    for make, width in itertools.product((ordering.masses_configs, ordering.scores_configs), (16, 64, 128, 192, 256)):
        most = 64 if dtype == torch.float32 and width > 128 else 128
        for means in (1 << n for n in range(most.bit_length())):
            configs = make(dtype, width, means)
            assert configs and all(config.rows % means == 0 for config in configs)
            last = configs[-1]
            # Representatives, their squares and the means and variances of 32 groups, or of BN.
            numbers = 2 * (last.rows + max(32, last.keys)) * block_width(width)
            assert numbers * dtype.itemsize <= 232_448 - 32 * 1024, (make.__name__, width, means, last)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "rounded"),
    [
        ((9, 0), torch.bfloat16, 128, True), ((10, 0), torch.float16, 64, True), ((8, 9), torch.bfloat16, 128, False),
        ((8, 0), torch.float16, 256, False), ((9, 0), torch.float32, 128, False), ((9, 0), torch.bfloat16, 192, False),
    ],
)  # fmt: skip
def test_keys_are_rounded_where_that_is_faster(
    capability: tuple[int, int], dtype: torch.dtype, width: int, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import triton_sparse_order as ordering

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        k = torch.empty(2, 3, 600, width, dtype=dtype, device="cuda")
        assert ordering.in_float8(k) == rounded
        monkeypatch.setattr(ordering, "FLOAT8", False)
        assert not ordering.in_float8(k)


def problem_with(**fields: Any) -> SparseProblem:
    return dataclasses.replace(sparse_problem(lengths=(20, 30)), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budgets": (0.1, 0.2, 0.3)}, "one or 2 numbers"),
        ({"budgets": (-0.1,)}, "at least 0"),
        ({"max_density": 0.0}, r"max_density must be in \(0, 1\]; got 0.0"),
        ({"window": 3, "causal": False}, "a window goes with causal"),
        ({"keys": torch.ones(1, 29, dtype=torch.bool)}, r"keys must be bool \(1, 30\)"),
        ({"k": torch.zeros(1, 1, 10, 16, dtype=torch.float16), "v": torch.zeros(1, 1, 10, 16, dtype=torch.float16)},
         "as many keys as queries; got 20 and 10"),
        ({"documents": (torch.zeros(1, 20).int(), torch.zeros(1, 20).int())}, r"\(1, 20\) and \(1, 30\)"),
        ({"q": torch.zeros(1, 2, 20, 16, dtype=torch.float64)}, "got torch.float64"),
        ({"v": torch.zeros(1, 2, 30, 16, dtype=torch.float16)}, "Hq a multiple of Hkv"),
        ({"geometry": Geometry(tile=96, sink=0, block=32)}, "tile of a power of two, 16 to 128; got 96"),
        ({"geometry": Geometry(bundle=104)}, "multiple of 64 keys; got 104"),
        ({"v": torch.zeros(1, 1, 30, 300, dtype=torch.float16)}, "wider than 256: 300"),
        ({"q": torch.zeros(1, 65, 20, 16, dtype=torch.float16)}, "65 query heads of a key/value head"),
        ({"q": torch.zeros(1, 12, 20, 192), "k": torch.zeros(1, 1, 30, 192), "v": torch.zeros(1, 1, 30, 16)},
         "12 query heads of a key/value head times 8 sub-means are over 64 for torch.float32 heads of"),
        ({"geometry": Geometry(clusters=3)}, "power of two up to 16, or 0; got 3"),
        ({"geometry": Geometry(clusters=0)}, "clusters must be at least 1 here; got 0"),
        ({"geometry": Geometry(block=1024, sink=0)}, "from 16 to 512 keys; got 8 and 1024"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=message):
        problem_with(**fields).run()


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "route", "reason"),
    [
        (8, 64, torch.float16, "triton", None),
        (130, 64, torch.float16, "triton", None),  # 65 of each key/value head, with one mean query each
        (260, 64, torch.float16, "triton", "130 query heads of a key/value head"),
        (128, 256, torch.float32, "triton", None),
        (130, 256, torch.float32, "triton", "65 query heads of a key/value head times 1 sub-means are over 64"),
        (8, 264, torch.float16, "triton", "wider than 256: 264"),
        (8, 64, torch.float16, "math", "no Triton kernel"),
    ],
)
def test_what_the_kernels_do_not_take_stays_dense(
    heads: int, width: int, dtype: torch.dtype, route: str, reason: str | None
) -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import cuda_sparse, dense, sparse

    call = dense.Call.of(
        *torch.zeros(3, 1, 2, 600, 16), mask=None, leaves=(), plan=(), params=(), sinks=None, seed=None,
        spec=MaskSpec(upper="0"), scale=0.25, dropout_p=0.0,
    )  # fmt: skip
    call = dataclasses.replace(call, route=route)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, n, 600, width, dtype=dtype, device="cuda") for n in (heads, 2, 2))
        why = sparse.why_dense(call, q, k, v, SparsePolicy((0.5,)))
    assert why is None if reason is None else why is not None and reason in why
    assert sparse._kernel("cuda") is cuda_sparse.forward


@pytest.mark.parametrize("shape", [(1, 1, 2, 64), (1, 2, 1, 64)])
def test_a_table_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    from s2o_inductor.kernels import cuda_sparse

    case = sparse_problem(lengths=(20, 30))
    table: Tensor = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must be int32 \(1, 1, 1, 'places'\)"):
        cuda_sparse.attend(case.q, case.k, case.v, table, table[..., 0])


if __name__ == "__main__":
    interpreter.main(CHECKS)
