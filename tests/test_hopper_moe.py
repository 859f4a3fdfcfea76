"""Which products of experts Hopper's kernel takes, and that the installed Triton compiles it, which needs no GPU."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import compile_moe
import triton

from s2o_inductor.kernels import cuda_moe, hopper_moe, launching
from s2o_inductor.kernels.triton_moe_addresses import Addresses
from s2o_inductor.kernels.triton_moe_backward import Rows
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import Tile
from s2o_inductor.moe_spec import ExpertSpec

HOPPER, ROOM = (9, 0), 227 << 10
KERNELS = ("grouped_kernel", "outer_kernel")
usable = pytest.mark.skipif(hopper_moe.kernels is None, reason="this Triton has no Gluon that the kernel could use")


def facts(**fields: Any) -> cuda_moe.Facts:
    defaults = {
        "dtype": torch.bfloat16, "pairs": 4096, "experts": 8, "processors": 132, "room": ROOM, "capability": HOPPER,
    }  # fmt: skip
    return cuda_moe.Facts(**{**defaults, **fields})


@usable
@pytest.mark.parametrize("pairs", [8 * 256, 8 * 352, 8 * 3000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_taken(pairs: int, dtype: torch.dtype) -> None:
    found = facts(pairs=pairs, dtype=dtype).hopper
    assert found is not None and found.programs == 132
    assert found.stages * (found.rows + found.keys) * found.depth * dtype.itemsize < ROOM


@pytest.mark.parametrize(
    "fields",
    [
        {"capability": (8, 0)}, {"capability": (10, 0)}, {"dtype": torch.float32}, {"room": 100 << 10},
        {"pairs": 8 * 255},
    ],
)  # fmt: skip
def test_left_to_triton(fields: dict[str, Any]) -> None:
    assert facts(**fields).hopper is None


def test_operands_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each differs in one thing from operands that are taken; a launch is only counted."""
    z, w1 = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(2, 256, 64, dtype=torch.bfloat16)
    tile, nothing = facts().hopper, torch.zeros(0)
    plan: Any = None
    monkeypatch.setattr(hopper_moe, "_launch", lambda *_: True)

    def first(spec: ExpertSpec, *weights: Tensor | Addresses, bias: Tensor | None = None) -> bool:
        return hopper_moe.first(spec, weights, bias, z, plan, nothing, None, nothing[None], tile)

    def sized(*shape: int) -> Tensor:
        return torch.zeros(2, *shape, dtype=torch.bfloat16)

    table = Addresses(torch.zeros(2, dtype=torch.int64), w1[0])
    for taken in (w1, sized(64, 256).mT, sized(320, 192)):
        assert first(ExpertSpec("relu2"), taken)
    for left in (
        table, sized(256, 128)[:, :, ::2], sized(288, 64), sized(192, 64), sized(256, 96), sized(256, 68)[:, :, :64],
    ):  # fmt: skip
        assert not first(ExpertSpec("relu2"), left)
    assert not first(ExpertSpec("relu2"), w1, bias=nothing)
    assert not first(ExpertSpec("relu2", score="hidden"), w1)
    assert not first(ExpertSpec("silu", "separate"), w1, w1)
    assert not first(ExpertSpec("silu", "half"), w1)

    def second(a: list[Tensor], w: list[Any], bias: Tensor | None, parts: int) -> bool:
        return hopper_moe.second(a, w, bias, plan, torch.zeros(parts, 4, 256), tile)

    assert second([z], [w1], None, 1)
    for operands in (
        ([z], [table], None, 1),
        ([z], [w1], None, 2),
        ([z], [w1], z, 1),
        ([z, z], [w1, w1], None, 1),
    ):
        assert not second(*operands)


