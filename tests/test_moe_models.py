"""Routed experts of unchanged Hugging Face models: found, verified, and equal to eager in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture import capture
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import s2o_inductor
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import moe, moe_verify, pipeline, rewrite
from s2o_inductor.report import GraphReport

transformers = pytest.importorskip("transformers")
BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "qwen3": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 3}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


def build(name: str, implementation: str) -> torch.nn.Module:
    config, fields = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**BASE, **fields))
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_rewritten_and_trains_as_in_eager(name: str, implementation: str) -> None:
    model = build(name, implementation)
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, use_cache=False).logits
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="s2o", options={"inner": "aot_eager", "experts": True})
    actual = compiled(tokens, use_cache=False).logits
    found = torch.autograd.grad(actual.square().sum(), list(model.parameters()))
    sites = [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe"]
    assert [(site["status"], site["reason"]) for site in sites] == [("rewritten", None)] * 2
    assert all(site["verified"].startswith("verified") and site["route"] == "cpu-grouped" for site in sites)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    scale = max(float(x.abs().max()) for x in grads)
    for one, other in zip(found, grads, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * scale


def layer(reuse: bool) -> Any:
    """A grouped layer of which, with `reuse`, the outputs of single experts leave it as well."""

    def function(x: Any, w1: Any, w2: Any, scores: Any) -> Any:
        p, ids = scores.topk(2, dim=-1)
        chosen, order = torch.sort(ids.reshape(-1))
        y = torch.bmm(w1[chosen], x[order // 2].unsqueeze(-1)).squeeze(-1).relu().square()
        y = torch.bmm(w2[chosen], y.unsqueeze(-1)).squeeze(-1)
        total = torch.zeros_like(x).index_add(0, order // 2, y * p.reshape(-1)[order].unsqueeze(-1))
        return (total, y) if reuse else total

    return function


@pytest.mark.parametrize("reuse", [False, True])
def test_a_hand_written_layer_is_found_unless_its_inside_is_shown(reuse: bool) -> None:
    args = torch.randn(7, 6), torch.randn(5, 4, 6), torch.randn(5, 6, 4), torch.randn(7, 5)
    gm, _ = capture(layer(reuse), *args)
    before = str(gm.graph)
    sites, declined = moe.find_experts(gm.graph)
    assert str(gm.graph) == before
    if reuse:
        assert not sites
        assert [refusal.reason for refusal in declined] == [
            "what single experts give is used other than in a weighted sum"
        ]
    else:
        assert not declined
        assert [site.spec.describe() for site in sites] == ["relu2, weight on output"]


def layers(x: Any, w1: Any, w2: Any, scores: Any) -> Any:
    """Two layers, the second of which reads nothing but what the first gives."""
    one = layer(False)
    return one(one(x, w1, w2, scores), w1, w2, scores)


def captured_layers() -> tuple[fx.GraphModule, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 6), (5, 4, 6), (5, 6, 4), (7, 5)
    return capture(layers, *(torch.randn(shape, generator=generator) for shape in shapes))


def rewritten(gm: fx.GraphModule, **options: Any) -> list[tuple[str, str | None]]:
    """Stage 1 on the graph; (status, reason) of every site of experts."""
    report = GraphReport()
    pipeline.rewrite_dynamo_graph(gm, S2OConfig(**{"experts": True, **options}), report)
    return [(site.status, site.reason) for site in report.sites if site.kind == "moe"]


def test_experts_stay_as_they_are_where_the_user_says_so() -> None:
    gm, _ = captured_layers()
    before = str(gm.graph)
    assert rewritten(gm, experts=False) == []
    assert str(gm.graph) == before


@pytest.mark.parametrize(
    ("implementation", "tokens", "training", "dtype", "left"),
    [
        ("grouped_mm", 2, False, torch.float32, None),
        ("grouped_mm", 2, False, torch.bfloat16, None),
        ("grouped_mm", 2, True, torch.float32, None),
        ("grouped_mm", 2, True, torch.bfloat16, "Inductor trains grouped products in half precision faster on CPU"),
        ("batched_mm", 20, False, torch.float32, None),
        ("batched_mm", 2, True, torch.bfloat16, None),
        ("batched_mm", 2, False, torch.float32, "Inductor runs 2 tokens on gathered matrices faster on CPU"),
    ],
)
def test_without_further_words_experts_are_rewritten_unless_inductor_is_faster(
    implementation: str, tokens: int, training: bool, dtype: torch.dtype, left: str | None
) -> None:
    model = build("olmoe", implementation).to(dtype)
    given = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"experts": True}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="s2o", options={"inner": "aot_eager", "strict": True, **options})
        with torch.set_grad_enabled(training):
            compiled(given, use_cache=False)
        sites = [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe"]
        assert len(sites) == 2
        for site in sites:
            if left is None or options:
                assert (site["status"], site["reason"]) == ("rewritten", None)
            else:
                assert site["status"] == "declined" and site["reason"].startswith(left)
                assert "experts=True" in site["reason"]


def test_a_layer_that_reads_another_ones_output_follows_it() -> None:
    gm, inputs = captured_layers()
    expected = gm(*inputs)
    assert rewritten(gm) == [("rewritten", None)] * 2
    assert len(gm.graph.find_nodes(op="call_function", target=rewrite.MOE_EXPERTS)) == 2
    for one, other in zip(gm(*inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6 * float(other.abs().max()))


def test_after_an_error_in_the_rewrite_the_graph_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, inputs = captured_layers()
    before, expected, replace, seen = str(gm.graph), gm(*inputs), rewrite.replace_experts, []

    def fails_at_the_second(graph: fx.Graph, site: Any, name: str) -> fx.Node:
        seen.append(name)
        if len(seen) == 2:
            raise RuntimeError("a defect")
        return replace(graph, site, name)

    monkeypatch.setattr(rewrite, "replace_experts", fails_at_the_second)
    assert rewritten(gm) == [("declined", "an error in the rewrite, see the log")] * 2
    assert len(seen) == 2 and str(gm.graph) == before
    assert all(map(torch.equal, gm(*inputs), expected))


def test_what_is_too_large_to_verify_is_declined_unless_verification_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = captured_layers()
    before = str(gm.graph)
    # Operands have 319 elements; the gathered weights, 14 x 4 x 6, are the largest intermediate.
    monkeypatch.setattr(moe_verify, "SHORTEN_ABOVE", 0)
    monkeypatch.setattr(moe_verify, "MAX_ELEMENTS", 14 * 4 * 6 - 1)
    assert (
        rewritten(gm) == [("declined", "too large to verify, and its sizes cannot be told apart to shorten them")] * 2
    )
    assert str(gm.graph) == before
    assert rewritten(gm, verify="off") == [("rewritten", None)] * 2


def test_a_structure_is_verified_once_unless_always(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = moe_verify._run
    monkeypatch.setattr(moe_verify, "_outcomes", {})
    monkeypatch.setattr(
        moe_verify, "_run", lambda site, routing, sizes: (runs.append(routing), run(site, routing, sizes))[1]
    )
    for verify, expected in (("first", 3), ("first", 3), ("always", 9)):
        assert rewritten(captured_layers()[0], verify=verify) == [("rewritten", None)] * 2
        assert len(runs) == expected


@pytest.mark.parametrize("kind", ["cuda:0", "mps:0"])
def test_experts_without_a_kernel_are_declined(kind: str) -> None:
    gm, _ = captured_layers()
    dtype = torch.float64 if kind == "cuda:0" else torch.float32
    with FakeTensorMode() as mode:
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                kept = dtype if value.is_floating_point() else value.dtype
                meta = torch.empty_strided(value.shape, value.stride(), dtype=kept, device="meta")
                node.meta["example_value"] = FakeTensor(mode, meta, torch.device(kind))
    before = str(gm.graph)
    reason = f"no {kind[:-2].upper()} kernel for experts in {dtype} in this version"
    assert rewritten(gm) == [("declined", reason)] * 2
    assert str(gm.graph) == before
