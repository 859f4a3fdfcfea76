"""What the passes hand one another: frozen records, no graph edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor, fx

from s2o_inductor.mask_spec import EmptyRows, MaskSpec
from s2o_inductor.moe_spec import ExpertSpec

# A view method with its arguments, for example ("transpose", (-1, -2)).
Step = tuple[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Operand:
    """A node of the graph and the view methods that bring it into the op's layout."""

    node: fx.Node
    steps: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class MaskOperand:
    """One mask of a site, as the source applies it.

    Attributes:
        node: a tensor that broadcasts to (batch, query heads, Sq, Sk) after `steps`.
        kind: "visible" (boolean, True is seen), "hidden" (boolean, True is not seen),
            "additive" (a float added to the scaled scores).
        steps: view methods that bring it into the broadcastable layout.
    """

    node: fx.Node
    kind: str
    steps: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """softmax(scale * q @ k^T, masked) @ v, found in a graph in whatever spelling.

    Operands, after their steps, are q (B, Hq, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv);
    query head h uses key/value head h // (Hq / Hkv).

    Attributes:
        where: module path or source line of the site.
        output: the node that the op replaces; the op is inserted in front of it.
        region: every node that computes only this site, output included. Nothing outside reads
            them, so they are dead once the output is replaced.
        out_steps: view methods from the op's (B, Hq, Sq, Dv) to the output node's shape.
        causal: the source asked for ``is_causal``: k <= q, aligned at the top left.
        masks: applied together.
        empty: what the source gives for a row that sees no key (see `MaskSpec.empty`).
        sinks: per query head, one extra logit that takes part in the softmax and has no value.
    """

    where: str
    output: fx.Node
    region: tuple[fx.Node, ...]
    q: Operand
    k: Operand
    v: Operand
    scale: float
    causal: bool = False
    masks: tuple[MaskOperand, ...] = ()
    empty: EmptyRows = "zero"
    dropout: float = 0.0
    sinks: fx.Node | None = None
    out_steps: tuple[Step, ...] = ()


# What the experts have each of their own: one tensor whose first axis is the expert, or one tensor per expert.
PerExpert: TypeAlias = fx.Node | tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class ExpertsSite:
    """Routed experts and the weighted sum over each token's choices, found in a graph in whatever spelling.

    Attributes:
        where: module path or source line of the site.
        output: (T, l) or, like the layer's input, (B, S, l): the node that the op replaces. An assignment into
            a buffer (`graph_utils.made`) stands for that buffer.
        region: every node that computes only this site, output included.
        tokens: (T, l); w1, w2, ids (T, K), weights (T, K), w3, b1 and b2 as in `s2o::moe_experts`, or in
            `s2o::moe_experts_list` where they are tuples. Tokens, ids and weights may be (B, S, .) instead.
        spec: the formula of an expert.
        dense: weights are (T, E), zero but for the choices.
        distinct: no token has the same expert twice among its choices.
        base: what the weighted sum is added to, shaped like the output.
        numbered: nodes of the region whose literals are the number of an expert.
        wraps: choices may be negative, and then count from the last expert, as indices do.
    """

    where: str
    output: fx.Node
    region: tuple[fx.Node, ...]
    tokens: fx.Node
    w1: PerExpert
    w2: PerExpert
    ids: fx.Node
    weights: fx.Node
    spec: ExpertSpec
    w3: PerExpert | None = None
    b1: PerExpert | None = None
    b2: PerExpert | None = None
    dense: bool = False
    distinct: bool = False
    base: fx.Node | None = None
    numbered: frozenset[fx.Node] = frozenset()
    wraps: bool = False

    def operands(self) -> tuple[PerExpert | None, ...]:
        """In the order of the op's schema."""
        return self.tokens, self.w1, self.w2, self.w3, self.b1, self.b2, self.ids, self.weights

    def operand_nodes(self) -> tuple[fx.Node, ...]:
        """Every tensor that the op reads, each once."""
        return tuple(dict.fromkeys(node for operand in self.operands() for node in each(operand)))

    @property
    def needs_gradient(self) -> bool:
        """Whether one flows through the site."""
        # A view of a parameter says that it requires a gradient under no_grad as well; but there it is a leaf.
        values = [node.meta.get("example_value") for node in self.region]
        return any(isinstance(x, Tensor) and x.requires_grad and not x.is_leaf for x in values)

    @property
    def last(self) -> fx.Node:
        """The second weights: of all experts, or of the first one where each has its own."""
        return each(self.w2)[0]

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.w2) if isinstance(self.w2, tuple) else int(self.w2.meta["example_value"].shape[0])


def each(operand: PerExpert | None) -> tuple[fx.Node, ...]:
    """The tensors of an operand, none, one or one per expert."""
    return operand if isinstance(operand, tuple) else () if operand is None else (operand,)


# What the pipeline verifies and replaces.
Site: TypeAlias = AttentionSite | ExpertsSite


@dataclasses.dataclass(frozen=True)
class Declined:
    """A candidate that stays as it is, with the reason in words a user understands."""

    kind: str
    where: str
    reason: str
    node: fx.Node | None = None


class Recorder(Protocol):
    """Where passes write down what they did; `s2o_inductor.report` implements it."""

    def rewrote(self, site: Site, name: str, verified: str) -> None:
        """A site became an op that carries `name`."""

    def prepared(self, name: str, shape: Mapping[str, Any]) -> None:
        """The graph calls experts that `s2o_inductor.prepare` put there."""

    def declined(self, refusal: Declined) -> None:
        """A candidate stays as it is."""

    def note_mask(self, name: str, spec: MaskSpec, reason: str | None) -> None:
        """The mask of the op called `name` is now `spec`; `reason` says why a tensor remains."""

    def note_sparse(self, name: str, reason: str | None) -> None:
        """The op called `name` may be approximated, or must not be for a reason that concerns the user."""

    def note_router(self, name: str, changes: list[str]) -> None:
        """What of the router in front of the experts called `name` runs in another way."""

    def spent(self, stage: str, seconds: float) -> None:
        """Adds to the time of a stage."""
