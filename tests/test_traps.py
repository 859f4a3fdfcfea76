"""Ways in which a torch.compile backend silently goes wrong, one test for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import s2o_inductor
from s2o_inductor import backend, report
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import pipeline

ATTENTION = torch.ops.s2o.attention.default
AOT = {"inner": "aot_eager"}
EAGER = {"inner": "eager"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()
    counters.clear()
    torch.manual_seed(0)
    yield
    backend.uninstall()
    torch._dynamo.reset()


def heads(batch: int = 2, length: int = 12, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [torch.randn(batch, 2, length, 8, dtype=dtype, requires_grad=grad) for _ in range(3)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sites() -> list[dict[str, Any]]:
    return s2o_inductor.last_report().to_dict()["sites"]


def statuses() -> list[str]:
    return [site["status"] for site in sites()]


def compare(function: Callable[..., Any], *args: Any, gradients: bool = False, **options: Any) -> Callable[..., Any]:
    """Checks a compiled function against the same in eager mode; returns the compiled one."""
    compiled = torch.compile(function, backend="s2o", **{"options": AOT, **options})
    expected, actual = function(*args), compiled(*args)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    if gradients:
        inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        if isinstance(function, nn.Module):
            inputs += function.parameters()
        wanted, got = (torch.autograd.grad(out.square().sum(), inputs) for out in (expected, actual))
        torch.testing.assert_close(got, wanted, equal_nan=True)
    return compiled


def rewritten_graph(function: Callable[..., Any], *args: Any) -> tuple[list[Any], list[Any]]:
    """Targets of the nodes of a Dynamo graph before and after stage 1."""
    seen: list[list[Any]] = []

    def look(gm: fx.GraphModule, _inputs: Any) -> Any:
        seen.append([node.target for node in gm.graph.nodes])
        pipeline.rewrite_dynamo_graph(gm, S2OConfig(), report.GraphReport())
        seen.append([node.target for node in gm.graph.nodes])
        return gm

    torch.testing.assert_close(torch.compile(function, backend=look)(*args), function(*args))
    before, after = seen
    return before, after


# ---------------------------------------------------------------- the Dynamo graph is not functional


def test_writers_in_place_without_readers_survive() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.zeros_like(k), torch.zeros_like(v)
        keys[:, :, :6].copy_(k[:, :, :6])
        keys[:, :, 6:].add_(k[:, :, 6:])
        at = torch.arange(v.shape[2])[None, None, :, None].expand_as(v)
        values.scatter_(2, at, v)
        return causal(q, keys, values)

    args = heads()
    before, after = rewritten_graph(function, *args)
    writers = ("copy_", "add_", "scatter_")
    assert [target for target in after if target in writers] == [target for target in before if target in writers]
    assert {target for target in before if target in writers} == set(writers)
    assert ATTENTION in after
    compare(function, *args)


def test_keys_that_are_assembled_in_place() -> None:
    def latent_attention(q: Tensor, nope: Tensor, rope: Tensor, v: Tensor) -> Tensor:
        """DeepSeek-V3 builds its keys like this; losing a copy_ moved its logits by 0.49."""
        k = nope.new_empty(*nope.shape[:3], 12)
        k[..., :8].copy_(nope)
        k[..., 8:].copy_(rope.expand(-1, nope.shape[1], -1, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    nope, v = torch.randn(2, 2, 2, 10, 8, requires_grad=True)
    args = torch.randn(2, 2, 10, 12), nope, torch.randn(2, 1, 10, 4), v
    compare(latent_attention, *[arg.detach().requires_grad_() for arg in args], gradients=True)
    assert statuses() == ["rewritten"]


def test_an_operand_that_is_overwritten_afterwards() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = causal(q, k, v)
        k.mul_(2.0)
        return out, causal(q, k, v)

    q, k, v = heads()
    expected = function(q, k.clone(), v)
    torch.testing.assert_close(torch.compile(function, backend="s2o", options=AOT)(q, k.clone(), v), expected)
    assert statuses() == ["rewritten"] * 2


def test_sites_that_feed_one_another() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = causal(q, k, v)
        second = causal(first, k, first)
        return (second @ first.mT).softmax(-1) @ second

    compare(function, *heads(dtype=torch.float64, grad=True), gradients=True)
    assert statuses() == ["rewritten"] * 3


# ---------------------------------------------------------------- bodies of higher-order operators


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout, is_causal=mask is None)
        return x + out.transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        mask = ((at[None] <= at[:, None]) & (at[None] > at[:, None] - 4))[None, None]
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False)
        return x


@pytest.mark.parametrize("options", [AOT, {}], ids=["aot_eager", "inductor"])
def test_activation_checkpointing_bodies_are_entered(options: dict[str, Any]) -> None:
    compare(Checkpointed(), torch.randn(2, 12, 16), gradients=True, options=options)
    assert statuses() == ["rewritten"] * 2
    assert [site["mask"] for site in sites()] == [["causal", "window(k - q >= -3)"]] * 2


def test_activation_checkpointing_bodies_are_entered_under_install() -> None:
    s2o_inductor.install()
    model, x = Checkpointed(), torch.randn(2, 12, 16)
    torch.testing.assert_close(torch.compile(model, backend="inductor")(x), model(x))
    assert [(site["status"], site["reason"]) for site in sites()] == [("rewritten", None)] * 2
    assert s2o_inductor.last_report().to_dict()["graphs"] == 1


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "checkpointed"])
def test_dropout_recomputes_with_the_pattern_of_the_forward(wrapped: bool) -> None:
    model = (Checkpointed(0.4) if wrapped else Block(0.4)).double()
    compiled = torch.compile(model, backend="s2o", options=AOT)
    x, direction = torch.randn(2, 2, 12, 16, dtype=torch.float64)
    x.requires_grad_()

    def loss(value: Tensor) -> Tensor:
        torch.manual_seed(7)
        return compiled(value).square().sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    # Forward differences see the pattern of the forward, the gradient that of the recomputation.
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-6)
    assert set(statuses()) == {"rewritten"}
    again = loss(x)
    torch.manual_seed(8)
    assert not torch.equal(compiled(x).square().sum(), again), "another seed is another pattern"


def test_a_nested_region_shared_by_two_call_sites() -> None:
    region = torch.compiler.nested_compile_region(lambda q, k, v: causal(q, k, v))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return region(region(q, k, v), k, v)

    compare(function, *heads(grad=True), gradients=True, fullgraph=True)
    assert statuses() == ["rewritten"], "one body, rewritten once"


# ---------------------------------------------------------------- ambient state


def test_autocast_with_mixed_dtypes_at_the_call() -> None:
    model, scale = nn.Linear(16, 48), torch.randn(8)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = model(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            q, k = q * scale, k * scale  # as rotary embeddings do: float32 beside a bfloat16 v
            assert (q.dtype, k.dtype, v.dtype) == (torch.float32, torch.float32, torch.bfloat16)
            return causal(q, k, v)

    x = torch.randn(2, 12, 16, requires_grad=True)
    expected = function(x)
    actual = torch.compile(function, backend="s2o", options=AOT)(x)
    assert statuses() == ["rewritten"]
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    got, wanted = (torch.autograd.grad(out.float().square().sum(), x)[0] for out in (actual, expected))
    torch.testing.assert_close(got, wanted, rtol=4e-2, atol=4e-2)


def test_gradient_mode_regions_keep_what_is_in_them() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            at = torch.arange(k.shape[2])[:, None].cos()
            constant = causal(q, k, v)
        return causal(q * at, k * at, v) + constant

    compare(function, *heads(grad=True), gradients=True)
    assert statuses() == ["rewritten"] * 2


@pytest.mark.parametrize("mode", ["train", "eval with gradients", "no_grad", "inference_mode"])
@pytest.mark.parametrize("options", [EAGER, AOT, {}], ids=["eager", "aot_eager", "inductor"])
def test_inference_and_training_are_both_rewritten(mode: str, options: dict[str, Any]) -> None:
    model = Block(0.0).train(mode == "train")
    x = torch.randn(2, 12, 16)
    surroundings = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with surroundings():
        compiled = compare(model, x, gradients=mode in ("train", "eval with gradients"), options=options)
        assert compiled(x).requires_grad == (mode in ("train", "eval with gradients"))
    assert statuses() == ["rewritten"]


# ---------------------------------------------------------------- symbolic values and restarts


def test_symbolic_scale_and_dropout_restart_the_analysis() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, scale: float, rate: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True, scale=scale)

    compare(function, *heads(grad=True), 0.37, 0.0, gradients=True, dynamic=True)
    # The first call, with symbols in place of the numbers, left no trace in the report.
    assert statuses() == ["rewritten"]
    assert s2o_inductor.last_report().to_dict()["graphs"] == 1


def test_exceptions_of_the_inner_compiler_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restart(Exception):
        """Stands for torch's own, which ask Dynamo to analyse the frame again."""

    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        raise Restart

    monkeypatch.setattr(backend, "_aot_eager", compile_fx)
    gm = fx.symbolic_trace(nn.Identity())
    with pytest.raises(Restart):
        backend.s2o(gm, [torch.ones(1)], options=AOT)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("options", [AOT, {}], ids=["aot_eager", "inductor"])
