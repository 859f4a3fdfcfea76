"""Which nodes belong to a site of routed experts alone, writers in place included."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import Refusal, fake, op_name, product_of_sizes, shape_of


def region_of(flow: Flow, output: fx.Node, operands: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Every node that computes only this site.

    Raises:
        Refusal: the site reads, writes or shows something besides its operands and its output.
    """
    region: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node in region or node in operands or isinstance(_scalar(node), (int, torch.SymInt)):
            continue
        if node.op in ("placeholder", "get_attr"):
            raise Refusal(f"the experts read '{node.name}', which is neither token, weight nor routing")
        region.add(node)
        for source in _read(node):
            value = flow.read(node, source)
            if value is None and fake(source) is not None:
                # Torn: an indexed assignment fills a buffer of the site itself.
                pending += [one for one in flow.names_of(source) if one in operands or written(one)]
            pending += [one for one in (source, value) if one is not None]
    _absorb(flow, region, output)
    for node in region:
        if node is not output and any(user not in region for user in node.users):
            raise Refusal(f"'{node.name}', computed within the experts, is used elsewhere")
        if flow.ambient[node] != flow.ambient[output]:
            raise Refusal("the gradient mode or autocast changes within the experts")
        if written(node) and any(other not in region for other in flow.names_of(node)):
            raise Refusal(f"'{node.name}' writes in place to a tensor that is used elsewhere")
    for node, source in itertools.chain.from_iterable(((n, s) for s in n.all_input_nodes) for n in region):
        if source in operands and flow.written_between(source, node, output, region):
            raise Refusal(f"'{source.name}' is changed in place while the experts run")
    if product_of_sizes(shape_of(output)) == 0:
        raise Refusal("there are no tokens")
    return tuple(sorted(region, key=flow.position.__getitem__))


def _read(node: fx.Node) -> list[fx.Node]:
    """The inputs of which a node reads values, not dtype and shape alone."""
    if op_name(node) in ("zeros_like", "empty_like"):
        return []
    return list(node.all_input_nodes[:1] if op_name(node) == "type_as" else node.all_input_nodes)


def _scalar(node: fx.Node) -> object:
    """The example value of a node that is a number."""
    value = node.meta.get("example_value")
    return None if isinstance(value, torch.Tensor) else value


def _absorb(flow: Flow, region: set[fx.Node], output: fx.Node) -> None:
    """Takes in what looks at the site, or writes to its memory, without anyone reading the result."""
    for node in reversed(flow.nodes):
        if node in region or not op_name(node) or node.op == "output":
            continue
        reads = [source for source in node.all_input_nodes if source in region and source is not output]
        alone = all(user in region for user in node.users)
        if reads and alone and all(other in region or other is node for other in flow.names_of(node) if written(node)):
            region.add(node)
