"""Mixtures of experts in a graph that no operator takes over: found to be told, not to be rewritten."""

from __future__ import annotations

from torch import fx

from s2o_inductor.passes import canonical
from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import argument, fake, op_name, shape_of, where
from s2o_inductor.passes.moe_products import INTEGERS
from s2o_inductor.passes.records import Declined

_UNROLLED = (
    "a loop over the experts is unrolled in the graph, one branch per expert; s2o_inductor.prepare(model) before "
    "torch.compile makes it one operator"
)
_SLOTS = "tokens fill a bounded number of slots per expert and the rest are dropped; s2o's experts take every token"
# From the positions of an expert's tokens back to the choices.
_SELECTS = frozenset(
    ("eq", "getitem", "permute", "transpose", "one_hot", "squeeze", "unsqueeze", "view", "reshape", "any", "to", "bool",
     "bitwise_and", "mul", "T")
)  # fmt: skip


def find_candidates(flow: Flow, used: set[fx.Node]) -> list[Declined]:
    """Unrolled loops and slots of bounded capacity, each once.

    Args:
        flow: of a Dynamo graph.
        used: products, and lookups of tokens, that belong to other candidates.
    """
    found = [*_unrolled(flow, used), *_slots(flow, used)]
    return [Declined("moe", where(node), reason, node) for node, reason in found]


def _unrolled(flow: Flow, used: set[fx.Node]) -> list[tuple[fx.Node, str]]:
    """Positions of several experts' tokens, looked up one expert at a time in the same choices."""
    lookups: dict[fx.Node, list[fx.Node]] = {}
    for node in flow.nodes:
        alone = op_name(node) == "where" and len(node.args) + len(node.kwargs) == 1
        if node in used or (op_name(node) != "nonzero" and not alone):
            continue
        source, choices = flow.read(node, argument(node, 0, "input", "self", "condition")), None
        while source is not None:
            value = fake(source)
            choices = source if value is not None and value.dtype in INTEGERS else choices
            selects = op_name(source) in _SELECTS
            source = flow.read(source, argument(source, 0, "input", "self")) if selects else None
        if choices is not None:
            lookups.setdefault(choices, []).append(node)
    return [(nodes[0], _UNROLLED) for nodes in lookups.values() if len(nodes) > 1]


def _slots(flow: Flow, used: set[fx.Node]) -> list[tuple[fx.Node, str]]:
    """Products whose rows (E, C, d) are dispatched by a tensor (T, E, C)."""
    for node in flow.nodes:
        found = canonical.product(node) if op_name(node) == "einsum" and node not in used else None
        for side in () if found is None else (found.left, found.right):
            made = flow.read(node, side)
            dispatch = canonical.product(made) if made is not None and op_name(made) == "einsum" else None
            if made is None or dispatch is None or len(shape_of(made)) != 3:
                continue
            sides = ((dispatch.left_labels, dispatch.right_labels), (dispatch.right_labels, dispatch.left_labels))
            for places, tokens in sides:
                if len(places) == 3 and len(tokens) == 2 and dispatch.summed() == (tokens[0],) == (places[0],):
                    return [(node, _SLOTS)]
    return []