def test_lengths_change_without_a_recompilation_each(dynamic: bool | None, options: dict[str, Any]) -> None:
    model = Block()
    compiled = torch.compile(model, backend="s2o", dynamic=dynamic, fullgraph=True, options=options)
    for length in (12, 17, 23, 31):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] <= (1 if dynamic else 2)
    assert set(statuses()) == {"rewritten"}


def test_past_the_recompile_limit_results_stay_right() -> None:
    compiled = torch.compile(causal, backend="s2o", dynamic=False, options=EAGER)
    for length in range(4, 16):
        q, k, v = heads(length=length)
        torch.testing.assert_close(compiled(q, k, v), causal(q, k, v))
    assert len(sites()) == torch._dynamo.config.recompile_limit


# ---------------------------------------------------------------- masks


def hidden_rows() -> Tensor:
    """Causal, left padding: the first queries of the second sequence see nothing."""
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, :4] = False
    return torch.ones(12, 12, dtype=torch.bool).tril()[None, None] & padding[:, None, None, :]


def by_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden_rows())


def by_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~hidden_rows(), float("-inf"))
    return scores.softmax(-1) @ v


def by_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~hidden_rows(), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("function", "row"), [(by_call, "zero"), (by_infinity, "nan"), (by_lowest, "mean")])
@pytest.mark.parametrize("options", [EAGER, AOT, {}], ids=["eager", "aot_eager", "inductor"])
def test_rows_without_a_key_keep_the_meaning_of_the_source(
    function: Callable[..., Tensor], row: str, options: dict[str, Any]
) -> None:
    q, k, v = heads(grad=True)
    compiled = compare(function, q, k, v, gradients=row != "nan", options=options)
    assert statuses() == ["rewritten"]
    empty = compiled(q, k, v)[1, :, :4]
    wanted = {"zero": torch.zeros(()), "nan": torch.tensor(float("nan")), "mean": v[1].mean(1, keepdim=True)}[row]
    torch.testing.assert_close(empty, wanted.expand_as(empty), equal_nan=True)


