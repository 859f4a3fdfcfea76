"""Stage 2, last step: attention that needs no gradient and is long enough may be approximated."""

from __future__ import annotations

import logging

from torch import fx

from s2o_inductor.config import S2OConfig
from s2o_inductor.mask_spec import parse
from s2o_inductor.passes import rewrite
from s2o_inductor.passes.records import Recorder

log = logging.getLogger("s2o_inductor")

_DROPOUT = 11  # its place in the schema of s2o::attention


def sparsify(graph: fx.Graph, config: S2OConfig, recorder: Recorder | None = None) -> int:
    """Turns attention of a functional joint graph into its sparse form where the config allows it.

    What lengths decide, the op decides at run time; a static length that is too short is left alone here, so that
    nothing about a short graph changes.

    Args:
        graph: with masks lifted.
        config: budgets.
        recorder: hears of every site that is long enough.

    Returns:
        how many nodes changed.
    """
    training = any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder"))
    changed = 0
    for node in graph.find_nodes(op="call_function", target=rewrite.ATTENTION):
        _, heads, _, keys = rewrite.sizes(node)
        q, _ = rewrite.operands(node)
        name = rewrite.attention_site(node)
        policy = config.policy(site_place(name), heads, q.meta["val"].device.type)
        if policy is None or (isinstance(keys, int) and keys < policy.min_seq):
            continue
        reason = _why_exact(node, training)
        if reason is None:
            rewrite.use_sparse(node, policy.text())
            changed += 1
        if recorder is not None:
            recorder.note_sparse(name, reason)
        log.info("attention %s %s", name, "may be approximated" if reason is None else f"stays exact: {reason}")
    return changed


def site_place(name: str) -> str:
    """The module path or source line in the name of a site, as patterns of the config see it."""
    return name.rsplit("#", 1)[0]


def _why_exact(node: fx.Node, training: bool) -> str | None:
    if training:
        return "gradients may be needed; run under torch.no_grad() for sparse attention"
    spec = parse(rewrite.attention_spec(node))
    if spec.dense:
        return "its mask stays a tensor"
    if spec.equal and spec.upper is None:
        return "packed documents are approximated with causal attention alone"
    if spec.rows or spec.at_most:
        return "its mask has terms that sparse attention does not rank by"
    return "dropout" if node.args[_DROPOUT] != 0.0 else None
