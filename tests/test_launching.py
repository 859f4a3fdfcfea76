"""Launches: which compiled kernel a call finds again, and that hooks see it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from s2o_inductor.kernels import launching  # noqa: E402
from s2o_inductor.kernels.launching import Config, Tiles, launch  # noqa: E402
from s2o_inductor.kernels.triton_moe_tiles import IN_OUT, OUT_IN, POINTERS, Weights  # noqa: E402


class Compiled:
    """Stands for what Triton compiled: it notes how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(("run", *arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values: self.calls.append(("with hooks", grid, *values))


def signature(
    x_ptr: Any, x_steps: Any, x_tiles: Any, scale: Any, rows: Any, other_ptr: Any, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Of `Kernel`; nobody calls it."""


class Kernel:
    """Stands for a jitted kernel; `made` is what it compiled, with the options."""

    def __init__(self, fails: Callable[[dict[str, Any]], bool] = lambda options: False) -> None:
        self.fn, self.arg_names = signature, list(inspect.signature(signature).parameters)
        self.made: list[tuple[Compiled, dict[str, Any]]] = []
        self.fails = fails

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def compiled(*values: Any, **options: Any) -> Compiled:
            if self.fails(options):
                raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
            self.made.append((Compiled(), options))
            return self.made[-1][0]

        return compiled


MEMORY = torch.empty(256)


def arguments(**changed: Any) -> dict[str, Any]:
    tiles = Tiles(MEMORY, [16, 16], [16, 1], [16, 16])
    given = {"x_ptr": MEMORY, "x_steps": (16, 1), "x_tiles": tiles, "scale": 0.5, "rows": 7, "other_ptr": None}
    return {**given, "WIDTH": 16, **changed}


def run(kernel: Any, configs: list[Config], **changed: Any) -> None:
    launch(kernel, configs, lambda config: 3, lambda _: arguments(**changed))


@pytest.fixture(autouse=True)
def a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def get_current_stream(self, device: int | None) -> str:
            return "stream"

    monkeypatch.setattr(type(triton.runtime.driver), "active", Driver(), raising=True)


CONFIG = Config(16, 32, 4, 2)


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({}, True),
        ({"x_ptr": MEMORY[4:]}, True),  # where it lies, but for its alignment
        ({"scale": 0.25, "rows": 1}, True),
        ({"x_steps": (32, 1)}, True),
        ({"x_ptr": MEMORY[1:]}, False),
        ({"x_ptr": MEMORY.int()}, False),
        ({"x_steps": (17, 1)}, False),
        ({"x_steps": (16, 2)}, False),
        ({"x_steps": (1 << 32, 1)}, False),
        ({"x_tiles": Tiles(MEMORY, [16, 16], [16, 1], [16, 8])}, False),
        ({"x_tiles": Tiles(MEMORY.int(), [16, 16], [16, 1], [16, 16])}, False),
        ({"x_tiles": None}, False),
        ({"other_ptr": MEMORY}, False),
        ({"WIDTH": 8}, False),
    ],
)
def test_what_was_compiled_runs_again_for_arguments_of_the_same_kinds(changed: dict[str, Any], again: bool) -> None:
    kernel = Kernel()
    run(kernel, [CONFIG])
    run(kernel, [CONFIG], **changed)
    assert len(kernel.made) == (1 if again else 2)
    if again:
        how, *grid, stream, function, metadata, _, enter, leave = kernel.made[0][0].calls[0][:10]
        values = kernel.made[0][0].calls[0][10:]
        assert (how, grid, stream, function, metadata) == ("run", [3, 1, 1], "stream", "function", "metadata")
        assert enter is leave is None
        expected = {**arguments(**changed), "BM": 16, "BN": 32}
        named = dict(zip(kernel.arg_names, values, strict=True))
        assert named["x_ptr"] is expected["x_ptr"]
        assert all(named[name] == expected[name] for name in expected if name not in ("x_ptr", "x_tiles"))


def test_every_config_is_compiled_for_itself() -> None:
    kernel = Kernel()
    others = [Config(16, 32, 8, 2), Config(16, 32, 4, 3), Config(16, 16, 4, 2), Config(16, 32, 4, 2, registers=64)]
    configs = [CONFIG, *others]
    for config in configs * 2:
        run(kernel, [config])
    assert [made[1] for made in kernel.made] == [config.options for config in configs]
    assert all(len(made[0].calls) == 1 for made in kernel.made)


def test_a_config_without_room_is_passed_over_and_not_compiled_again() -> None:
    tried: list[int] = []

    def fails(options: dict[str, Any]) -> bool:
        tried.append(options["num_stages"])
        return bool(options["num_stages"] > 1)

    kernel = Kernel(fails)
    for _ in range(2):
        run(kernel, [Config(16, 32, 4, 3), CONFIG, Config(16, 32, 4, 1)])
    assert tried == [3, 2, 1] and len(kernel.made[0][0].calls) == 1
    with pytest.raises(triton.runtime.errors.OutOfResources):
        run(kernel, [Config(16, 32, 4, 3), CONFIG])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_a_launch(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, knobs = Kernel(), triton.knobs.runtime
    run(kernel, [CONFIG])
    getattr(knobs, hook).add(print)
    try:
        run(kernel, [CONFIG])
    finally:
        getattr(knobs, hook).remove(print)
    monkeypatch.setattr(knobs, hook, print)  # as profilers set it
    run(kernel, [CONFIG])
    monkeypatch.undo()
    assert [call[:2] for call in kernel.made[0][0].calls] == [("with hooks", (3, 1, 1))] * 2


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 3), out=st.integers(1, 20), inner=st.integers(1, 20), pad=st.integers(0, 1),
    turned=st.booleans(), halves=st.booleans(), dtype=st.sampled_from((torch.bfloat16, torch.float32)),
)  # fmt: skip
def test_tiles_of_weights_are_the_weights(
    experts: int, out: int, inner: int, pad: int, turned: bool, halves: bool, dtype: torch.dtype
) -> None:
    unit, out = 16 // dtype.itemsize, 2 * out if halves else out
    lines, width = (inner, out) if turned else (out, inner)
    room = -(-width // unit) * unit + pad
    memory = torch.arange(experts * lines * room).to(dtype).view(experts, lines, room)[..., :width]
    w = memory.mT if turned else memory
    weights = Weights.of(w, 16, 32, halves)
    assert weights.steps == w.stride()
    if weights.layout == POINTERS.value:
        assert weights.source is w
        # Only what no descriptor may hold: rows, or halves of them, that do not start at multiples of 16 bytes.
        assert pad or (turned and halves and out // 2 % unit)
        return
    tiles = weights.source
    assert isinstance(tiles, Tiles)
    launching.TensorDescriptor(tiles.base, tiles.shape, tiles.strides, tiles.block_shape)  # Triton's own checks
    held = torch.as_strided(tiles.base, tiles.shape, tiles.strides)
    if weights.layout == OUT_IN.value:
        found, block = held.reshape(experts, out, inner), [1, 2, 16, 32] if halves else [1, 16, 32]
    else:
        assert weights.layout == IN_OUT.value
        found, block = held.reshape(experts, inner, out).mT, [1, 32, 2, 16] if halves else [1, 32, 16]
    assert tiles.block_shape == block and torch.equal(found, w)