def test_a_mask_that_is_a_graph_input() -> None:
    """A static cache builds its mask outside of the forward."""

    def decode(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    _, k, v = heads(length=16)
    q = torch.randn(2, 2, 5, 8)
    compiled = torch.compile(decode, backend="s2o", options=AOT)
    for filled in (3, 9, 16):
        visible = (torch.arange(16) < filled + torch.arange(5)[:, None]).expand(2, 1, 5, 16).contiguous()
        torch.testing.assert_close(compiled(q, k, v, visible), decode(q, k, v, visible))
    (site,) = sites()
    assert (site["status"], site["mask"]) == ("rewritten", ["dense"])
    assert "input" in site["reason"]


def test_metadata_of_the_old_operands_does_not_travel() -> None:
    seen: list[fx.Node] = []

    def look(graph: fx.Graph) -> None:
        seen.extend(node for node in graph.nodes if "s2o" in str(node.target))

    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        visible = torch.ones(12, 12, dtype=torch.bool).tril()[None, None] & padding[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    padding = torch.ones(2, 12, dtype=torch.bool)
    compare(function, *heads(grad=True), padding, gradients=True, options={"joint_custom_post_pass": look})
    # attention_mask, attention and attention_backward: Inductor would match these against their new operands.
    assert len(seen) == 3
    assert not [node for node in seen if "eager_input_vals" in node.meta]


@pytest.mark.parametrize(
    "broken",
    [
        "attention.find_attention",
        "mha.expand_all",
        "masks.MaskLifter.lift",
        "verify.check_site",
        "rewrite._apply",
        "rewrite._shared_meta",
    ],
)
def test_a_defect_of_ours_is_logged_and_does_not_stop_the_compilation(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a defect planted by the test")

    monkeypatch.setattr(f"s2o_inductor.passes.{broken}", fail)
    with caplog.at_level(logging.ERROR, "s2o_inductor"):
        compare(by_call, *heads(grad=True), gradients=True)
    assert "planted by the test" in caplog.text
    expected = {"attention.find_attention": [], "mha.expand_all": ["rewritten"], "masks.MaskLifter.lift": ["rewritten"]}
    assert statuses() == expected.get(broken, ["declined"])
