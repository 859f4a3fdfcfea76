"""Ways to run the kernels of routed experts: what `bench_moe_gpu.py --sweep` tries."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from s2o_inductor.kernels import cuda_moe, hopper_moe, triton_moe_backward, triton_moe_first, triton_moe_second
from s2o_inductor.kernels.moe_cpu import Experts
from s2o_inductor.kernels.triton_moe_backward import Rows
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import Tile, rows_like

if TYPE_CHECKING:
    from bench_moe_gpu import Call
    from compile_moe import Shape, Walk


def stages_of(call: Call, processors: int) -> dict[str, Callable[[Tile, int], None]]:
    """Each kernel of a call by itself, as a function of its tile and the parts of its sum."""
    spec, pairs = call.model.spec, call.ids.numel()
    experts = Experts.of(spec, call.w1, call.w2, None, None, None)
    plan, p = Plan.of(call.ids, call.w1.shape[0], 16), call.p.view(-1)
    h, pre = rows_like(call.z, pairs, call.model.inner), rows_like(call.z, pairs, experts.columns)
    rows, x, dw = Rows(pre), Rows(call.z, by_token=True), torch.empty_like(call.w1)
    entered, kept = Rows(rows_like(call.z, pairs, call.z.shape[1])), spec.activation == "relu2"

    def second(tile: Tile, parts: int, a: Tensor, w: Tensor) -> None:
        kind = torch.float32 if parts > 1 else torch.bfloat16
        y = torch.empty(parts, pairs, w.shape[1], dtype=kind, device=call.z.device)
        triton_moe_second.second([a], [w], None, plan, y, [tile])

    def hopper_second(tile: Tile, a: Tensor, w: Tensor) -> None:
        y = torch.empty(1, pairs, w.shape[1], dtype=torch.bfloat16, device=call.z.device)
        assert hopper_moe.second([a], [w], None, plan, y, tile)

    def hopper_first(tile: Tile) -> None:
        assert hopper_moe.first(spec, experts.w1, None, call.z, plan, p, None, h, tile)

    def hidden(tile: Tile, parts: int) -> None:
        share = torch.empty(pairs, -(-call.model.inner // tile.keys), device=call.z.device)
        where = (pre, call.model.inner, h, share)
        # In parts 2 the rows are gathered before.
        grad = Rows(call.z, by_token=True) if parts == 1 else Rows(x)
        triton_moe_backward.hidden_backward(spec, grad, call.w2, plan, p, pre, False, *where, [tile])

    def hopper_hidden(tile: Tile) -> None:
        share = torch.empty(pairs, -(-call.model.inner // tile.keys), device=call.z.device)
        where = (pre, None, share) if kept else (pre, h, share)
        assert hopper_moe.hidden_backward(spec, entered, call.w2, plan, p, pre, kept, *where, tile)

    def hopper_dw(tile: Tile) -> None:
        assert hopper_moe.outer(rows, entered, plan, dw, tile)

    return {
        "first": lambda tile, parts: triton_moe_first.first(spec, experts.w1, None, call.z, plan, p, None, h, [tile]),
        "second": lambda tile, parts: second(tile, parts, h, call.w2),
        "hidden": hidden,
        "dx": lambda tile, parts: second(tile, parts, pre, call.w1.mT),
        "first, Hopper": lambda tile, parts: hopper_first(tile),
        "second, Hopper": lambda tile, parts: hopper_second(tile, h, call.w2),
        "dx, Hopper": lambda tile, parts: hopper_second(tile, pre, call.w1.mT),
        "hidden, Hopper": lambda tile, parts: hopper_hidden(tile),
        "dw, Hopper": lambda tile, parts: hopper_dw(tile),
        "dw": lambda tile, parts: triton_moe_backward.outer(rows, x, plan, dw, [tile], processors),
    }


def tiles_to_try(facts: cuda_moe.Facts, gated: bool) -> dict[str, list[tuple[Tile, int]]]:
    """For each kernel, tiles and the parts into which its sum is cut."""
    if facts.height <= 32:
        heights = (16, 32) if facts.height == 32 else (16,)
        low = [
            Tile(rows, columns, warps, stages, depth, 4)
            for rows in heights
            for columns, depth in ((32, 128), (32, 256), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128))
            for warps, stages in ((4, 3), (4, 5), (8, 3), (2, 4))
        ]
        return {
            "first": [(tile, 1) for tile in low],
            "second": [
                (tile, parts)
                for tile in [*low, *(dataclasses.replace(tile, programs=2 * facts.processors) for tile in low[::4])]
                for parts in ((1, 2, 4) if facts.pairs < 500 else (1,))
            ],
        }
    shapes = [(64, 128, 4), (64, 256, 4), (64, 256, 8), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)]
    tiles = [Tile(*shape, stages, 64, group) for shape in shapes for stages in (3, 4) for group in (2, 8)]
    tiles += [Tile(128, 128, 4, 2), Tile(128, 64, 4, 3), Tile(128, 64, 4, 4), Tile(64, 64, 4, 4)]
    tiles += [Tile(128, 128, 4, 5, depth=32), Tile(128, 128, 4, 6, depth=32), Tile(128, 256, 8, 6, depth=32)]
    if facts.height == 64:
        tiles += [Tile(32, 128, 4, 4), Tile(32, 128, 4, 4, depth=128), Tile(32, 64, 4, 4, depth=128)]
    tiles = [tile for tile in tiles if tile.rows <= 2 * facts.height]
    first = [t for t in tiles if t.keys <= 128] if gated else tiles
    backward = [t for t in tiles if t.group == 8 and t.rows >= 64]
    deep = [Tile(128, 128, 8, 3, 32), Tile(128, 256, 8, 4, 32), Tile(256, 128, 8, 4, 32)]
    shared = [Tile(128, 256, 8, stages, 64, group, facts.processors) for stages in (3, 4) for group in (2, 8)]
    shared += [Tile(256, 128, 8, 3, 64, 8, facts.processors), Tile(128, 128, 4, 3, 64, 8, 2 * facts.processors)]
    narrow = [dataclasses.replace(tile, keys=tile.keys // 2) for tile in shared] if gated else shared
    found = {"first": first + narrow, "second": tiles + shared, "dx": backward + shared}
    found["dw"] = backward + deep
    found["hidden"] = [t for t in backward if t.keys <= 128] + [Tile(128, 64, 8, 3), Tile(128, 64, 8, 4)]
    if facts.hopper is not None:
        ways = [
            dataclasses.replace(facts.hopper, group=group, stages=stages) for group in (2, 3, 8) for stages in (3, 4)
        ]
        grouped = ("second", "dx") if gated else ("first", "second", "dx", "hidden")
        found |= {f"{kernel}, Hopper": ways for kernel in grouped} | {"dw, Hopper": [facts.hopper]}
    return {kernel: [(tile, 1) for tile in kinds] for kernel, kinds in found.items()}


def sweep_stage(shape: Shape, kernel: str, tile: Tile, parts: int) -> None:
    """One way to run a kernel, on tensors of the host: for `compile_moe`, which notes what is launched."""
    from bench_moe_gpu import Call, Model

    model = Model(shape.experts, shape.choices, shape.width, shape.inner, shape.spec)
    w1 = torch.empty(shape.experts, shape.spec.halves * shape.inner, shape.width, dtype=torch.bfloat16)
    w2 = torch.empty(shape.experts, shape.width, shape.inner, dtype=torch.bfloat16)
    z = torch.empty(shape.tokens, shape.width, dtype=torch.bfloat16)
    ids = torch.zeros(shape.tokens, shape.choices, dtype=torch.int64)
    stages_of(Call(model, z, w1, w2, ids, torch.empty(ids.shape)), shape.processors)[kernel](tile, parts)


def sweep_walks(shape: Shape) -> list[Walk]:
    """What `sweep` runs, for `compile_moe.compiling`."""
    tries = tiles_to_try(shape.facts, shape.spec.halves > 1)
    return [(sweep_stage, shape, kernel, *way) for kernel, ways in tries.items() for way in ways]


def fits(run: Callable[[], Any]) -> Any:
    """What `run` gives, or None where a kernel needs more shared memory than there is."""
    import triton

    try:
        return run()
    except triton.runtime.errors.OutOfResources:
        return None


def sweep(call: Call, facts: cuda_moe.Facts, measure: Callable[..., float]) -> list[dict[str, Any]]:
    """What ordering and combining take, and the best ways to run each kernel of one call, fastest first."""
    experts, rows_each = call.w1.shape[0], facts.height
    plan = Plan.of(call.ids, experts, rows_each)
    y = torch.randn(1, call.ids.numel(), call.model.width, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(call.z)
    rows: list[dict[str, Any]] = [
        {"kernel": "plan", "us": measure(lambda: Plan.of(call.ids, experts, rows_each).tiles(rows_each))},
        {"kernel": "combine", "us": measure(lambda: triton_moe_second.combine(y, call.p.view(-1), plan, out))},
    ]
    stages = stages_of(call, facts.processors)
    for kernel, tries in tiles_to_try(facts, call.model.spec.halves > 1).items():
        found = []
        for tile, parts in tries:
            us = fits(lambda: measure(lambda: stages[kernel](tile, parts), 30.0))  # noqa: B023 - called at once
            if us is not None:
                found.append({"kernel": kernel, "us": us, **dataclasses.asdict(tile), "parts": parts})
        rows += sorted(found, key=lambda row: row["us"])[:5]
    return rows
