"""The backend: ``torch.compile(model, backend="s2o")``, and Inductor's hooks for a whole process.

Nothing here changes a global setting unless the user calls `install`: passes travel in the config
patches of the one compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from s2o_inductor import report
from s2o_inductor.config import S2OConfig, split_options
from s2o_inductor.errors import OptionError, S2OError, UnsupportedTorchError
from s2o_inductor.loops import breaks

log = logging.getLogger("s2o_inductor")
OLDEST_TORCH = (2, 11)


def s2o(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrites the attention in a captured graph and compiles the rest with Inductor.

    Called by torch.compile, once per captured graph.

    Args:
        gm: the Dynamo graph; it is rewritten in place.
        example_inputs: its inputs, real or fake.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).
        options: `S2OConfig` fields, and any option of Inductor.

    Raises:
        OptionError: an option is unknown or out of range.
        UnsupportedTorchError: torch is older than 2.11.
    """
    require_torch()
    config, patches = split_options(options, mode)
    return compile_graph(gm, example_inputs, config, patches)


def _reset() -> None:
    """`torch._dynamo.reset` comes here, as it would to Inductor's own wrapper."""
    report.clear()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


s2o.reset = _reset  # type: ignore[attr-defined]


def require_torch() -> None:
    """Raises UnsupportedTorchError for a torch that this backend does not know how to work with."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise UnsupportedTorchError(
            f"s2o needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer; this is {torch.__version__}: "
            "install a newer torch, or use backend='inductor'."
        )


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: S2OConfig,
    patches: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Both stages and the inner compiler on one captured graph; `patches` are Inductor's."""
    from torch._inductor import config as inductor_config

    from s2o_inductor.passes import pipeline

    record = report.new_graph_report(gm)
    _dump(gm, config, "0-captured")
    with inductor_config.patch(dict(patches or {})):  # what is rewritten may depend on how it will be compiled
        pipeline.rewrite_dynamo_graph(gm, config, record)
    _dump(gm, config, "1-rewritten")
    record.emit()
    if config.inner == "eager":
        return gm.forward
    lift = pipeline.LiftMasks(config, lambda: record)
    if config.inner == "aot_eager":
        return _aot_eager(gm, example_inputs, lift)
    return _inductor(gm, example_inputs, lift, dict(patches or {}))


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], lift: Any, patches: dict[str, Any]) -> Any:
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    from s2o_inductor.passes.pipeline import appended

    for hook, setting in _installed.items():
        # This compilation has passes and options of its own: those of `install` would run on top.
        if getattr(inductor_config, hook) is setting.ours:
            patches.setdefault(hook, setting.before)
    hook = "joint_custom_pre_pass"
    patches[hook] = appended(patches.get(hook, getattr(inductor_config, hook)), lift)
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def _aot_eager(gm: fx.GraphModule, example_inputs: Sequence[Any], lift: Any) -> Any:
    """AOTAutograd with stage 2 on its joint graph, and no code generation."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        lift(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def inference(module: fx.GraphModule, inputs: Any) -> Any:
        lift(module.graph)
        module.recompile()
        return boxed_nop(module, inputs)

    compiler = aot_autograd(
        fw_compiler=boxed_nop,
        inference_compiler=inference,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return compiler(gm, list(example_inputs))


def _dump(gm: fx.GraphModule, config: S2OConfig, stage: str) -> None:
    if config.dump_dir is None:
        return
    folder = Path(config.dump_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = len(list(folder.glob(f"*-{stage}.txt")))
        (folder / f"graph{index}-{stage}.txt").write_text(gm.print_readable(print_output=False))
    except OSError as error:
        raise OptionError(f"option 'dump_dir' must be a folder that can be written; got {folder}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A setting of Inductor while installed: what it was before, and what `install` put there."""

    before: Any
    ours: Any


_installed: dict[str, _Setting] = {}


