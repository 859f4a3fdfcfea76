"""What a report says about the sizes of routed experts, found by a pass or put there by `s2o_inductor.prepare`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from s2o_inductor import moe_list_ops  # noqa: F401  registers the operator of separate experts
from s2o_inductor.moe_spec import ExpertSpec, parse
from s2o_inductor.passes.graph_utils import fake

# How the names end under which prepared modules call the operators.
PREPARED = "@prepared"
_CALLS = (torch.ops.s2o.moe_experts, torch.ops.s2o.moe_experts_list)


def experts_shape(tokens: Tensor, ids: Tensor, experts: int, w2: Tensor, spec: ExpertSpec) -> dict[str, Any]:
    """Sizes, symbolic ones as text, dtype, device and formula; w2 is (..., l, I)."""
    sizes = {
        "tokens": math.prod(tokens.shape[:-1]),
        "experts": experts,
        "choices": ids.shape[-1],
        "width": tokens.shape[-1],
        "inner": w2.shape[-2 if spec.transposed else -1],
    }
    return {name: size if isinstance(size, int) else str(size) for name, size in sizes.items()} | {
        "dtype": str(w2.dtype).removeprefix("torch."),
        "device": w2.device.type,
        "formula": spec.describe(),
    }


def prepared_experts(graph: fx.Graph) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, sizes) of every operator that `s2o_inductor.prepare` put into the model of a Dynamo graph."""
    for node in graph.nodes:
        name = node.args[-1] if node.op == "call_function" and node.target in _CALLS else None
        if isinstance(name, str) and name.endswith(PREPARED):
            z, w2, ids, spec = fake(node.args[0]), node.args[2], fake(node.args[6]), node.args[8]
            each = w2 if isinstance(w2, Sequence) else None
            last = fake(w2 if each is None else each[0])
            if z is not None and ids is not None and last is not None:
                yield name, experts_shape(z, ids, last.shape[0] if each is None else len(each), last, parse(str(spec)))
