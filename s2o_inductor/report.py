"""What was rewritten, what was declined and why: the answer to "is it on, and what did it do?"."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._logging._internal import trace_structured

from s2o_inductor import ops
from s2o_inductor.loops import breaks
from s2o_inductor.mask_spec import MaskSpec, parse
from s2o_inductor.passes.moe_sizes import PREPARED, experts_shape
from s2o_inductor.passes.records import AttentionSite, Declined, ExpertsSite
from s2o_inductor.sparse_policy import Extent

log = logging.getLogger("s2o_inductor")


# Cached artifacts skip the pass that would know, inner="eager" and disable=["lift-masks"] leave it out.
_NOT_SEEN = "the pass that lifts masks did not run in this compilation"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the last call of an approximate site read.

    Attributes:
        density: computed over visible (query, key) pairs, mean of the heads.
        head_density: the same for each query head, mean of the batch.
        mma_density: the same of products of whole tiles, hidden pairs included, and
        work_density: of all work, with ranking and the tail; see `sparse_policy.Extent.densities`. Means of the heads;
            None for packed documents, whose tiles the host knows nothing of.
        dropped: estimated share of the softmax mass that was left to the tail, mean of the heads.
        error: squared error of the audited rows over their squared norm, mean of the heads; None without `audit`.
    """

    density: float
    head_density: tuple[float, ...]
    mma_density: float | None
    work_density: float | None
    dropped: float
    error: float | None

    @classmethod
    def of(cls, statistics: Any, extent: Extent | None) -> Reading:
        """From a `kernels.sparse.Statistics` of a call of these sizes, None if packed; waits for its device."""
        heads = (statistics.pairs / statistics.visible.clamp(min=1)).mean(dim=0).tolist()
        error = None if statistics.error is None else statistics.error.mean().item()
        mma = work = None
        if extent is not None:
            read = statistics.bundles.flatten(0, 1).tolist()
            tiles = [extent.densities(bundles, statistics.geometry) for bundles in read]
            mma, work = (sum(x) / max(len(tiles), 1) for x in zip(*tiles, strict=True))
        return cls(sum(heads) / len(heads), tuple(heads), mma, work, statistics.tail.mean().item(), error)

    def __str__(self) -> str:
        error = "" if self.error is None else f", error {self.error:.1e}"
        work = "" if self.work_density is None else f", work {self.work_density:.3f}"
        return f"density {self.density:.3f}{work}, dropped {self.dropped:.3f}{error}"


@dataclasses.dataclass
class Site:
    """One candidate: attention or mixture of experts, rewritten or declined.

    Attributes:
        name: the name under which the op reports how it ran; empty for a declined site.
        shape: sizes as ints, or as text where symbolic.
        mask: readable mask terms; `mask_reason` says why a mask tensor was not lifted.
        route: the kernel that ran, "" until the compiled graph ran once.
        reading: what the last call read, where it was approximate.
        sparse_reason: why a site that is long enough was not approximated.
        verified: how the rewrite was checked before it was kept.
        router: what in front of the experts runs in another way; empty too where the graph came out of a cache.
    """

    kind: str
    where: str
    status: str
    reason: str | None = None
    exact: bool = True
    name: str = ""
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    mask: list[str] = dataclasses.field(default_factory=list)
    mask_reason: str | None = None
    verified: str = ""
    route: str = ""
    reading: Reading | None = None
    sparse_reason: str | None = None
    router: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of_attention(cls, site: AttentionSite, name: str, verified: str) -> Site:
        shape: dict[str, Any] = {}
        sizes = _operand_sizes(site)
        if sizes is not None:
            shape = sizes
        terms = ["causal"] if site.causal else []
        return cls(
            "attention", site.where, "rewritten", name=name, shape=shape, mask=terms + ["dense"] * bool(site.masks),
            mask_reason=_NOT_SEEN if site.masks else None,
            verified=verified,
        )  # fmt: skip

    @classmethod
    def of_experts(cls, site: ExpertsSite, name: str, verified: str) -> Site:
        tokens, ids, w2 = (node.meta["example_value"] for node in (site.tokens, site.ids, site.last))
        shape = experts_shape(tokens, ids, site.experts, w2, site.spec)
        return cls("moe", site.where, "rewritten", name=name, shape=shape, verified=verified)

    @classmethod
    def of_declined(cls, declined: Declined) -> Site:
        return cls(declined.kind, declined.where, "declined", reason=declined.reason)

    def settle(self) -> None:
        """Takes the route, and the mask of a graph that came out of a cache, from how the op really ran."""
        if self.name not in ops.observed:
            return
        self.route, text = ops.observed[self.name]
        if "dense" in self.mask and not parse(text).dense:
            self.mask, self.mask_reason = parse(text).terms(), None
        if self.name in ops.statistics:
            self.reading = Reading.of(ops.statistics[self.name], ops.extents[self.name])
            self.exact = False

    def to_dict(self) -> dict[str, Any]:
        self.settle()
        return {
            "kind": self.kind,
            "where": self.where,
            "status": self.status,
            "reason": self.reason if self.reason is not None else self.mask_reason,
            "exact": self.exact,
            "mask": list(self.mask),
            "shape": dict(self.shape),
            "route": self.route,
            "verified": self.verified,
            "sparse": None if self.reading is None else dataclasses.asdict(self.reading),
            "sparse_reason": self.sparse_reason,
            "router": list(self.router),
        }


