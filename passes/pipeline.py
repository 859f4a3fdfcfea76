"""The order of the passes and the two points at which they enter a compilation.

Stage 1 works on the Dynamo graph, in which a site is a call or a handful of nodes; stage 2 on the
functional joint graph, in which a mask can be read as a predicate. See DESIGN.md.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import logging
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from s2o_inductor import mask_spec
from s2o_inductor.config import S2OConfig
from s2o_inductor.errors import DeclinedError, VerificationError
from s2o_inductor.passes import (
    attention,
    masks,
    mha,
    moe,
    moe_defaults,
    moe_router,
    moe_sizes,
    moe_verify,
    rewrite,
    sparsify,
    verify,
    verify_mask,
)
from s2o_inductor.passes.graph_utils import Refusal
from s2o_inductor.passes.records import AttentionSite, Declined, ExpertsSite, Recorder, Site

log = logging.getLogger("s2o_inductor")


def rewrite_dynamo_graph(gm: fx.GraphModule, config: S2OConfig, recorder: Recorder) -> None:
    """Stage 1: every found site of the graph and of its higher-order bodies becomes an op, in place."""
    start = time.perf_counter()
    names = _SiteNames(gm, config)
    seen: set[int] = set()
    for module in list(gm.modules()):
        # Activation checkpointing and nested regions keep their bodies as sub-modules, which
        # several call sites may share.
        if isinstance(module, fx.GraphModule) and id(module.graph) not in seen:
            seen.add(id(module.graph))
            for name, shape in moe_sizes.prepared_experts(module.graph):
                recorder.prepared(name, shape)
            _rewrite_attention(module, config, recorder, names)
            _rewrite_experts(module, config, recorder, names)
    recorder.spent("stage 1", time.perf_counter() - start)


def _rewrite_attention(gm: fx.GraphModule, config: S2OConfig, recorder: Recorder, names: _SiteNames) -> None:
    if "attention" in config.disable:
        return
    graph, expanded = gm.graph, 0
    declined: list[Declined] = []
    if "multi-head" not in config.disable:
        expanded, declined = _guarded(lambda: mha.expand_all(graph), "multi-head attention", (0, []))
    sites, refused = _guarded(lambda: attention.find_attention(graph), "attention", ([], []))
    rewritten = _rewrite_sites(gm, "attention", sites, declined + refused, config, recorder, names)
    if expanded and not rewritten:
        gm.graph.lint()
        gm.recompile()


def _rewrite_experts(gm: fx.GraphModule, config: S2OConfig, recorder: Recorder, names: _SiteNames) -> None:
    if config.experts is False:
        return
    sites, declined = _guarded(lambda: moe.find_experts(gm.graph), "experts", ([], []))
    _rewrite_sites(gm, "moe", sites, declined, config, recorder, names)


def _rewrite_sites(
    gm: fx.GraphModule, kind: str, sites: Sequence[Site], declined: list[Declined], config: S2OConfig,
    recorder: Recorder, names: _SiteNames,
) -> bool:  # fmt: skip
    """Verifies the sites found, puts ops in place of those that pass, then reports; whether any is in place."""
    excluded: list[Declined] = []
    accepted: list[tuple[Site, str, str]] = []
    for site in sites:
        if any(fnmatch.fnmatch(site.where, pattern) for pattern in config.exclude):
            excluded.append(Declined(kind, site.where, "excluded by option 'exclude'", site.output))
            continue
        if isinstance(site, ExpertsSite) and config.experts is None and (reason := moe_defaults.better_left(site)):
            excluded.append(Declined(kind, site.where, reason, site.output))
            continue
        checked = _verify_site(gm.graph, kind, site, config, recorder)
        if isinstance(checked, Declined):
            declined.append(checked)
        else:
            accepted.append((site, names.new(site.where), checked))
    if accepted and not _replace(gm, accepted):
        declined += [Declined(kind, site.where, "an error in the rewrite, see the log") for site, _, _ in accepted]
        accepted = []
    for site, name, checked in accepted:
        recorder.rewrote(site, name, checked)
        log.info("rewrote %s at %s as %s", kind, site.where, name)
    for refusal in (*excluded, *declined):
        recorder.declined(refusal)
        log.info("declined %s at %s: %s", refusal.kind, refusal.where, refusal.reason)
    if config.strict and declined:
        raise DeclinedError("; ".join(f"{refusal.where}: {refusal.reason}" for refusal in declined))
    if accepted:
        gm.recompile()
    return bool(accepted)


# Where an input comes from: Dynamo keeps it beside the metadata, and copies of nodes lose it.
_SOURCE = "_dynamo_source"


def _replace(gm: fx.GraphModule, accepted: Iterable[tuple[Site, str, str]]) -> bool:
    """Puts the ops in place; after an error the graph is what it was, and the answer is False."""
    graph = gm.graph
    untouched = fx.Graph(owning_module=gm, tracer_cls=graph._tracer_cls)
    untouched.output(untouched.graph_copy(graph, {}))
    for old, new in zip(graph.nodes, untouched.nodes, strict=True):
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))
    try:
        moved: dict[fx.Node, fx.Node] = {}
        for site, name, _ in accepted:
            moved[site.output] = rewrite.replace_site(graph, rewrite.follow(site, moved), name)
        graph.lint()
    except Exception:
        log.exception("rewriting failed; please report this. The graph stays as it was")
        gm.graph = untouched
        return False
    return True


def _verify_site(graph: fx.Graph, kind: str, site: Site, config: S2OConfig, recorder: Recorder) -> str | Declined:
    """How the site was verified, or a decline when the op disagrees with the code it would replace."""
    if config.verify == "off":
        return "off"
    start, always = time.perf_counter(), config.verify == "always"
    try:
        if isinstance(site, AttentionSite):
            outcome = verify.check_site(graph, site, always=always)
        else:
            outcome = moe_verify.check_experts(graph, site, always=always)
    except Refusal as refusal:
        return Declined(kind, site.where, str(refusal), site.output)
    except Exception as error:  # the check replays a user's code on made-up inputs: any failure only means "not proved"
        log.exception("verification of the site at %s failed to run", site.where)
        outcome = verify.Outcome(False, f"could not be verified: {type(error).__name__}: {error}")
    recorder.spent("of which verification", time.perf_counter() - start)
    if outcome.passed:
        return outcome.detail
    if config.strict:
        raise VerificationError(f"{site.where}: {outcome.detail}")
    return Declined(kind, site.where, outcome.detail, site.output)


def _guarded(find: Callable[[], Any], what: str, nothing: Any) -> Any:
    """Runs our own analysis of a user's graph; a defect of ours must not become the user's crash."""
    try:
        return find()
    except Exception:
        log.exception("the search for %s failed; please report this. The graph stays as it was", what)
        return nothing


class _SiteNames:
    """Names under which the ops of one graph report how they ran.

    A name holds a hash of the graph, since an artifact out of a cache still carries the names it was
    compiled with: two graphs of a process must not share one, and the same graph must get the same.
    """

    def __init__(self, gm: fx.GraphModule, config: S2OConfig) -> None:
        self._gm, self._config = gm, config
        self._graph_hash = ""
        self._taken: dict[str, int] = {}

    def new(self, where: str) -> str:
        """A name for a site there; the first call must come before the graph is edited."""
        self._graph_hash = self._graph_hash or self._hash()
        self._taken[where] = self._taken.get(where, 0) + 1
        return f"{where}#{self._taken[where]}@{self._graph_hash}"

    def _hash(self) -> str:
        digest = hashlib.sha256(self._config.key().encode())
        for module in self._gm.modules():
            if isinstance(module, fx.GraphModule):
                digest.update(_ADDRESS.sub("", str(module.graph)).encode())
                for node in module.graph.find_nodes(op="placeholder"):
                    value = node.meta.get("example_value")
                    if isinstance(value, torch.Tensor):
                        digest.update(f"{value.dtype}{tuple(value.shape)}{value.device}".encode())
        return digest.hexdigest()[:12]


# Differs from process to process, in the text of a function that is an argument.
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def lift_masks(graph: fx.Graph, config: S2OConfig, recorder: Recorder | None = None) -> int:
    """Stage 2 on a functional joint graph: mask tensors become predicates; returns how many ops changed.

    A mask that is not lifted stays a tensor; a boolean one is summarised once per graph, so that
    the kernels skip its hidden tiles all the same.
    """
    start = time.perf_counter()
    lifter = masks.MaskLifter(graph)
    plans: dict[Any, tuple[Any, ...]] = {}
    dead: list[fx.Node] = []
    changed = 0
    for node, mask in list(rewrite.masked_attention(graph)):
        spec = mask_spec.parse(rewrite.attention_spec(node))
        key = (mask, spec, str(rewrite.sizes(node)))
        if key not in plans:
            plans[key] = _plan(graph, lifter, node, mask, spec, config, recorder)
        kept_mask, leaves, plan, params, lifted, reason = plans[key]
        if recorder is not None:
            recorder.note_mask(rewrite.attention_site(node), lifted, reason)
        if lifted is spec and not plan:
            continue
        rewrite.use_plan(node, kept_mask, leaves, plan, params, lifted)
        changed += 1
        if kept_mask is None:
            dead.append(mask)
    if changed:
        rewrite.erase_dead_ancestors(graph, dict.fromkeys(dead))
        graph.lint()
    if recorder is not None:
        recorder.spent("stage 2", time.perf_counter() - start)
    return changed


def _plan(
    graph: fx.Graph, lifter: masks.MaskLifter, node: fx.Node, mask: fx.Node, spec: mask_spec.MaskSpec,
    config: S2OConfig, recorder: Recorder | None,
) -> tuple[Any, ...]:  # fmt: skip
    """(mask kept, leaves, plan nodes, params, spec, reason why not lifted) for one mask of the graph."""
    boolean = mask.meta["val"].dtype == torch.bool
    lifted = _guarded(lambda: lifter.lift(node, mask, spec, "visible" if boolean else "additive"), "a mask", "internal")
    if config.verify != "off" and not isinstance(lifted, str):
        begin = time.perf_counter()
        outcome = _guarded(
            lambda: verify_mask.check_mask(mask, lifted, rewrite.sizes(node)),
            "a proof of a mask",
            verify.Outcome(False, "the lifted predicate could not be checked"),
        )
        if recorder is not None:
            recorder.spent("of which verification", time.perf_counter() - begin)
        if not outcome.passed:
            if config.strict:
                raise VerificationError(outcome.detail)
            log.warning("a lifted mask did not pass verification and stays dense: %s", outcome.detail)
            lifted = outcome.detail
    if not isinstance(lifted, str):
        log.info("lifted mask %s to %s", mask.name, lifted.spec.text())
        if lifted.spec.is_band:
            return None, (), (), lifted.params, lifted.spec, None
        plan = rewrite.insert_plan(graph, node, None, lifted.leaves, lifted.params, lifted.spec)
        return None, lifted.leaves, plan, lifted.params, lifted.spec, None
    log.info("mask %s stays dense: %s", mask.name, lifted)
    plan = rewrite.insert_plan(graph, node, mask, (), (), spec) if boolean else []
    return mask, (), plan, (), spec, lifted


def lower_routers(graph: fx.Graph, recorder: Recorder | None = None) -> int:
    """Stage 2, last step: routers of a functional graph compute the same in fewer steps; returns how many do."""
    routers: list[moe_router.Router] = _guarded(lambda: moe_router.find_routers(graph), "routers", [])
    for router in routers:
        for node, *factors in router.products:
            rewrite.use_halves(graph, node, [(factor.source, factor.views) for factor in factors])
        for node, selection in router.selections:
            rewrite.use_top_k(node, selection.k)
        for node, scores in router.only:
            rewrite.use_only_column(graph, node, scores)
        if recorder is not None:
            recorder.note_router(router.name, router.describe())
        log.info("router of %s: %s", router.name, "; ".join(router.describe()))
    if routers:
        graph.lint()
    return len(routers)


class LiftMasks(CustomGraphPass):
    """Stage 2 as an Inductor pass: masks, then what may be approximated, then routers.

    Its uuid covers everything that its result depends on.
    """

    def __init__(self, config: S2OConfig, recorder: Callable[[], Recorder | None]) -> None:
        self.config = config
        self.recorder = recorder

    def __call__(self, graph: fx.Graph) -> None:
        if "lift-masks" not in self.config.disable:
            lift_masks(graph, self.config, self.recorder())
        sparsify.sparsify(graph, self.config, self.recorder())
        if "router" not in self.config.disable:
            lower_routers(graph, self.recorder())

    def uuid(self) -> str:
        return f"{fingerprint()}:{self.config.key()}"

    def __getstate__(self) -> dict[str, Any]:
        # Inductor pickles passes into its cache key: the report of this compilation is not part of it.
        return {"config": self.config, "recorder": None, "uuid": self.uuid()}


class RewriteSites(CustomGraphPass):
    """Stage 1 as an Inductor pass, for the process-wide installation."""

    def __init__(self, config: S2OConfig, new_recorder: Callable[[], Recorder]) -> None:
        self.config = config
        self.new_recorder = new_recorder

    def __call__(self, graph: fx.Graph) -> None:
        gm = graph.owning_module
        if isinstance(gm, fx.GraphModule):
            rewrite_dynamo_graph(gm, self.config, self.new_recorder())

    def uuid(self) -> str:
        return f"{fingerprint()}:{self.config.key()}:stage 1"

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "uuid": self.uuid()}


class PassChain(CustomGraphPass):
    """The user's own pass, then ours: torch before 2.13 takes one pass per hook."""

    def __init__(self, passes: tuple[Callable[[fx.Graph], None], ...]) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any | None:
        """None, which bypasses the caches, as soon as one pass of the user has none."""
        uuids = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if any(one is None for one in uuids) else tuple(uuids)


def appended(existing: Any, ours: CustomGraphPass) -> CustomGraphPass:
    """Our pass behind whatever the user has in that hook; never in its place."""
    if existing is None:
        return ours
    return PassChain((*(existing if isinstance(existing, (list, tuple)) else (existing,)), ours))


@functools.cache
def fingerprint() -> str:
    """A hash of every source file of the package and of the versions and device it runs on.

    Inductor's cache key sees the name of an op, not its body (pytorch issue 144344): without this,
    a changed kernel would be served from an old artifact.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    package = Path(mask_spec.__file__).resolve().parent
    folders = dict.fromkeys((package, package / "passes", package / "kernels", root / "passes", root / "kernels"))
    kinds = (".py", ".cpp", ".h")
    for source in sorted({path.resolve() for folder in folders for path in folder.rglob("*") if path.suffix in kinds}):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    digest.update(f"{torch.__version__} {platform.machine()} {_triton_version()} {_device()}".encode())
    return digest.hexdigest()


def _triton_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "no triton"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
