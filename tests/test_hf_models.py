"""Unmodified Hugging Face models: each attention call is rewritten or declined with a reason; nothing else changes.

Errors are judged against the same model run in float64: s2o's may be at most twice eager's, see `assert_as_close`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import s2o_inductor

transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import hf_models  # noqa: E402

EPS = torch.finfo(torch.float32).eps
AOT_EAGER = {"inner": "aot_eager"}
CAUSAL, KEYS, WINDOW = "causal", "keys", "window"

# What the masks of a padded batch say, one set for each attention call in graph order.
PADDED = {
    "llama": [{CAUSAL, KEYS}] * 2,
    "mistral": [{CAUSAL, WINDOW, KEYS}] * 2,
    "gemma3": [{CAUSAL, WINDOW, KEYS}, {CAUSAL, KEYS}],
    "gpt2": [{CAUSAL, KEYS}] * 2,
    "bert": [{KEYS}] * 2,
    "gpt_oss": [{CAUSAL, WINDOW, KEYS}, {CAUSAL, KEYS}],
    "deepseek_v3": [{CAUSAL, KEYS}] * 2,
}


class InDouble(TorchFunctionMode):
    """Turns casts to float32 in a model's code into casts to float64: models compute norms and softmax in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def double(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*(double(a) for a in args), **{name: double(value) for name, value in (kwargs or {}).items()})


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code and reports of other tests stay out of this one; transformers' advice stays out of the output."""
    torch._dynamo.reset()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    torch._dynamo.reset()


def in_double(model: nn.Module, run: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `run` returns for the model in float64; the model is float32 again afterwards."""
    try:
        with InDouble():
            return run(model.double())
    finally:
        model.float()


def outputs(model: nn.Module, call: Callable[..., Any], kwargs: dict[str, Any], train: bool) -> dict[str, Tensor]:
    """The logits and, in training, the gradients of a loss that reads every position, padding as well."""
    model.train(train)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        logits = call(**kwargs).logits
    if not train:
        return {"logits": logits}
    targets = hf_models.tokens(*logits.shape[:2], seed=3)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_as_close(actual: dict[str, Tensor], eager: dict[str, Tensor], gold: dict[str, Tensor]) -> None:
    """The bound of DESIGN.md: largest error at most twice eager's plus an epsilon, root mean square at most 1.5 times.

    The epsilon of a gradient is of the largest gradient of the model: biases of keys, which do not
    change a softmax, have a gradient of zero, and only rounding to compare.
    """
    assert actual.keys() == eager.keys() == gold.keys()
    largest = max((gold[name].abs().max().item() for name in gold if name != "logits"), default=0.0)
    for name in gold:
        floor = EPS * (gold[name].abs().max().item() if name == "logits" else largest)
        assert actual[name].dtype == eager[name].dtype
        assert actual[name].shape == eager[name].shape
        assert actual[name].isfinite().all(), name
        ours, theirs = ((value[name].double() - gold[name]).abs() for value in (actual, eager))
        assert ours.max() <= 2 * (theirs.max() + floor), name
        assert ours.square().mean().sqrt() <= 1.5 * (theirs.square().mean().sqrt() + floor), name


def check(name: str, attention: str, padding: str | None, train: bool, **how: Any) -> list[dict[str, Any]]:
    """Compiles one model, compares it with eager, and returns the attention sites of the report."""
    model = hf_models.build(name, attention, experts="batched_mm")
    kwargs = hf_models.inputs(name, padding)
    eager = outputs(model, model.forward, kwargs, train)
    # fullgraph: a graph break, which none of these models has under other backends, is an error.
    compiled = torch.compile(model.forward, backend="s2o", fullgraph=True, **how)
    actual = outputs(model, compiled, kwargs, train)
    gold = in_double(model, lambda double: outputs(double, double.forward, kwargs, train))
    assert_as_close(actual, eager, gold)
    report = s2o_inductor.last_report().to_dict()
    assert report["graphs"] == 1
    assert report["graph_breaks"] == []
    sites: list[dict[str, Any]] = [site for site in report["sites"] if site["kind"] == "attention"]
    assert len(sites) == hf_models.ARCHITECTURES[name].sites
    for site in sites:
        assert site["status"] == "rewritten" or site["reason"], site
    return sites


def terms(site: dict[str, Any]) -> set[str]:
    """The kinds of the terms of a site's mask, without their details."""
    return {term.split("(")[0] for term in site["mask"]}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PADDED)
def test_padded_batch(name: str, train: bool) -> None:
    attention = hf_models.ARCHITECTURES[name].implementations[0]
    # Left padding leaves rows that see no key, whose gradients and outputs must be right as well.
    sites = check(name, attention, "left", train, options=AOT_EAGER)
    assert [site["status"] for site in sites] == ["rewritten"] * len(sites), sites
    assert [terms(site) for site in sites] == PADDED[name]


