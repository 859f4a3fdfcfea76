"""Routed experts on a GPU: random calls against float64, at the sizes of models, repeatable, beyond 2^31 bytes.

Needs a CUDA device; `pytest -n 8 tests/gpu` compiles kernels side by side. Unwritten memory holds NaN (conftest.py).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from moe_cases import check, leaves, on_device, random_case, separate_experts, typed
from test_moe_op import Problem, problem
from torch import Tensor

import s2o_inductor
from s2o_inductor.kernels import reference_moe
from s2o_inductor.moe_list_ops import moe_experts_list
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec
from s2o_inductor.testing import assert_close_to_gold

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPECS = {
    "Nemotron": ExpertSpec("relu2"),
    "Mixtral": ExpertSpec("silu", "half"),
    "torchtitan": ExpertSpec("silu", "separate"),
    "GPT-OSS": ExpertSpec("silu", "interleaved", transposed=True, alpha=1.702, limit=7.0, shift=1.0),
    "Llama 4": ExpertSpec("silu", "half", "input", transposed=True),
}


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(scale)


def choose(tokens: int, choices: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Different experts for each token, and weights that sum to one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    p, ids = torch.rand(tokens, experts, generator=generator, device="cuda").topk(choices)
    return ids, p / p.sum(1, keepdim=True)


def sized(name: str, tokens: int, choices: int, experts: int, width: int, inner: int, routing: str) -> Problem:
    made = typed(
        problem(SPECS[name], tokens, choices, experts, width, inner, routing=routing, bias=name == "GPT-OSS"),
        torch.bfloat16,
    )  # fmt: skip
    made.w1.mul_(width**-0.5)
    made.w2.mul_(inner**-0.5)
    return leaves(on_device(made, "cuda"))


@pytest.mark.parametrize("seed", range(160))
def test_random_cases(seed: int) -> None:
    check(*random_case(seed, device="cuda"))


@pytest.mark.parametrize("routing", ["random", "one_expert"])
@pytest.mark.parametrize("name", SPECS)
def test_at_the_widths_of_models(name: str, routing: str) -> None:
    check(sized(name, 600, 4, 8, 512, 768, routing))
    check(sized(name, 40, 4, 32, 512, 768, routing))


@pytest.mark.parametrize("name", SPECS)
def test_programs_that_share_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way to run both products in Triton, whatever is chosen at this size."""
    from s2o_inductor.kernels import cuda_moe, hopper_moe
    from s2o_inductor.kernels.triton_moe_tiles import Tile

    tiles = [Tile(128, 64, 4, 3, 64, 8, 132)]
    monkeypatch.setattr(hopper_moe, "product_tile", lambda *_: None)
    monkeypatch.setattr(cuda_moe, "first_tiles", lambda *_: tiles)
    monkeypatch.setattr(cuda_moe, "second_tiles", lambda *_: tiles)
    check(sized(name, 1200, 4, 8, 512, 768, "random"))
    check(sized(name, 300, 2, 8, 200, 136, "one_expert"))


@pytest.mark.parametrize("name", ["Nemotron", "Mixtral", "Llama 4"])
def test_hopper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of no rows and of many, and sizes that are no multiple of a tile's; others are left to Triton."""
    from s2o_inductor.kernels import hopper_moe

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    taken, names, original = [], [], hopper_moe.try_launch

    def launch(kernel: Any, *args: Any) -> bool:
        names.append(kernel.__name__)
        taken.append(original(kernel, *args))
        return taken[-1]

    monkeypatch.setattr(hopper_moe, "try_launch", launch)
    check(sized(name, 1200, 4, 8, 512, 768, "random"))
    check(sized(name, 1100, 2, 8, 320, 448, "one_expert"))
    assert set(names) == {"grouped_kernel", "outer_kernel"} and all(taken)
    launches = len(taken)
    check(sized(name, 1100, 2, 8, 200, 136, "one_expert"))
    assert len(taken) == launches


@pytest.mark.parametrize(
    ("name", "tokens", "routing"),
    [
        ("Mixtral", 40, "random"), ("Mixtral", 1500, "random"), ("Nemotron", 1500, "random"),
        ("Nemotron", 1500, "one_expert"),
    ],
)  # fmt: skip
def test_bitwise_repeatable(name: str, tokens: int, routing: str) -> None:
    case = sized(name, tokens, 6, 16, 512, 768, routing)
    first = case.run(moe_experts)
    for _ in range(10):
        again = case.run(moe_experts)
        for what, x in first.items():
            assert torch.equal(x, again[what]), what


