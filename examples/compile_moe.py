"""Compiles the Triton kernels of routed experts side by side, so that a short benchmark measures and does not compile.

A call is walked through on the host, with kernels noted down instead of launched: which ones it runs follows from
shapes alone. Each kernel is then compiled into Triton's cache by a process of its own, without a GPU context.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from s2o_inductor.kernels import (
    cuda_moe,
    hopper_moe,
    launching,
    triton_moe_addresses,
    triton_moe_backward,
    triton_moe_first,
    triton_moe_plan,
    triton_moe_second,
)
from s2o_inductor.kernels.launching import Config
from s2o_inductor.kernels.moe_cpu import Experts, Gradients, PerExpert
from s2o_inductor.moe_spec import ExpertSpec

_LAUNCHERS = (triton_moe_addresses, triton_moe_plan, triton_moe_first, triton_moe_second, triton_moe_backward)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides which kernels a call in bfloat16 runs.

    Attributes:
        tokens, choices, experts, width, inner: T, K, E, l and I.
        spec: of `s2o_inductor.moe_spec`.
        training: with the first product kept, and the backward pass to every operand.
        separate: whether each expert has tensors of its own.
        processors, room: of the device, see `cuda_moe.Facts`.
        capability: of the device, 90 for Hopper.
    """

    tokens: int
    choices: int
    experts: int
    width: int
    inner: int
    spec: ExpertSpec
    training: bool
    processors: int
    room: int
    capability: int
    separate: bool = False

    @property
    def facts(self) -> cuda_moe.Facts:
        """What the choice of tiles depends on."""
        return cuda_moe.Facts(
            torch.bfloat16, self.tokens * self.choices, self.experts, self.processors, self.room,
            divmod(self.capability, 10),
        )  # fmt: skip


# A function that runs a call, and what it is called with: the shape first.
Walk = tuple[Any, ...]
Launch = tuple[Any, Sequence[Config], Callable[[Config], dict[str, Any]]]


@contextlib.contextmanager
def _noted(shape: Shape) -> Iterator[list[Launch]]:
    """Kernels are noted down instead of launched; tiles are those of the shape's device."""
    launches: list[Launch] = []
    before = [(module, "launch", module.launch) for module in _LAUNCHERS]
    before += [(hopper_moe, "try_launch", hopper_moe.try_launch), (cuda_moe, "facts_of", cuda_moe.facts_of)]

    def note(kernel: Any, configs: Sequence[Config], _: Any, arguments: Callable[[Config], dict[str, Any]]) -> None:
        arguments(configs[0])  # launches what this one needs, such as the table of tiles
        launches.append((kernel, configs, arguments))

    def note_tried(*launch: Any) -> bool:
        note(*launch[:-1])
        return True

    for module in _LAUNCHERS:
        module.launch = note
    hopper_moe.try_launch = note_tried
    cuda_moe.facts_of = lambda *_: shape.facts
    try:
        yield launches
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def whole_call(shape: Shape) -> None:
    """`cuda_moe`, forward or both ways. Tensors are of the host and never written, so take no memory to speak of."""

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype)

    def weights(*sizes: int) -> PerExpert:
        return [empty(*sizes) for _ in range(shape.experts)] if shape.separate else empty(shape.experts, *sizes)

    def first_and_second() -> tuple[PerExpert, PerExpert]:
        return weights(shape.spec.halves * shape.inner, shape.width), weights(shape.width, shape.inner)

    z = empty(shape.tokens, shape.width)
    ids = torch.zeros(shape.tokens, shape.choices, dtype=torch.int64)
    p = empty(shape.tokens, shape.choices, dtype=torch.float32)
    experts = Experts.of(shape.spec, *first_and_second(), None, None, None)
    _, kept = cuda_moe.forward(experts, z, ids, p, shape.training)
    if shape.training:
        first, second = first_and_second()
        into = Gradients(torch.empty_like(z), (first,), second, None, None, torch.empty_like(p))
        cuda_moe.backward(experts, torch.empty_like(z), z, ids, p, kept, into)


@functools.lru_cache(maxsize=4)
def _launches_of(walk: Walk) -> list[Launch]:
    with _noted(walk[1]) as launches:
        walk[0](*walk[1:])
    return launches


def _named(launch: Launch, shape: Shape, config: Config) -> dict[str, Any]:
    with _noted(shape):
        return {**launch[2](config), "BM": config.rows, "BN": config.keys}


def _jobs_of(walks: Sequence[Walk]) -> list[tuple[Walk, int]]:
    """Launches by their place in their walk, one for each kernel and kinds of arguments, the longest first."""
    found: dict[tuple[Any, ...], tuple[int, Walk, int]] = {}
    for walk in walks:
        for index, launch in enumerate(_launches_of(walk)):
            kernel, config = launch[0], launch[1][0]
            kind = launching.kind_of(kernel, config, _named(launch, walk[1], config))
            size = config.rows * config.keys * config.stages
            found.setdefault((kernel.__name__, *kind), (size, walk, index))
    return [(walk, index) for _, walk, index in sorted(found.values(), key=lambda job: -job[0])]


class _NoDriver:
    """Tells Triton what it compiles for; nothing is loaded or run."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_one(walk: Walk, index: int) -> dict[str, Any]:
    """Compiles a launch of a walk, in the first way that the device has room for, and the code that launches it.

    Returns:
        The kernel's name, its config, the shared memory it takes in bytes, its PTX, and seconds.
    """
    start, shape = time.time(), walk[1]
    triton.runtime.driver.set_active(_NoDriver(shape.capability))
    launch = _launches_of(walk)[index]
    for config in launch[1]:
        named = _named(launch, shape, config)
        values = [named[name] for name in launch[0].arg_names]
        compiled = launch[0].warmup(*values, grid=(1,), **config.options)
        if compiled.metadata.shared <= shape.room:
            break
    if torch.cuda.is_available():
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    return {
        "kernel": launch[0].__name__, "config": dataclasses.astuple(config), "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"], "seconds": time.time() - start,
    }  # fmt: skip


@contextlib.contextmanager
def compiling(walks: Sequence[Walk]) -> Iterator[None]:
    """Compiles what walks launch while the block runs, and until that is done."""
    start = time.time()
    jobs = _jobs_of(walks)
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(jobs) // 2, os.cpu_count() or 1))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [(job, pool.submit(compile_one, *job)) for job in jobs]
        yield
        done = []
        for (walk, _), future in futures:
            if (error := future.exception()) is not None:
                print(f"compiling for {walk[1:]}: {type(error).__name__}: {error}", flush=True)
            else:
                done.append(future.result())
    if done:
        slowest = max(done, key=lambda job: float(job["seconds"]))
        print(
            f"{len(done)} kernels compiled in {time.time() - start:.0f} s by {workers} processes; slowest "
            f"{slowest['kernel']} {slowest['config']}, {slowest['seconds']:.1f} s", flush=True,
        )  # fmt: skip
