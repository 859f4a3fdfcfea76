"""Operators on the way from the dispatcher to their implementation: short where nothing is to be done between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from s2o_inductor import dispatch


class Noted:
    """An operator of its own, x * factor, whose steps are noted."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.library = torch.library.Library(dispatch.NAMESPACE, "FRAGMENT")
        self.library.define("noted(Tensor[] xs, float factor) -> Tensor")
        self.library.impl("noted", self.implementation, "CompositeExplicitAutograd")
        name = f"{dispatch.NAMESPACE}::noted"
        torch.library.register_fake(name, lambda xs, _: torch.empty_like(xs[0]), lib=self.library)

    def implementation(self, xs: list[Tensor], factor: float) -> Tensor:
        # Whether autograd is still to come shows in what a product with a leaf that needs gradients records.
        self.steps.append("recording" if (xs[0] * torch.ones(3, requires_grad=True)).requires_grad else "below")
        return xs[0].detach() * factor

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.steps.append("context")
        ctx.factor, ctx.count = inputs[1], len(inputs[0])

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Any, None]:
        self.steps.append("backward")
        return [grad * ctx.factor, *[None] * (ctx.count - 1)], None

    def __call__(self, *xs: Tensor) -> Tensor:
        found: Tensor = torch.ops.s2o.noted(list(xs), 2.0)
        return found


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noted]:
    made = Noted()
    monkeypatch.setattr(dispatch, "_LIBRARY", made.library)
    dispatch.register_autograd("noted", made.implementation, made.backward, made.setup_context)
    yield made
    made.library._destroy()


def test_without_gradients_the_implementation_is_called_at_once(noted: Noted) -> None:
    x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    assert torch.equal(noted(x), 2 * x) and noted.steps == ["recording"]
    with torch.no_grad():
        assert not noted(leaf).requires_grad
    with torch.inference_mode():
        assert noted(x).is_inference()
    assert not {"context", "backward"} & set(noted.steps)


def test_gradients_are_recorded_for_any_tensor_of_a_list(noted: Noted) -> None:
    x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    noted(leaf, x).sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert noted.steps == ["below", "context", "backward"]
    noted.steps.clear()
    assert noted(x, leaf).requires_grad and noted.steps == ["below", "context"]


def test_modes_and_subclasses_see_the_operator(noted: Noted) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Seen():
        noted(torch.randn(3))
    assert torch.ops.s2o.noted.default in seen
    noted.steps.clear()
    with FakeTensorMode() as mode:
        assert noted(mode.from_tensor(torch.randn(3))).shape == (3,)
    assert noted.steps == []


def test_transforms_and_compilers_see_it(noted: Noted) -> None:
    x = torch.randn(3)
    assert torch.equal(torch.func.functionalize(noted)(x), 2 * x)
    assert torch.equal(torch.compile(noted, backend="aot_eager", fullgraph=True)(x), 2 * x)
    leaf = torch.randn(3, requires_grad=True)
    torch.compile(noted, backend="aot_eager", fullgraph=True)(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.s2o.noted.default, ([leaf.detach().requires_grad_()], 2.0))
