"""The host's side of the Triton kernels: operands as tiles, masks as arguments, and cheap launches."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2o_inductor.kernels import primitives as p
from s2o_inductor.kernels.operands import aligned

log = logging.getLogger("s2o_inductor")
# Integers of a kernel on whose value Triton must not specialise: every new one would compile again.
UNSPECIALIZED = [
    "queries", "keys", "lower", "upper", "heads", "group", "section", "splits", "limit", "tiles_heads",
    # Of the sparse kernels: positions and tiles, places in their tables, and the density as a fraction.
    "window", "sink", "first_tile", "tile0", "count", "tiles", "base", "room", "places", "segments", "blocks",
    "groups", "numerator", "denominator",
    # Of routed experts: choices in all, and rows of scores.
    "pairs", "rows",
]  # fmt: skip
_UNSPECIALIZED = frozenset(UNSPECIALIZED)
# What heads that run side by side read should stay in the L2 cache of a data-centre GPU.
_CACHED_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class TileMask:
    """A mask as the kernels take it.

    Attributes:
        lower, upper: ``lower <= k - q <= upper``; None sets no limit.
        query_terms, key_terms, row_tiles, key_tiles: what `s2o::attention_mask` returns, contiguous, or
            None when the band says everything.
        equal, at_most: whether rows 0 and 1 of the terms hide anything.
        dense: boolean (True is visible) or additive, broadcastable to (B, Hq, Sq, Sk), or None.
    """

    lower: int | None = None
    upper: int | None = None
    query_terms: Tensor | None = None
    key_terms: Tensor | None = None
    row_tiles: Tensor | None = None
    key_tiles: Tensor | None = None
    equal: bool = True
    at_most: bool = True
    dense: Tensor | None = None

    @property
    def is_additive(self) -> bool:
        """Whether the dense mask adds to the scores."""
        return self.dense is not None and self.dense.dtype != torch.bool

    def arguments(
        self, queries: int, keys: int, tiles: Tensor | None, block: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """What a kernel is told about the mask.

        Args:
            queries: Sq.
            keys: Sk.
            tiles: the table that the kernel walks, `row_tiles` or `key_tiles`.
            block: queries and keys of the tiles in which it reads a dense mask; None if it does so
                through pointers.
        """
        # Limits beyond the matrix say nothing more than its edges do; clamped, they fit an int32.
        lower = None if self.lower is None else min(max(self.lower, -queries), keys)
        upper = None if self.upper is None else max(min(self.upper, keys), -queries)
        terms = 0
        if lower is not None:
            terms |= p.LOWER.value
        if upper is not None:
            terms |= p.UPPER.value
        if self.query_terms is not None:
            terms |= p.EQUAL.value * self.equal | p.AT_MOST.value * self.at_most
        if tiles is not None:
            terms |= p.TILES.value
        dense: Tensor | TensorDescriptor | None = None
        steps: tuple[int, ...] = (0, 0, 0)
        if self.dense is not None:
            terms |= p.ADDITIVE.value if self.is_additive else p.BOOLEAN.value
            if block is None:
                terms |= p.POINTERS.value
                dense = self.dense
                steps = tuple(s * (n > 1) for n, s in zip(dense.shape, dense.stride(), strict=True))
            else:
                terms |= p.ONE_ROW.value * (self.dense.shape[2] == 1)
                dense, steps = _dense_tiles(self.dense, keys, block)
        return {
            "query_terms_ptr": self.query_terms,
            "key_terms_ptr": self.key_terms,
            "tiles_ptr": tiles,
            "tiles_heads": 1 if tiles is None else tiles.shape[1],
            "dense": dense,
            "steps": steps,
            "lower": lower or 0,
            "upper": upper or 0,
            "TERMS": terms,
        }


class Tiles(TensorDescriptor):  # type: ignore[misc]
    """A tensor in tiles, made of numbers that are known to be right.

    Triton's own class checks each of them, and the address, whenever one is made, which takes longer than all else.
    """

    def __post_init__(self) -> None:
        """Checks nothing."""


def _dense_tiles(mask: Tensor, keys: int, block: tuple[int, int]) -> tuple[TensorDescriptor, tuple[int, ...]]:
    """A dense mask in tiles of `block`, and by how much a step in batch, head and query moves in it (0 or 1)."""
    x = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if x.dtype == torch.float64:
        x = x.float()
    rows = block[0] if x.shape[2] > 1 else 1
    x = aligned(x.expand(*x.shape[:3], keys))
    steps = tuple(int(n > 1) for n in x.shape[:3])
    return Tiles(x, list(x.shape), list(x.stride()), [1, 1, rows, block[1]]), steps


def tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B, H, S, D), `aligned`, in tiles of `rows` rows of one head, padded with zeros to `block_width` columns.

    On Hopper and later such tiles are fetched by the bulk copy engine, elsewhere by ordinary loads.
    """
    return Tiles(x, list(x.shape), list(x.stride()), [1, 1, rows, block_width(x.shape[3])])


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B * H, S), contiguous, in pieces of `rows` of its numbers; S is a multiple of `rows`."""
    return Tiles(x, list(x.shape), list(x.stride()), [1, rows])


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` prepares for compile time first, which takes ten times as long."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n, a positive number; see `ceil_div`."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def block_width(width: int) -> int:
    """Columns of a tile that holds `width`: a power of two that a matrix instruction takes."""
    return max(16, power_of_2(width))


def heads_last(like: Tensor, heads: int, length: int, width: int) -> Tensor:
    """An empty (B, heads, length, width) in memory of (B, length, heads, width)."""
    return torch.empty((like.shape[0], length, heads, width), dtype=like.dtype, device=like.device).transpose(1, 2)


def section_heads(length: int, row_bytes: int) -> int:
    """How many heads to run side by side so that the rows they share stay in the L2 cache."""
    return max(1, _CACHED_BYTES // (length * row_bytes))


@dataclasses.dataclass(frozen=True)
class Config:
    """One way to run a kernel: tile of query rows, tile of keys, warps, software-pipeline stages.

    `registers` is the most that a thread may have, where fewer let more programs share a multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def options(self) -> dict[str, int | None]:
        """What Triton is told besides the kernel's arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# Measured on an H200; elsewhere the first that fits runs.
def forward_configs(dtype: torch.dtype, width: int, dense: bool = False) -> list[Config]:
    """Ways to run the forward kernel, fastest first; one that needs too much shared memory is passed over.

    Args:
        dtype: of q, k and v.
        width: the larger of the head sizes D and Dv.
        dense: whether a dense mask takes shared memory, too.
    """
    # Exact products: with three of tf32 instead, 5 of 15 random float32 cases missed the error bound.
    if dtype == torch.float32:
        return [Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    if width <= 128:  # two programs share a multiprocessor, and its memory
        return [Config(64, 64, 4, 2 if dense else 3), Config(64, 64, 4, 2), Config(64, 32, 4, 1)]
    if width <= 256:
        return [Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)]
    return [Config(64, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 4, 1)]


def key_value_configs(dtype: torch.dtype, width: int) -> list[Config]:
    """Ways to run the dk and dv kernel, fastest first; see `forward_configs`."""
    if dtype == torch.float32:
        return [Config(32, 32, 8, 1), Config(16, 16, 4, 1)]
    if width <= 64:
        return [Config(128, 64, 4, 2), Config(64, 64, 4, 2), Config(32, 64, 4, 1)]
    if width <= 128:
        return [Config(64, 64, 4, 2), Config(32, 64, 4, 1), Config(32, 32, 4, 1)]
    if width <= 256:
        return [Config(64, 64, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 4, 1)]
    return [Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 4, 1)]


def query_configs(dtype: torch.dtype, width: int) -> list[Config]:
    """Ways to run the dq kernel, fastest first; see `forward_configs`."""
    if dtype == torch.float32:
        return [Config(32, 32, 8, 1), Config(16, 16, 4, 1)]
    if width <= 64:
        return [Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 1)]
    if width <= 128:
        return [Config(64, 64, 4, 2), Config(64, 32, 4, 1), Config(32, 32, 4, 1)]
    if width <= 256:
        return [Config(128, 64, 8, 1), Config(64, 32, 8, 1), Config(32, 32, 4, 1)]
    return [Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 4, 1)]


class _Kernel:
    """What `launch` has to know about a jitted kernel, found once.

    Attributes:
        jitted: the kernel, which `id` must go on to name.
        values: reads the arguments from a dictionary, in the order of the parameters.
        constants: reads those that are constants of the compiled code.
        checked: reads those on which Triton may specialise.
        compiled: what was compiled, by device and `kind_of`; None where it needs too much memory.
    """

    def __init__(self, jitted: Any) -> None:
        parameters = inspect.signature(jitted.fn).parameters.values()
        constants = [one.name for one in parameters if "constexpr" in str(one.annotation)]
        self.jitted = jitted
        self.values = operator.itemgetter(*jitted.arg_names)
        self.constants = operator.itemgetter(*constants)
        checked = [name for name in jitted.arg_names if name not in _UNSPECIALIZED and name not in constants]
        self.checked = operator.itemgetter(*checked, "BM", "BN")  # two integers make it a tuple, whatever else there is
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def kind_of(self, config: Config, named: dict[str, Any]) -> tuple[Any, ...]:
        """What the compiled code depends on, the device aside."""
        found: list[Any] = [config.warps, config.stages, config.registers, self.constants(named)]
        for value in self.checked(named):
            if value is None:
                found.append(None)
            elif isinstance(value, Tensor):
                found.append(value.dtype)
                found.append(value.data_ptr() % 16 == 0)
            elif isinstance(value, tuple):
                found.append(_kind_of_numbers(value))
            elif isinstance(value, int):
                found.append(value)
            elif not isinstance(value, float):  # a descriptor of Triton's, or one of Gluon's
                found.append(value.base.dtype)
                found += value.block_shape
        return tuple(found)


@functools.lru_cache(maxsize=1024)
def _kind_of_numbers(numbers: tuple[int, ...]) -> tuple[Any, ...]:
    """What Triton may specialise on in a tuple of strides."""
    return tuple((x if x in (0, 1) else 2, x % 16 == 0, x < 1 << 31) for x in numbers)


_kernels: dict[int, _Kernel] = {}


def kind_of(kernel: Any, config: Config, named: dict[str, Any]) -> tuple[Any, ...]:
    """What of a launch the compiled code depends on, hashable; `named` are its arguments, BM and BN among them."""
    return _known(kernel).kind_of(config, named)


def _known(kernel: Any) -> _Kernel:
    found = _kernels.get(id(kernel))
    if found is None:
        found = _kernels[id(kernel)] = _Kernel(kernel)
    return found


def launch(
    kernel: Any, configs: Sequence[Config], grid: Callable[[Config], int],
    arguments: Callable[[Config], dict[str, Any]],
) -> None:  # fmt: skip
    """Runs the first configuration that the device has room for.

    Triton takes 200 us to find the compiled kernel for so many arguments. Found once, it is called
    directly for arguments of the same kinds, which takes a fraction of that.

    Args:
        kernel: jitted, with constexpr parameters BM and BN; integers it takes are all in `UNSPECIALIZED`.
        configs: candidates in order of preference.
        grid: number of programs.
        arguments: the kernel's other arguments, by name, in a dictionary to which BM and BN are added.

    Raises:
        triton.runtime.errors.OutOfResources: none fits.
    """
    known = _known(kernel)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    for config in configs:
        named = arguments(config)
        named["BM"], named["BN"] = config.rows, config.keys
        key = (device, *known.kind_of(config, named))
        compiled = known.compiled.get(key, False)
        if compiled is None and config is not configs[-1]:
            continue
        if compiled:
            _run(compiled, grid(config), device, known.values(named))
            return
        try:
            # The interpreter returns None here: it has nothing to keep.
            compiled = kernel[(grid(config),)](*known.values(named), **config.options)
        except triton.runtime.errors.OutOfResources:
            known.compiled[key] = None
            if config is configs[-1]:
                raise
            continue
        if compiled is not None:
            known.compiled[key] = compiled
        return


def _run(compiled: Any, programs: int, device: int | None, values: tuple[Any, ...]) -> None:
    """Launches a compiled kernel that ran before, on the current stream of the device, which is the current one."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # chains, each by default an empty one
        compiled[(programs, 1, 1)](*values)
        return
    # Without hooks nobody reads what Triton would gather for them at every launch.
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