def install(options: Mapping[str, Any] | None = None) -> None:
    """Rewrites attention in everything that this process compiles with ``backend="inductor"``.

    For programs that name the backend themselves, such as the Hugging Face Trainer. Sets Inductor's
    two pass hooks, behind any pass that is there already, until `uninstall`. A program that hands
    its own pass for one of these hooks to ``torch.compile(options=...)`` replaces ours for that
    compilation: it should name ``backend="s2o"``, which puts ours behind it.

    Raises:
        OptionError: an option is unknown.
        S2OError: an option is Inductor's (set those in torch._inductor.config), or s2o is installed.
    """
    from torch._inductor import config as inductor_config

    from s2o_inductor.passes import pipeline

    require_torch()
    config, patches = split_options(options, None)
    if patches or config.inner != "inductor":
        raise S2OError(f"install takes options of s2o alone, with inner='inductor'; got {dict(options or {})!r}")
    if _installed:
        raise S2OError("s2o is installed already; call s2o_inductor.uninstall() first")
    passes = {
        "pre_grad_custom_pass": pipeline.RewriteSites(config, report.compilation_report),
        "joint_custom_pre_pass": pipeline.LiftMasks(config, report.latest),
    }
    for hook, ours in passes.items():
        before = getattr(inductor_config, hook)
        _installed[hook] = _Setting(before, pipeline.appended(before, ours))
    timing = getattr(inductor_config, "pre_grad_pass_timing", None)
    if timing == "default":
        # Before the cache look-up: the rewritten graph is then the key, and a hit is reported too.
        _installed["pre_grad_pass_timing"] = _Setting(timing, "early")
    for hook, setting in _installed.items():
        setattr(inductor_config, hook, setting.ours)


def uninstall() -> None:
    """Puts Inductor's settings back as they were before `install`; does nothing when not installed.

    What the user has set since then stays.
    """
    from torch._inductor import config as inductor_config

    for hook, setting in _installed.items():
        if getattr(inductor_config, hook) is setting.ours:
            setattr(inductor_config, hook, setting.before)
    _installed.clear()


def explain(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """Which attention of a model is rewritten, which is not, and why.

    Captures the model as torch.compile would, runs the passes and the rewritten graphs once on
    these inputs without generating code, and leaves everything compiled so far as it is. Runs the
    model: buffers that a forward updates are updated.

    Args:
        model: a module or function.
        *args: its inputs.
        options: `S2OConfig` fields.
        **kwargs: its inputs by name.

    Returns:
        A `Report`: print it, or take ``to_dict()``.
    """
    config, patches = split_options({**(options or {}), "inner": "aot_eager"}, None)
    del patches
    start = time.time()
    with report.separate() as graphs:
        with compiled_apart(model, config) as run:
            run(*args, **kwargs)
        module = model if isinstance(model, torch.nn.Module) else None
        result = report.Report(graphs, breaks.describe(breaks.loop_breaks(start), module))
        result.settle()
    return result


@contextlib.contextmanager
def compiled_apart(model: Callable[..., Any], config: S2OConfig) -> Iterator[Callable[..., Any]]:
    """The model compiled without code generation, apart from everything that the process has compiled."""
    require_torch()
    arguments, limits = _apart()
    with limits:
        backend = functools.partial(compile_graph, config=dataclasses.replace(config, inner="aot_eager"))
        yield _fresh(model, torch.compile(backend=_named(backend), **arguments))


def _named(backend: Callable[..., Any]) -> Callable[..., Any]:
    def s2o_explain(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return backend(gm, example_inputs)

    return s2o_explain


def _apart() -> tuple[dict[str, Any], contextlib.AbstractContextManager[Any]]:
    """Arguments and surroundings of torch.compile that keep an explanation out of recompile limits.

    Dynamo counts per code object, and a function that is called behind a graph break has its own:
    explaining would stop at the user's limit and, where regions cannot be isolated, uses some of it up.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return {"isolate_recompiles": True}, contextlib.nullcontext()
    return {}, torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)


def _fresh(model: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    """The model behind a function with a code object of its own.

    Dynamo keeps compiled graphs and its recompile limit per code object: without this, every
    explanation would count against the last one's.
    """
    namespace: dict[str, Any] = {"model": model}
    exec("def explained(*args, **kwargs):\n    return model(*args, **kwargs)\n", namespace)
    compiled: Callable[..., Any] = wrap(namespace["explained"])
    return compiled
