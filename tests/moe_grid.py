"""Prints what becomes of each way to write a mixture of experts: python tests/moe_grid.py

One row per idiom of `moe_idioms.py`, in inference and in training: rewritten, prepared or declined with the reason; the
largest error against float64 over the largest value, ours and the original's; nodes of the captured graph before
and after; seconds of the first call, under s2o and under Inductor. `--unrolled E` measures a captured loop over E
experts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import moe_idioms
import torch
from capture import capture_all
from torch import Tensor, nn

import s2o_inductor
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import pipeline
from s2o_inductor.report import GraphReport

OPTIONS = {"experts": True}


def values(model: nn.Module, x: Tensor, call: Callable[..., Any]) -> list[Tensor]:
    """The output and, in training, the gradient of the input."""
    x = x.clone().requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        result = call(x)
    y: Tensor = result[0] if isinstance(result, tuple) else result
    return [y.detach(), *(torch.autograd.grad(y.square().sum(), [x]) if model.training else ())]


def error(actual: list[Tensor], gold: list[Tensor]) -> float:
    return max(float((a.double() - g).abs().max() / g.abs().max()) for a, g in zip(actual, gold, strict=True))


def nodes(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """Nodes of all captured graphs before and after the rewrite, and how many graphs there are."""
    with torch.set_grad_enabled(model.training):
        graphs = [gm for gm, _ in capture_all(model, x)]
    before = sum(len(gm.graph.nodes) for gm in graphs)
    for gm in graphs:
        pipeline.rewrite_dynamo_graph(gm, S2OConfig(experts=True), GraphReport())
    after = sum(len(gm.graph.nodes) for gm in graphs)
    return (f"{before} in {len(graphs)}" if len(graphs) > 1 else str(before)), str(after)


def first_call(model: nn.Module, x: Tensor, backend: str, **how: Any) -> tuple[float, Callable[..., Any]]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, **how)
    start = time.perf_counter()
    values(model, x, compiled)
    return time.perf_counter() - start, compiled


def row(name: str, layer: type[nn.Module], training: bool, loop: bool, timed: bool, **sizes: int) -> str:
    torch.manual_seed(0)
    model = layer(**sizes).train(training)
    x = torch.randn(4, 16, 24)
    gold_model = copy.deepcopy(model).double()
    gold, original = values(gold_model, x.double(), gold_model), values(model, x, model)
    try:
        inductor = f"{first_call(model, x, 'inductor')[0]:.1f}" if timed else ""
    except Exception as failure:  # not ours: the idiom does not compile
        inductor = type(failure).__name__
    before, _ = nodes(model, x)
    prepared = s2o_inductor.prepare(model) if loop else None
    _, after = nodes(model, x)
    seconds, compiled = first_call(model, x, "s2o", options=OPTIONS if timed else {**OPTIONS, "inner": "aot_eager"})
    ours = error(values(model, x, compiled), gold)
    sites = [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe"]
    what = (
        "; ".join(f"{site['status']}{': ' + site['reason'] if site['reason'] else ''}" for site in sites) or "not found"
    )
    if prepared is not None:
        what = "; ".join("prepared" if not entry.reason else f"declined: {entry.reason}" for entry in prepared.entries)
    return (
        f"| {name} | {'training' if training else 'inference'} | {what} | {ours:.0e} / {error(original, gold):.0e} | "
        f"{before} -> {after} | {f'{seconds:.1f} / {inductor}' if timed else '-'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unrolled", type=int, nargs="+", metavar="E", help="a loop over E experts, alone")
    parser.add_argument("--only", nargs="+", metavar="IDIOM")
    parser.add_argument("--untimed", action="store_true", help="no code generation, no times")
    arguments = parser.parse_args()
    timed = not arguments.untimed
    if timed:  # the first compilation of a process also looks at the machine
        torch.compile(lambda x: x + 1)(torch.ones(8))
    torch._inductor.config.force_disable_caches = True
    print(
        "| idiom | | what happens | error, s2o / original | nodes | first call, s |\n|---|---|---|---|---|---|",
        flush=True,
    )
    # With this, Dynamo captures whole loops over all experts, one branch per expert.
    whole = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    for number in arguments.unrolled or ():
        for training in (False, True):
            with whole:
                name = f"every expert, captured, E={number}"
                print(row(name, moe_idioms.EveryExpert, training, False, timed, experts=number), flush=True)
    if arguments.unrolled:
        return
    unrolled = {f"{name}, captured": layer for name, layer in moe_idioms.UNROLLED.items()}
    groups = (moe_idioms.CAPTURED, False), (unrolled, False), (moe_idioms.DECLINED, False), (moe_idioms.LOOPS, True)
    for idioms, loop in groups:
        for name, layer in idioms.items():
            for training in (False, True):
                if not arguments.only or name in arguments.only:
                    with whole if idioms is unrolled else contextlib.nullcontext():
                        print(row(name, layer, training, loop, timed), flush=True)


if __name__ == "__main__":
    main()