def _operand_sizes(site: AttentionSite) -> dict[str, Any] | None:
    """Sizes of a site from fake values, symbolic ones as text; None where metadata is missing."""
    try:
        q, k, v = (_stepped(operand.node.meta["example_value"], operand.steps) for operand in (site.q, site.k, site.v))
    except Exception:  # a report must never stop a compilation
        log.debug("no sizes for the report of %s", site.where, exc_info=True)
        return None
    names = ("batch", "query_heads", "kv_heads", "queries", "keys", "width", "value_width")
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    shape = {name: size if isinstance(size, int) else str(size) for name, size in zip(names, sizes, strict=True)}
    return {**shape, "dtype": str(q.dtype).removeprefix("torch."), "device": q.device.type}


def _stepped(value: torch.Tensor, steps: tuple[tuple[str, tuple[Any, ...]], ...]) -> torch.Tensor:
    for method, args in steps:
        value = getattr(value, method)(*args)
    return value


@dataclasses.dataclass
class GraphReport:
    """One graph that Dynamo captured.

    Attributes:
        attempt: which analysis of which frame captured it, see `_attempt`.
    """

    sites: list[Site] = dataclasses.field(default_factory=list)
    graph_break: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    attempt: tuple[Any, Any] = (None, None)

    def rewrote(self, site: AttentionSite | ExpertsSite, name: str, verified: str) -> None:
        found = Site.of_attention if isinstance(site, AttentionSite) else Site.of_experts
        self.sites.append(found(site, name, verified))  # type: ignore[arg-type]

    def prepared(self, name: str, shape: Mapping[str, Any]) -> None:
        where = name.removesuffix(PREPARED)
        self.sites.append(Site("moe", where, "rewritten", name=name, shape=dict(shape), verified="by prepare"))

    def declined(self, refusal: Declined) -> None:
        self.sites.append(Site.of_declined(refusal))

    def spent(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def note_mask(self, name: str, spec: MaskSpec, reason: str | None) -> None:
        for site in self.sites:
            if site.name == name:
                site.mask, site.mask_reason = spec.terms(), reason

    def note_sparse(self, name: str, reason: str | None) -> None:
        for site in self.sites:
            if site.name == name:
                site.sparse_reason = reason

    def note_router(self, name: str, changes: list[str]) -> None:
        for site in self.sites:
            if site.name == name:
                site.router = changes

    def emit(self) -> None:
        """Writes the graph's decisions to the structured trace, where tlparse shows them."""
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "s2o_report", "encoding": "json"},
            payload_fn=lambda: json.dumps([site.to_dict() for site in self.sites], indent=1),
        )