# Kinds of calls of experimental kernels that did not compile; they are not tried again.
_failed: set[tuple[Any, ...]] = set()


def try_launch(
    kernel: Any, configs: Sequence[Config], grid: Callable[[Config], int],
    arguments: Callable[[Config], dict[str, Any]], kind: tuple[Any, ...],
) -> bool:  # fmt: skip
    """`launch` of a kernel in Gluon, which is experimental, if the installed Triton compiles it; whether it ran.

    Args:
        kernel: as for `launch`, like the following three.
        configs: see there.
        grid: see there.
        arguments: see there.
        kind: what compiling depends on. One that failed is not tried again.

    Raises:
        torch.OutOfMemoryError: no memory is left for an argument.
        torch.AcceleratorError: the device failed before.
    """
    if (id(kernel), *kind) in _failed:
        return False
    try:
        launch(kernel, configs, grid, arguments)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # RuntimeErrors, which say nothing of the kernel
        raise
    except (triton.errors.TritonError, RuntimeError) as error:  # an MLIR pass that fails raises the latter
        text = str(error)[:500]
        log.warning(
            "Gluon's %s of %s does not compile here, the next runs: %s", kernel.__name__, kernel.__module__, text
        )
        _failed.add((id(kernel), *kind))
        return False
    return True