def test_rows_of_gradients_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each differs in one thing from what is taken; blocks lie such that as few as can be cover the gradient."""
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(hopper_moe, "try_launch", lambda *args: launched.append(args[3](None)) or True)
    tile, rows, experts = facts().hopper, torch.zeros(2000, 704, dtype=torch.bfloat16), 2
    nothing = torch.zeros(0)
    plan = Plan(1, experts, nothing, torch.zeros(2000), torch.zeros(3), {128: nothing})

    def outer(m: int, n: int, out: Any = None, of_left: Any = None, found: Tile | None = tile) -> bool:
        left, right = of_left or Rows(rows[:, :m]), Rows(rows[:, :n])
        return hopper_moe.outer(left, right, plan, torch.empty(experts, m, n) if out is None else out, found)

    for m, n, turned in ((576, 256, False), (256, 576, True), (704, 200, True), (200, 704, False), (448, 704, True)):
        assert outer(m, n) and launched[-1]["TURNED"] == turned, (m, n)
        assert (launched[-1]["LEFT"], launched[-1]["RIGHT"]) == ((n, m) if turned else (m, n))
    count = len(launched)
    assert not outer(576, 256, found=None)
    assert not outer(200, 192) and not outer(264, 264)
    assert not outer(576, 256, of_left=Rows(rows[:, :576], by_token=True))
    assert not outer(576, 256, of_left=Rows(rows[:, :576], weight=nothing))
    assert not outer(576, 256, of_left=Rows(rows[:, 4:580]))
    assert not outer(576, 256, Addresses(torch.zeros(2, dtype=torch.int64), torch.empty(576, 256)))

    def hidden(spec: ExpertSpec, by_token: bool = False, inner: int = 320) -> bool:
        grad, w2 = Rows(rows[:, :256], by_token), torch.zeros(experts, 256, inner, dtype=torch.bfloat16)
        return hopper_moe.hidden_backward(
            spec, grad, w2, plan, nothing, rows, False, rows[:, :inner], None, nothing, facts().hopper
        )  # fmt: skip

    assert hidden(ExpertSpec("silu")) and len(launched) == count + 1
    for left in (hidden(ExpertSpec("identity")), hidden(ExpertSpec("silu", "half")), hidden(ExpertSpec("silu"), True),
                 hidden(ExpertSpec("silu"), inner=328)):  # fmt: skip
        assert not left


@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed"), triton.errors.TritonError("no such layout")]
)
def test_what_does_not_compile_is_left_to_triton_and_not_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = failing_launch(error, monkeypatch)
    assert not launching.try_launch(*tried) and not launching.try_launch(*tried)
    assert len(tried[1]) == 1 and str(error) in caplog.text
    assert not launching.try_launch(*tried[:4], ("another", "kind"))
    assert len(tried[1]) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("256 GiB"), torch.AcceleratorError("illegal access")])
def test_what_is_no_fault_of_the_kernel_is_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing_launch(error, monkeypatch)
    for _ in range(2):  # what was freed since may do
        with pytest.raises(type(error)):
            launching.try_launch(*tried)
    assert len(tried[1]) == 2


def failing_launch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any], Any, Any, Any]:
    """Arguments of `try_launch`, of which the second counts how often a kernel was launched, and failed."""

    def launch(_: Any, configs: list[Any], *__: Any) -> None:
        configs.append(None)
        raise error

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "_failed", set())
    return failing_launch, [], None, None, ("a", "kind")


def compiled(spec: ExpertSpec, training: bool) -> list[dict[str, Any]]:
    """The kernel for Hopper, as often as a call compiles it."""
    shape = compile_moe.Shape(600, 2, 4, 256, 384, spec, training, 132, ROOM, 90)
    walk = (compile_moe.whole_call, shape)
    launches = compile_moe._launches_of(walk)
    jobs = [job for job in compile_moe._jobs_of([walk]) if launches[job[1]][0].__name__ in KERNELS]
    return [compile_moe.compile_one(*job) for job in jobs]


@usable
def test_compiles() -> None:
    """For sm_90: weights in both orders, hidden rows or first products kept, and all gradients."""
    cases = {(ExpertSpec("relu2"), True): 6, (ExpertSpec("silu", transposed=True), True): 5}
    # In processes of their own: what Triton compiles for is a setting of a process.
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(pool.submit(compiled, *case), count) for case, count in cases.items()]
        for future, count in futures:
            found = future.result()
            assert len(found) == count
            for kernel in found:
                assert "wgmma.mma_async" in kernel["ptx"] and "cp.async.bulk.tensor" in kernel["ptx"]
                assert kernel["shared"] <= ROOM