@pytest.mark.parametrize("tokens", [20, 900])
def test_captured_in_a_cuda_graph(tokens: int) -> None:
    """No call waits for the device or chooses by what a tensor holds, so a replay follows its inputs."""
    case = sized("GPT-OSS", tokens, 4, 16, 512, 768, "random")
    case.run(moe_experts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    grad = torch.randn_like(case.z)
    names, tensors = zip(*case.tensors().items(), strict=True)

    def run() -> dict[str, Tensor]:
        out = moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec, b1=case.b1, b2=case.b2)
        return {"output": out, **dict(zip(names, torch.autograd.grad(out, tensors, grad), strict=True))}

    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        case.z.copy_(torch.randn_like(case.z))
        case.ids.fill_(3)
        case.ids[tokens // 2 :] = 16  # no expert
    graph.replay()
    for name, x in run().items():
        assert torch.equal(captured[name], x), name


# --------------------------------------------------------------------- experts that are separate tensors


SIZES = [(20, 8, 128), (256, 8, 128), (512, 8, 128), (2048, 8, 128), (4096, 8, 128), (512, 22, 512), (300, 8, 1000)]


@pytest.mark.parametrize(("tokens", "choices", "experts"), SIZES)
@pytest.mark.parametrize("strangers", [False, True])
def test_plans_of_one_launch_are_those_of_a_sort(
    tokens: int, choices: int, experts: int, strangers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2o_inductor.kernels import triton_moe_plan

    generator = torch.Generator("cuda").manual_seed(tokens)
    ids = torch.randint(0, experts, (tokens, choices), generator=generator, device="cuda")
    ids[::3] = -1 if strangers else experts // 2
    plan = triton_moe_plan.Plan.of(ids, experts, 32)
    assert 32 in plan.made  # by that one launch
    monkeypatch.setattr(triton_moe_plan, "_way", lambda *_: None)
    gold = triton_moe_plan.Plan.of(ids, experts, 32)
    assert all(
        torch.equal(getattr(plan, name).long(), getattr(gold, name).long()) for name in ("keys", "order", "firsts")
    )
    tiles, expected = plan.tiles(32), gold.tiles(32)
    count = int(expected[0, 0])
    assert int(tiles[0, 0]) == count and torch.equal(tiles[1 : count + 1, :3], expected[1 : count + 1, :3])


@pytest.mark.parametrize("seed", range(24))
def test_separate_experts_of_random_cases(seed: int) -> None:
    """Also such as lie in no common way, or do not start at multiples of 16 bytes."""
    check(random_case(seed, device="cuda")[0], function=separate_experts)


@pytest.mark.parametrize("tokens", [1, 40, 600])
@pytest.mark.parametrize("name", SPECS)
def test_separate_experts_compute_what_stacked_ones_do(name: str, tokens: int) -> None:
    """To the bit: tiles and the order of sums are the same, whatever fetches the weights."""
    case = sized(name, tokens, 4, 9, 512, 768, "random")
    stacked, separate = case.run(moe_experts), case.run(separate_experts)
    for what, x in stacked.items():
        assert torch.equal(x, separate[what]), what


def linears(experts: int, width: int, inner: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights of gate, down and up projections, each a leaf that wants a gradient."""
    gate = [normal(inner, width, scale=width**-0.5, seed=i).requires_grad_() for i in range(experts)]
    up = [normal(inner, width, scale=width**-0.5, seed=100 + i).requires_grad_() for i in range(experts)]
    down = [normal(width, inner, scale=inner**-0.5, seed=200 + i).requires_grad_() for i in range(experts)]
    return gate, down, up


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_separate_experts_are_not_copied(tokens: int) -> None:
    """Neither their weights in the forward pass, nor their gradients in the backward pass."""
    gate, down, up = linears(16, 1024, 2048)
    z, (ids, p) = normal(tokens, 1024).requires_grad_(), choose(tokens, 2, 16)
    each = sum(x.numel() * x.element_size() for xs in (gate, down, up) for x in xs)

    def peak(call: Any) -> tuple[Any, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before

    out, forward = peak(lambda: moe_experts_list(z, gate, down, ids, p, spec=SPECS["torchtitan"], w3=up))
    leaves = [z, *gate, *down, *up]
    grads, backward = peak(lambda: torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(x.isfinite().all() for x in grads)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == len(grads)
    assert forward < each / 4 and backward < each * 1.25


@pytest.mark.parametrize("tokens", [20, 900])
def test_separate_experts_in_a_cuda_graph(tokens: int) -> None:
    """A table of addresses is made without a copy from the host; a replay follows weights that change in place."""
    gate, down, up = linears(16, 256, 384)
    z, (ids, p) = normal(tokens, 256).requires_grad_(), choose(tokens, 4, 16)
    leaves, grad = [z, *gate, *down, *up], normal(tokens, 256, seed=1)

    def run() -> tuple[Tensor, ...]:
        out = moe_experts_list(z, gate, down, ids, p, spec=SPECS["torchtitan"], w3=up)
        return out, *torch.autograd.grad(out, leaves, grad)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
        gate[3].copy_(-gate[3])
        ids.copy_(ids.roll(1, 0))
    graph.replay()
    for i, x in enumerate(run()):
        assert torch.equal(captured[i], x), i


def test_separate_experts_that_move() -> None:
    """Nothing is remembered of where weights were."""
    gate, down, up = linears(4, 64, 96)
    z, (ids, p) = normal(10, 64), choose(10, 2, 4)
    results = []
    with torch.no_grad():
        for _ in range(2):
            results.append(moe_experts_list(z, gate, down, ids, p, spec=SPECS["torchtitan"], w3=up))
            moved = [[x.detach().clone() for x in xs] for xs in (gate, down, up)]
            for xs in (gate, down, up):
                for x in xs:
                    x.fill_(float("nan"))
            gate, down, up = moved
    assert results[0].isfinite().all() and torch.equal(*results)


def check_tokens(out: Tensor, z: Tensor, w1: Tensor, w2: Tensor, ids: Tensor, p: Tensor, spec: ExpertSpec,
                 tokens: list[int]) -> None:  # fmt: skip
    """The output of a few tokens against float64 with the weights of their experts alone."""
    for token in tokens:
        experts, here = ids[token].unique(return_inverse=True)
        results = [
            reference_moe.experts(
                z[token : token + 1].to(dtype), w1[experts].to(dtype), w2[experts].to(dtype), here[None],
                p[token : token + 1], spec,
            )
            for dtype in (torch.float64, torch.bfloat16)
        ]  # fmt: skip
        assert_close_to_gold(out[token : token + 1], results[1], results[0], what=f"token {token}", condition=8.0)


@pytest.mark.parametrize("tokens", [1, 64, 512, 100_000])
def test_nemotron_3_super(tokens: int) -> None:
    """E 512, K 22, l 1024, I 2688: offsets of weights pass 2^31 bytes, those of 100,000 tokens' rows 2^31 elements."""
    w1, w2 = normal(512, 2688, 1024, scale=1024**-0.5), normal(512, 1024, 2688, scale=2688**-0.5, seed=1)
    z, (ids, p) = normal(tokens, 1024, seed=2), choose(tokens, 22, 512)
    ids[-1] = torch.arange(490, 512, device="cuda")
    out = moe_experts(z, w1, w2, ids, p, spec=SPECS["Nemotron"])
    assert out.isfinite().all()
    check_tokens(out, z, w1, w2, ids, p, SPECS["Nemotron"], sorted({0, tokens // 2, tokens - 1}))


def test_gradients_beyond_two_to_the_31_elements() -> None:
    """Of 110,000 tokens' 2.4 million rows; those of the last tokens and of an expert that has few are looked at."""
    tokens, spec = 110_000, SPECS["Nemotron"]
    w1, w2 = normal(33, 256, 1024, scale=1024**-0.5), normal(33, 1024, 256, scale=256**-0.5, seed=1)
    z, (ids, p) = normal(tokens, 1024, seed=2), choose(tokens, 22, 32)
    last = slice(tokens - 50, tokens)
    ids[last, 0] = 32
    w1, w2, z, p = (x.requires_grad_() for x in (w1, w2, z, p))
    out = moe_experts(z, w1, w2, ids, p, spec=spec)
    grad = normal(tokens, 1024, seed=3)
    found = torch.autograd.grad(out, (z, p, w1, w2), grad)
    assert all(x.isfinite().all() for x in found)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        part = [x.detach().to(dtype).requires_grad_() for x in (z[last], p[last], w1, w2)]
        low = reference_moe.experts(part[0], part[2], part[3], ids[last], part[1], spec)
        results.append(torch.autograd.grad(low, part, grad[last].to(dtype)))
    looked_at = (found[0][last], found[1][last].to(torch.bfloat16), found[2][32], found[3][32])
    for name, actual, gold, low in zip(("z", "p", "w1", "w2"), looked_at, *results, strict=True):
        one = gold.shape[0] == 33
        gold, low = (gold[32], low[32]) if one else (gold, low)
        assert_close_to_gold(actual, low, gold, what=name, condition=8.0)


def test_float64_is_refused() -> None:
    case = dataclasses.replace(sized("Mixtral", 4, 2, 4, 16, 16, "random"))
    with pytest.raises(NotImplementedError, match=r"got torch.float64: cast them"):
        case.to(torch.float64).run(moe_experts)


# ------------------------------------------------------------------------------------ compiled models


def sites() -> list[tuple[str, str, Any]]:
    """(status, route, reason) of the sites of experts in the last report."""
    found = [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe"]
    return [(site["status"], site["route"], site["reason"]) for site in found]


def results(model: torch.nn.Module, call: Any, tokens: Tensor, training: bool) -> dict[str, Tensor]:
    """Logits of a model; in training, gradients of its parameters too."""
    model.train(training)
    with torch.set_grad_enabled(training):
        logits = call(tokens, use_cache=False).logits
    if not training:
        return {"logits": logits.clone()}
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(logits.double().square().sum(), parameters)
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
def test_compiled_hugging_face_models(name: str, implementation: str, training: bool) -> None:
    """In float32, where no choice of an expert hangs on rounding; the loop of "eager" is prepared."""
    from test_moe_models import build

    torch._dynamo.reset()
    model = build(name, "eager").cuda()
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    expected, gold = (results(one, one, tokens, training) for one in (model, exact))
    model.set_experts_implementation(implementation)
    if implementation == "eager":
        assert len(s2o_inductor.prepare(model).prepared) == 2
    compiled = torch.compile(model, backend="s2o", options={"experts": True})
    actual = results(model, compiled, tokens, training)
    if implementation != "eager":
        assert sites() == [("rewritten", "triton", None)] * 2
    for key, value in actual.items():
        assert_close_to_gold(value, expected[key], gold[key], what=key, condition=8.0)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["Qwen3-MoE", "Nemotron-H"])
def test_compiled_experts_in_bfloat16(name: str, implementation: str) -> None:
    """Experts alone, for given choices: output and gradients, for any number of tokens, in one graph."""
    transformers = pytest.importorskip("transformers")
    if name == "Qwen3-MoE":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = transformers.Qwen3MoeConfig(hidden_size=96, moe_intermediate_size=64, num_experts=16)
    else:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config = transformers.NemotronHConfig(
            hidden_size=96, moe_latent_size=48, moe_intermediate_size=64, n_routed_experts=16
        )
    config._experts_implementation = implementation
    torch._dynamo.reset()
    layer = Experts(config).bfloat16().cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    w1, w2 = (x for _, x in layer.named_parameters())
    spec = SPECS["Mixtral" if name == "Qwen3-MoE" else "Nemotron"]
    compiled = torch.compile(layer, backend="s2o", options={"experts": True}, dynamic=True, fullgraph=True)
    for tokens in (5, 300):
        z, (ids, p) = normal(tokens, w2.shape[1], seed=tokens), choose(tokens, 4, 16, tokens)
        p = p.bfloat16()
        grad = torch.randn_like(z)

        def run(call: Any, dtype: torch.dtype, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            leaves = [x.detach().to(dtype).requires_grad_() for x in given]
            out = call(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))  # noqa: B023 - called at once

        def reference(z: Tensor, p: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            return reference_moe.experts(z, w1, w2, ids, p, spec)  # noqa: B023 - called at once

        gold, low = (run(reference, dtype, (z, p, w1, w2)) for dtype in (torch.float64, torch.bfloat16))
        given = [x.detach().requires_grad_() for x in (z, p)]
        out = compiled(given[0], ids, given[1])
        actual = (out.detach(), *torch.autograd.grad(out, [*given, w1, w2], grad))
        assert sites()[-1] == ("rewritten", "triton", None)
        for what, one, below, exact in zip(("output", "z", "p", "w1", "w2"), actual, low, gold, strict=True):
            assert_close_to_gold(one, below, exact, what=what, condition=8.0)


def test_compiled_with_cuda_graphs() -> None:
    """A recorded layer follows its input, to the bit."""
    from test_moe_models import build

    torch._dynamo.reset()
    layer = build("qwen3", "grouped_mm").model.layers[0].mlp.bfloat16().cuda()
    options = {"experts": True, "triton.cudagraphs": True}
    recorded = torch.compile(layer, backend="s2o", options=options)
    plain = torch.compile(copy.deepcopy(layer), backend="s2o", options={"experts": True})
    with torch.no_grad():
        for seed in range(5):
            x = normal(1, 7, 32, seed=seed)
            assert torch.equal(recorded(x).clone(), plain(x)), seed
    assert ("rewritten", "triton", None) in sites()