class Report:
    """Everything that the backend decided since the last ``torch._dynamo.reset()``; prints as a table.

    Attributes:
        hints: loops that stayed out of every graph, and what to do about them.
    """

    def __init__(self, graphs: list[GraphReport], hints: Sequence[str] = ()) -> None:
        self._graphs = list(graphs)
        self.hints = list(hints)

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self._graphs for site in graph.sites]

    @property
    def graph_breaks(self) -> list[str]:
        return [graph.graph_break for graph in self._graphs if graph.graph_break]

    def settle(self) -> None:
        """Takes over how the sites ran, as far as they have run."""
        for site in self.sites:
            site.settle()

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in our own passes, by stage, in seconds."""
        total: dict[str, float] = {}
        for graph in self._graphs:
            for stage, seconds in graph.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def to_dict(self) -> dict[str, Any]:
        """``{"sites": [...], "graph_breaks": [...], "hints": [...], "graphs": n, "seconds": {...}}``, for JSON."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "graph_breaks": self.graph_breaks,
            "hints": self.hints,
            "graphs": len(self._graphs),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        sites = [site.to_dict() for site in self.sites]
        rewritten = sum(site["status"] == "rewritten" for site in sites)
        lines = [
            f"s2o: {rewritten} of {len(sites)} candidate sites rewritten in {len(self._graphs)} graph(s), "
            f"{len(self.graph_breaks)} graph break(s)"
        ]
        header = ("where", "kind", "status", "exact", "shape", "mask", "route")
        rows = [header, *(_row(site) for site in self.sites)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for site in sites:
            if site["reason"]:
                lines.append(f"  {site['where']}: {site['reason']}")
            if site["router"]:
                lines.append(f"  {site['where']}, router: {'; '.join(site['router'])}")
        kept = dict.fromkeys(site["sparse_reason"] for site in sites if site["sparse_reason"])
        lines += [f"  exact although long: {reason}" for reason in kept]
        lines += [f"  graph break: {reason}" for reason in self.graph_breaks]
        lines += [f"  {hint}" for hint in self.hints]
        return "\n".join(lines)

    __repr__ = __str__


def _row(site: Site) -> tuple[str, ...]:
    shape, rewritten = site.shape, site.status == "rewritten"
    if site.kind == "moe" and rewritten:
        sizes = "{tokens}x{width}, {choices} of {experts}x{inner}".format(**shape)
        return site.where, "moe", site.status, "exact", sizes, "-", site.route or "-"
    sizes = (
        f"{shape['batch']}x{shape['query_heads']}/{shape['kv_heads']}x{shape['queries']}x{shape['keys']}x{shape['width']}"
        if shape
        else "-"
    )
    mask = " & ".join(site.mask) or ("none" if rewritten else "-")
    exact = str(site.reading or "exact") if rewritten else "-"
    return site.where, site.kind, site.status, exact, sizes, mask, site.route or "-"


_graphs: list[GraphReport] = []
_started = 0.0  # of what `last_report` tells, in seconds of the epoch


def _attempt() -> tuple[Any, Any]:
    """The running compilation, and a number that changes when Dynamo analyses its frame once more."""
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return None, None
    return torch._guards.CompileContext.current_compile_id(), _serials.setdefault(context, next(_counter))


_serials: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def new_graph_report(gm: fx.GraphModule | None = None) -> GraphReport:
    """A report for the graph being compiled, kept for `last_report`.

    Dynamo analyses a frame again when the first attempt fell back on an assumption, such as a
    symbolic scale: what the abandoned attempt reported is dropped.
    """
    report = GraphReport(attempt=_attempt())
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and getattr(reason, "graph_break", False):
        report.graph_break = str(reason.reason)
    compilation, serial = report.attempt
    if compilation is not None:
        _graphs[:] = [old for old in _graphs if old.attempt[0] != compilation or old.attempt[1] == serial]
    _graphs.append(report)
    return report


def compilation_report() -> GraphReport:
    """The report of the compilation that runs, for a pass that is called once per body of its graph."""
    attempt = _attempt()
    if attempt[0] is None or not _graphs or _graphs[-1].attempt != attempt:
        return new_graph_report()
    return _graphs[-1]


def last_report() -> Report:
    """The report of every graph compiled since the start or the last ``torch._dynamo.reset()``.

    That reset knows of backends by name alone: what ``backend="inductor"`` compiled under
    `s2o_inductor.install` is kept.
    """
    return Report(_graphs, breaks.describe(breaks.loop_breaks(_started)))


def clear() -> None:
    """Forgets all reports; `torch._dynamo.reset` comes here through the backend."""
    global _started
    _graphs.clear()
    _started = time.time()
    ops.forget()


def latest() -> GraphReport | None:
    """The report of the graph being compiled, for a pass that Inductor calls later."""
    return _graphs[-1] if _graphs else None


@contextlib.contextmanager
def separate() -> Iterator[list[GraphReport]]:
    """Collects the reports of one explanation apart from those of the process."""
    global _graphs
    kept, _graphs = _graphs, []
    seen = ops.forget()
    try:
        yield _graphs
    finally:
        _graphs = kept
        ops.forget()
        for old, now in zip(seen, ops.RECORDS, strict=True):
            now.update(old)
