"""Which nodes belong to a site of routed experts alone, writers in place included."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import Refusal, fake, made, op_name, product_of_sizes, shape_of


def region_of(flow: Flow, output: fx.Node, operands: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Every node that computes only this site.

    Behind the output, what it is may go by the names of buffers of the site: as those are written in place, `out`
    stands for the sum that an index_add_ left there.

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
    _absorb_sizes(flow, region)
    names = _names(flow, region, output)
    behind = flow.position[output]
    for node in region - {output}:
        outside = [user for user in node.users if user not in region]
        if outside and (node not in names or min(map(flow.position.__getitem__, outside)) < behind):
            raise Refusal(f"'{node.name}', computed within the experts, is used elsewhere")
    for node in region:
        if flow.ambient[node] != flow.ambient[output]:
            raise Refusal("the gradient mode or autocast changes within the experts")
        # A name that is made behind the output is one of what replaces it; a view made before would be neither's.
        others = [other for other in flow.names_of(node) if other not in region] if written(node) else []
        if any(flow.position[other] < behind for other in others):
            raise Refusal(f"'{node.name}' writes in place to a tensor that is used elsewhere")
    for node, source in itertools.chain.from_iterable(((n, s) for s in n.all_input_nodes) for n in region):
        if source in operands and flow.written_between(source, node, output, region):
            raise Refusal(f"'{source.name}' is changed in place while the experts run")
    result = fake(made(output))
    for operand in operands if result is not None and result.requires_grad else ():
        # The nodes of the site may have kept copies of rows, where the op keeps the tensor itself.
        if flow.written_after(operand, output):
            raise Refusal(f"'{operand.name}' is changed in place before the backward pass of the experts")
    if product_of_sizes(shape_of(made(output))) == 0:
        raise Refusal("there are no tokens")
    return tuple(sorted(region, key=flow.position.__getitem__))


def _names(flow: Flow, region: set[fx.Node], output: fx.Node) -> set[fx.Node]:
    """Under which names of the graph the output is known behind it, as a whole."""
    names = {output, made(output)}
    inside = sorted(region, key=flow.position.__getitem__)
    for node in inside[::-1]:
        if node in names:
            names.update(target for target in written(node) if target in region)
    for node in inside:
        if any(target in names for target in written(node)):
            names.add(node)
    return names


# Arithmetic on sizes that depend on data, as Dynamo writes it down for each, and what it asserts about them.
_ABOUT_SIZES = frozenset(
    ("sym_size", "ge", "le", "gt", "lt", "eq", "ne", "add", "sub", "mul", "mod", "_assert_scalar", "_check_is_size",
     "sym_constrain_range_for_size")
)  # fmt: skip


def _absorb_sizes(flow: Flow, region: set[fx.Node]) -> None:
    """Takes in what only asserts something about sizes that depend on the data of the site."""
    about: dict[fx.Node, None] = {}
    for node in flow.nodes:
        inside = any(source in region for source in node.all_input_nodes)
        if node in region or not (inside or any(source in about for source in node.all_input_nodes)):
            continue
        name = getattr(node.target, "__name__", "").split(".")[0]
        scalar = not isinstance(node.meta.get("example_value"), torch.Tensor) and name in _ABOUT_SIZES
        if scalar or (inside and op_name(node) == "getitem"):
            about[node] = None
    for node in reversed(about):
        if all(user in region for user in node.users):
            region.add(node)


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
