"""Experts under what models are compiled with: bfloat16, autocast, symbolic sizes, checkpoints, Inductor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import moe_idioms
import pytest
import torch
from capture import capture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import s2o_inductor
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import moe, pipeline
from s2o_inductor.report import GraphReport
from s2o_inductor.testing import assert_close_to_gold

LAYERS: dict[str, Any] = {**moe_idioms.CAPTURED, **moe_idioms.UNROLLED, "loop, prepared": moe_idioms.HitExperts}
SOME = ("latent", "dense, interleaved", "loop, prepared")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def build(name: str) -> nn.Module:
    model: nn.Module = LAYERS[name]()
    if name == "loop, prepared":
        assert s2o_inductor.prepare(model).prepared
    return model


def step(model: nn.Module, x: Tensor, call: Any) -> dict[str, Tensor]:
    """Output and gradients of the parameters and the input."""
    x = x.clone().requires_grad_()
    result = call(x)
    y = result[0] if isinstance(result, tuple) else result
    names, leaves = zip(("x", x), *model.named_parameters(), strict=True)
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    return {"output": y.detach(), **dict(zip(names, grads, strict=True))}


def check(model: nn.Module, x: Tensor, run: Any, **how: Any) -> None:
    """One compiled step as exact as an eager one, with every site rewritten."""
    gold_model = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="s2o", options={"inner": "aot_eager", "experts": True}, **how)
    actual, expected = run(model, x, compiled), run(model, x, model)
    gold = step(gold_model, x.double(), gold_model)
    sites = s2o_inductor.last_report().to_dict()["sites"]
    assert sites and all((site["kind"], site["status"]) == ("moe", "rewritten") for site in sites), sites
    for key, value in actual.items():
        assert_close_to_gold(value, expected[key], gold[key], what=key, condition=8.0)


@pytest.mark.parametrize("name", ["dense, interleaved", "latent", "one-hot loop"])
def test_first_products_are_kept_for_a_backward_pass_alone(name: str) -> None:
    """They may be most of what a call takes of memory. Views of parameters require gradients under no_grad too."""
    model, x = build(name), torch.randn(2, 6, 24)
    for mode, kept in ((torch.no_grad(), False), (torch.inference_mode(), False), (torch.enable_grad(), True)):
        with mode:
            gm, _ = capture(model, x)
            pipeline.rewrite_dynamo_graph(gm, S2OConfig(experts=True), GraphReport())
        (call,) = (node for node in gm.graph.nodes if "moe_experts" in str(node.target))
        assert call.args[-2] is kept, mode


@pytest.mark.parametrize("name", SOME)
def test_models_in_bfloat16(name: str) -> None:
    check(build(name).bfloat16(), torch.randn(2, 6, 24).bfloat16(), step)


def autocast_step(model: nn.Module, x: Tensor, call: Any) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return step(model, x, call)


AUTOCAST = ("grouped products", "batched products", "indexed einsum", "gated columns", "every expert", *SOME)


class Unlowered(nn.Linear):
    """A router that autocast leaves alone: in bfloat16 its errors would hide those of the experts."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast(name: str) -> None:
    model = build(name)
    model.router.__class__ = Unlowered
    check(model, torch.randn(2, 6, 24), autocast_step, fullgraph=True)


@pytest.mark.parametrize("name", ["dense, interleaved", "every expert"])
def test_the_weights_decide_the_dtype_under_autocast(name: str) -> None:
    # A cast of all experts' weights in every step takes longer than the products that it speeds up.
    model, x = build(name), torch.randn(2, 6, 24)
    compiled = torch.compile(model, backend="s2o", options={"inner": "aot_eager", "experts": True}, fullgraph=True)
    autocast_step(model, x, compiled)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert (site["status"], site["shape"]["dtype"]) == ("rewritten", "float32")


def test_products_that_are_lowered_by_hand_stay_as_they_are() -> None:
    model, x = build("every expert"), torch.randn(2, 6, 24)
    model.experts[0].down.bfloat16()
    model.experts[0].down.register_forward_pre_hook(lambda _, given: given[0].bfloat16())
    gm, _ = capture(model, x)
    sites, declined = moe.find_experts(gm.graph)
    assert not sites and declined


@pytest.mark.parametrize("name", ["batched products", "grouped, scattered", "gated columns", "one-hot loop", *SOME])
def test_one_graph_serves_every_number_of_tokens(name: str) -> None:
    model = build(name)
    compiled = torch.compile(
        model, backend="s2o", options={"inner": "aot_eager", "experts": True}, dynamic=True, fullgraph=True
    )
    for tokens in (5, 9, 31):
        x = torch.randn(1, tokens, 24)
        with torch.no_grad():
            actual, expected = compiled(x), model(x)
        for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (actual, expected)), strict=True):
            loose = name == "grouped, scattered"  # its products are in bfloat16
            torch.testing.assert_close(one, other, rtol=2e-2 if loose else 1e-5, atol=5e-2 if loose else 1e-5)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["status"] == "rewritten" and not isinstance(site["shape"]["tokens"], int)


@pytest.mark.parametrize("name", ["batched products", "loop, prepared"])
def test_inside_a_checkpoint(name: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build(name)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=False)

    check(Checkpointed(), torch.randn(2, 6, 24), step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batched products", "loop, prepared"])
def test_through_inductor(name: str) -> None:
    model, x = build(name), torch.randn(2, 6, 24)
    compiled = torch.compile(model, backend="s2o", options={"experts": True})
    actual, expected = step(model, x, compiled), step(model, x, model)
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["route"] == "cpu-grouped"
