"""`prepare` on a device that forgives nothing, as CUDA does: simulated, see `other_device.py`."""

from __future__ import annotations

from collections.abc import Iterator

import moe_idioms
import other_device
import pytest
import torch
from test_moe_prepare import first, state
from torch import Tensor, nn

import s2o_inductor
from s2o_inductor import moe_ops
from s2o_inductor.loops import preparation


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Reshaping(moe_idioms.EveryExpert):
    """Takes hidden states of any width that fills whole rows, and then indexes beyond their end (Qwen3-MoE)."""

    def forward(self, x: Tensor) -> Tensor:
        ids, p = self.route(x.view(-1, 24))
        flat = x.view(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out[token] += p[token, slot, None] * expert(flat[token])
        return out.view_as(x)


class Scaled(moe_idioms.EveryExpert):
    """Holds a tensor that is no buffer, as code that is written for one device does."""

    scale: Tensor

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        return super().route(flat * self.scale)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device like CUDA: no operator in float64, and the first failure there is the last thing that happens."""
    monkeypatch.setitem(moe_ops._KERNELS, other_device.DEVICE.type, (torch.float32,))
    monkeypatch.setattr(moe_ops, "ROUTED_DEVICES", ("cpu", other_device.DEVICE.type))
    monkeypatch.setattr(preparation, "_is_plain", lambda _: True)
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != other_device.DEVICE.type and enabled(kind))
    other_device.broken.clear()
    with other_device.Installed():
        yield


@pytest.mark.parametrize(
    ("name", "small"),
    [("hit experts", True), ("hit experts", False), ("folded matrices", True), ("strange sizes", True)],
)
def test_models_on_another_device(name: str, small: bool, elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may fail is tried on the CPU, and nothing meets tensors of another device."""
    monkeypatch.setattr(preparation, "MAX_DOUBLE", 2**25 if small else 0)
    model = other_device.put_there(nn.Sequential(Reshaping() if name == "strange sizes" else moe_idioms.LOOPS[name]()))
    x = torch.randn(2, 4, 24).to(other_device.DEVICE)
    expected = first(model(x)).to("cpu")
    (entry,) = s2o_inductor.prepare(model).entries
    assert not other_device.broken
    assert entry.status == "prepared" and entry.verified.endswith("in float64") == small, entry
    torch.testing.assert_close(first(model(x)).to("cpu"), expected, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_no_buffer(elsewhere: None) -> None:
    model = other_device.put_there(Scaled())
    model.scale = (torch.rand(24) + 0.5).to(other_device.DEVICE)
    x = torch.randn(2, 4, 24).to(other_device.DEVICE)
    expected = model(x).to("cpu")
    (entry,) = s2o_inductor.prepare(model).entries
    assert entry.status == "prepared" and not other_device.broken, entry
    torch.testing.assert_close(model(x).to("cpu"), expected, rtol=1e-5, atol=1e-5)


def test_models_in_float64_on_a_device_without_such_operators(elsewhere: None) -> None:
    model = other_device.put_there(moe_idioms.HitExperts().double())
    names = state(model)["names"]
    (entry,) = s2o_inductor.prepare(model).entries
    assert entry.status == "declined" and "kernel for experts in torch.float64" in entry.reason
    assert state(model)["names"] == names and not other_device.broken