@pytest.mark.parametrize("name", ["llama", "bert", "gemma3"])
def test_attention_written_out(name: str) -> None:
    """attn_implementation="eager": matmul, additive mask, softmax, matmul."""
    sites = check(name, "eager", "left", True, options=AOT_EAGER)
    assert [site["status"] for site in sites] == ["rewritten"] * len(sites), sites
    assert [terms(site) for site in sites] == PADDED[name]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_without_mask(name: str) -> None:
    """transformers builds a causal mask tensor although it was given none; only causality is left of it."""
    sites = check(name, "sdpa", None, True, options=AOT_EAGER)
    expected = {CAUSAL, WINDOW} if name == "mistral" else {CAUSAL}
    assert [terms(site) for site in sites] == [expected] * 2


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_learned_bias(train: bool) -> None:
    """T5 adds a bias that has a gradient: where one is needed, its sites are declined, and the rest is right."""
    sites = check("t5", "sdpa", "right", train, options=AOT_EAGER)
    declined = [site for site in sites if site["status"] == "declined"]
    for site in declined:
        assert "bias" in site["reason"] or "gradient" in site["reason"], site
    if train:
        assert len(declined) >= 4  # self-attention of two encoder and two decoder layers


def test_packed_documents() -> None:
    """Restarting position_ids hide the other documents of a row."""
    model = hf_models.build("llama")
    kwargs = hf_models.packed_inputs()
    eager = outputs(model, model.forward, kwargs, True)
    compiled = torch.compile(model.forward, backend="s2o", fullgraph=True, options=AOT_EAGER)
    actual = outputs(model, compiled, kwargs, True)
    gold = in_double(model, lambda double: outputs(double, double.forward, kwargs, True))
    assert_as_close(actual, eager, gold)
    for site in s2o_inductor.last_report().to_dict()["sites"]:
        assert site["status"] == "rewritten"
        assert terms(site) == {CAUSAL, "segments"}


@torch.no_grad()
def test_long_packed_documents_may_be_approximated() -> None:
    """What transformers finds in position_ids reaches the sparse kernel, and a tiny budget nothing is lost to."""
    model, lengths = hf_models.build("llama"), (900, 80, 300)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    kwargs = {"input_ids": hf_models.tokens(1, sum(lengths)), "position_ids": positions, "use_cache": False}
    eager = model(**kwargs).logits
    options = {**AOT_EAGER, "min_seq": 512, "budget": 1e-6}
    actual = torch.compile(model.forward, backend="s2o", fullgraph=True, options=options)(**kwargs).logits
    assert float((actual - eager).norm() / eager.norm()) < 1e-4
    for site in s2o_inductor.last_report().to_dict()["sites"]:
        assert site["route"] == "cpu-s2o" and terms(site) == {CAUSAL, "segments"}


def generated(model: nn.Module, call: Callable[..., Any], static: bool) -> Tensor:
    """Greedy tokens of a left-padded batch: a prefill and five steps."""
    kwargs = hf_models.inputs("llama", "left")
    model.forward = call  # type: ignore[method-assign]
    try:
        extra = {"cache_implementation": "static"} if static else {}
        tokens: Tensor = model.generate(  # type: ignore[operator]
            **kwargs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **extra
        )
    finally:
        del model.forward
    return tokens


@pytest.mark.parametrize(
    ("name", "static"),
    [("llama", False), ("llama", True), ("gemma3", False)],
    ids=["dynamic", "static", "mixed-layers"],
)
def test_generate(name: str, static: bool) -> None:
    model = hf_models.build(name)
    expected = generated(model, model.forward, static)
    counters = torch._dynamo.utils.counters
    counts = []
    for how in ({"backend": "eager"}, {"backend": "s2o", "options": AOT_EAGER}):
        torch._dynamo.reset()
        counters.clear()
        assert torch.equal(generated(model, torch.compile(model.forward, **how), static), expected)
        counts.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    without, ours = counts
    assert ours == without  # neither a graph break more nor a compilation more
    sites = s2o_inductor.last_report().to_dict()["sites"]
    assert len(sites) == 2 * ours[1]
    for site in sites:
        assert site["status"] == "rewritten", site
        # A static cache's mask is built outside of the graph: it cannot be read, and the report says so.
        assert "dense" not in site["mask"] or (static and site["reason"]), site


def test_default_dropout() -> None:
    """GPT-2 drops attention weights in training: s2o draws its own, so the means over many draws must agree."""
    model = hf_models.build("gpt2", dropout=True).train()
    kwargs, runs = hf_models.inputs("gpt2", "right"), 150
    compiled = torch.compile(model.forward, backend="s2o", fullgraph=True, options=AOT_EAGER)
    samples = []
    for call in (model.forward, compiled):
        torch.manual_seed(7)
        samples.append(torch.stack([call(**kwargs).logits.detach() for _ in range(runs)]).double())
    sites = s2o_inductor.last_report().to_dict()["sites"]
    assert [site["status"] for site in sites] == ["rewritten"] * 2, sites
    eager, ours = samples
    error = ((eager.var(0) + ours.var(0)) / runs).sqrt()
    # Equal distributions give about 1; logits are correlated, hence the room above it.
    assert ((eager.mean(0) - ours.mean(0)) / error).square().mean().sqrt() < 1.5
    assert math.isclose(ours.var(0).mean().sqrt(), eager.var(0).mean().sqrt(), rel_tol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3"])
def test_through_inductor(name: str) -> None:
    sites = check(name, "sdpa", "left", True)
    assert [terms(site) for site in sites] == PADDED[name]
