"""Which mixtures of experts are left to Inductor where the user does not ask for them, and that asking is enough."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from moe_idioms import Batched, Grouped
from torch import nn
from torch._inductor import config as inductor_config

import s2o_inductor
from s2o_inductor.passes import moe, moe_defaults
from s2o_inductor.passes.records import ExpertsSite

QWEN3 = {"width": 2048, "inner": 768, "experts": 128, "choices": 8}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def status(model: nn.Module, x: torch.Tensor, training: bool = False, **options: Any) -> tuple[str, str]:
    """What the report says about the one site of a model."""
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend="s2o", options={"inner": "aot_eager", **options}, dynamic=False)(x)
    (site,) = (site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe")
    return site["status"], site["reason"] or ""


def test_gathered_matrices_of_few_tokens_stay_on_cpu() -> None:
    few, more = torch.randn(1, moe_defaults.FEW_TOKENS - 1, 24), torch.randn(1, moe_defaults.FEW_TOKENS, 24)
    found, reason = status(Batched(), few)
    assert found == "declined" and "experts=True" in reason
    assert status(Batched(), few, experts=True)[0] == "rewritten"
    assert status(Batched(), few, training=True)[0] == "rewritten"
    assert status(Batched(), more)[0] == "rewritten"
    assert status(Grouped(), few)[0] == "rewritten"


def test_grouped_products_of_half_precision_stay_in_training_on_cpu() -> None:
    x = torch.randn(2, 6, 24)
    found, reason = status(Grouped().bfloat16(), x.bfloat16(), training=True)
    assert found == "declined" and "experts=True" in reason
    assert status(Grouped().bfloat16(), x.bfloat16(), training=True, experts=True)[0] == "rewritten"
    assert status(Grouped().bfloat16(), x.bfloat16())[0] == "rewritten"
    assert status(Batched().bfloat16(), x.bfloat16(), training=True)[0] == "rewritten"


def test_strict_does_not_mind_what_is_left() -> None:
    assert status(Batched(), torch.randn(1, 2, 24), strict=True)[0] == "declined"


def test_off_finds_nothing() -> None:
    torch.compile(Grouped(), backend="s2o", options={"inner": "aot_eager", "experts": False})(torch.randn(2, 6, 24))
    assert not [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe"]


def found_in(kind: type[nn.Module], tokens: int, **sizes: int) -> ExpertsSite:
    """The site of a model in bfloat16 that never runs: its memory is never written."""
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return lambda *inputs: (inputs[0],)

    with torch.device("meta"):
        model, x = kind(**sizes), torch.empty(1, tokens, sizes["width"])
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16)))
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.zeros(x.shape, dtype=torch.bfloat16))
    sites, declined = moe.find_experts(graphs[0].graph)
    assert len(sites) == 1, declined
    return sites[0]


def left_on_cuda(site: ExpertsSite, graphs: bool = False) -> bool:
    """As if the site's tensors were a GPU's."""
    real = moe_defaults.fake

    def elsewhere(node: Any) -> Any:
        x = real(node)
        return None if x is None else mock.Mock(wraps=x, device=torch.device("cuda"), shape=x.shape, itemsize=2)

    with mock.patch.object(moe_defaults, "fake", elsewhere), inductor_config.patch({"triton.cudagraphs": graphs}):
        reason = moe_defaults.better_left(site)
    assert reason is None or "reduce-overhead" in reason
    return reason is not None


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_layers_that_wait_for_the_host_stay_on_cuda(tokens: int) -> None:
    """At 512 tokens a layer of Qwen3-30B-A3B was slower rewritten, at 8,192 faster (BENCHMARKS.md)."""
    site = found_in(Grouped, tokens, **QWEN3)
    assert left_on_cuda(site) and not left_on_cuda(site, graphs=True)


def test_layers_that_keep_a_gpu_busy_are_rewritten() -> None:
    assert not left_on_cuda(found_in(Grouped, 8192, **QWEN3))
    # Few rows that read many matrices keep it busy, too.
    assert not left_on_cuda(found_in(Grouped, 512, width=1024, inner=2688, experts=512, choices=22))


def test_sizes_that_nobody_knows_are_rewritten() -> None:
    site = found_in(Grouped, 64, **QWEN3)
    unknown = mock.Mock(spec=torch.SymInt)
    unknown.node = mock.Mock(**{"has_hint.return_value": False})
    ids = mock.Mock(device=torch.device("cuda"), shape=(unknown, 8))
    real = moe_defaults.fake
    weights = mock.Mock(wraps=real(site.last), device=torch.device("cuda"), shape=real(site.last).shape, itemsize=2)
    with mock.patch.object(moe_defaults, "fake", lambda node: ids if node is site.ids else weights):
        assert moe_defaults.better_left(site) is None


def test_how_a_graph_is_compiled_is_known_to_the_passes() -> None:
    seen = []
    real = moe_defaults.better_left

    def noted(site: ExpertsSite) -> str | None:
        seen.append(inductor_config.triton.cudagraphs)
        return real(site)

    before = inductor_config.triton.cudagraphs
    with mock.patch.object(moe_defaults, "better_left", noted):
        model = Grouped()
        for mode in ("reduce-overhead", "default"):
            torch._dynamo.reset()
            with torch.no_grad():
                torch.compile(model, backend="s2o", mode=mode)(torch.randn(2, 6, 24))
    assert seen == [True, before] and inductor_config.triton.cudagraphs == before
