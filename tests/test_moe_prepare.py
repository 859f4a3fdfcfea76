"""`prepare`: loops over experts become operators, the module stays what it was, and what differs is declined."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import moe_idioms
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s2o_inductor
from s2o_inductor import moe_list_ops
from s2o_inductor.loops import preparation
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def gradients(model: nn.Module, x: Tensor, call: Any = None) -> list[Tensor]:
    """Output and gradients, zeros for experts that a loop left without."""
    x = x.clone().requires_grad_()
    y = first((call or model)(x))
    leaves = [x, *model.parameters()]
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True))]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", moe_idioms.LOOPS)
def test_every_loop_becomes_one_graph_with_the_same_values_and_gradients(name: str, training: bool) -> None:
    model = nn.Sequential(moe_idioms.LOOPS[name]()).train(training)
    x = torch.randn(3, 5, 24)
    infers = name == "sorted slices" and not training  # under no_grad: only the router would have a gradient
    expected = [first(model(x)).detach()] if infers else gradients(model, x)
    prepared = s2o_inductor.prepare(model)
    assert [entry.status for entry in prepared.entries] == ["prepared"], prepared
    compiled = torch.compile(model, backend="s2o", fullgraph=True, options={"inner": "aot_eager"})
    actual = [first(compiled(x)).detach()] if infers else gradients(model, x, compiled)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert (site["kind"], site["status"], site["verified"], site["route"]) == (
        "moe", "rewritten", "by prepare", "cpu-grouped",
    )  # fmt: skip
    assert site["where"] == prepared.entries[0].where and site["shape"]["experts"] == 6


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: (x.data_ptr(), x.clone()) for name, x in model.state_dict().items()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
        "random": torch.get_rng_state(),
        "grads": [parameter.grad for parameter in model.parameters()],
    }


@pytest.mark.parametrize("name", ["hit experts", "sorted slices", "folded matrices"])
def test_a_module_stays_what_it_was_and_restore_undoes_the_swap(name: str) -> None:
    model = nn.Sequential(moe_idioms.LOOPS[name](), nn.Dropout(0.5).eval())
    ran: list[str] = []
    model[0].register_forward_hook(lambda *_: ran.append("hook"))
    model[0].router.eval()
    before = state(model)
    assert s2o_inductor.prepare(model).prepared
    after = state(model)
    for key in before.keys() - {"names"}:
        same = torch.equal if key == "random" else lambda a, b: str(a) == str(b)
        assert same(before[key], after[key]), key
    ran.clear()
    model[0](torch.randn(1, 4, 24))
    assert ran == ["hook"]
    assert not s2o_inductor.prepare(model).entries, "a prepared module is left alone"
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert first(model[0](torch.randn(1, 4, 24))).abs().max() > 0, "a copy runs on its own weights"
    assert s2o_inductor.restore(model) == 1
    assert state(model)["names"] == before["names"]
    assert s2o_inductor.restore(model) == 0


@pytest.mark.parametrize("call", [s2o_inductor.prepare, s2o_inductor.restore])
def test_what_is_no_module_is_refused(call: Any) -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module, whose methods it changes; got function"):
        call(lambda x: x)


def test_weights_are_read_at_every_call() -> None:
    model = moe_idioms.HitExperts()
    s2o_inductor.prepare(model)
    other = moe_idioms.HitExperts()
    x = torch.randn(2, 4, 24)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(first(model(x)), first(other(x)))
    torch.testing.assert_close(first(model.double()(x.double())), first(other.double()(x.double())))


def test_a_sample_of_the_model_reaches_modules_that_random_inputs_do_not() -> None:
    class Scaled(moe_idioms.Separate):
        def forward(self, x: Tensor, *, scale: dict[str, float]) -> Tensor:
            flat = x.view(-1, x.shape[-1])
            ids, p = self.route(flat)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                token, slot = torch.where(ids == number)
                out.index_add_(0, token, expert(flat[token]) * p[token, slot, None])
            return out.view_as(x) * scale["by"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, scale={"by": 2.0})

    model, x = Model(), torch.randn(2, 4, 24)
    (entry,) = s2o_inductor.prepare(model).entries
    assert entry.status == "declined" and "give prepare a sample" in entry.reason
    expected = model(x)
    assert s2o_inductor.prepare(model, x).prepared
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(s2o_inductor.errors.S2OError, match="the model does not run on the sample"):
        s2o_inductor.prepare(model, torch.randn(2, 4, 7))


# ------------------------------------------------------------------------------------- near misses


class Dropped(moe_idioms.EveryExpert):
    """Experts that drop out values."""

    def __init__(self) -> None:
        super().__init__(expert=lambda width, inner: moe_idioms.Plain(width, inner, dropout=0.1))


class Watched(moe_idioms.EveryExpert):
    """A hook on a single expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[2].register_forward_hook(lambda module, args, result: result * 2)


class Strange(nn.Module):
    """An activation that is none of ours."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.softplus(self.up(x)))


class Unknown(moe_idioms.EveryExpert):
    def __init__(self) -> None:
        super().__init__(expert=Strange)


class Limited(moe_idioms.Separate):
    """No expert takes more than two tokens."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (found[:2] for found in torch.where(ids == number))
            out.index_add_(0, token, expert(flat[token]) * p[token, slot, None])
        return out.view_as(x)


class Counted(moe_idioms.Separate):
    """The loop counts calls, which a swapped method would not."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            self.calls += 1
            out.index_add_(0, token, expert(flat[token]) * p[token, slot, None])
        return out.view_as(x)


class Tallied(moe_idioms.Separate):
    """The loop fills a buffer with the load of each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(self.number))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            self.load[number] += len(token)
            out.index_add_(0, token, expert(flat[token]) * p[token, slot, None])
        return out.view_as(x)


class Squashed(moe_idioms.Separate):
    """What leaves an expert passes through another function before it is summed."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, torch.tanh(expert(flat[token])) * p[token, slot, None])
        return out.view_as(x)


class Clamped(moe_idioms.Separate):
    """Outliers among the experts' outputs are cut off."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(flat[token]).clamp(-5.0, 5.0) * p[token, slot, None])
        return out.view_as(x)


class Pairs(moe_idioms.Separate):
    """An expert that one token alone has chosen is left out."""

    fewest = 2

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if token.numel() >= self.fewest:
                out.index_add_(0, token, expert(flat[token]) * p[token, slot, None])
        return out.view_as(x)


class Crowded(moe_idioms.Separate):
    """Experts of many tokens count less."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            y = expert(flat[token]) * p[token, slot, None]
            out.index_add_(0, token, y * 0.5 if token.numel() > 1000 else y)
        return out.view_as(x)


NEAR_MISSES = {
    Clamped: "gives something else",
    Pairs: "gives something else",
    Crowded: "depends on 'token.numel() > 1000'",
    Dropped: "drop out values at random",
    Watched: "hooks",
    Unknown: "none of the formulas",
    Limited: "no method or loop of it is a weighted sum",
    Counted: "also sets 'self.calls'",
    Tallied: "gives something else",
    Squashed: "no method or loop of it is a weighted sum",
    moe_idioms.Split: "its experts are stacked, and it does not take tokens, expert numbers and weights",
}


@pytest.mark.parametrize("layer", NEAR_MISSES, ids=lambda layer: layer.__name__)
def test_near_misses_are_declined_with_the_reason_and_left_alone(layer: type[nn.Module]) -> None:
    model = nn.Sequential(layer())
    before, x = state(model), torch.randn(4, 6, 24)
    expected = first(model.eval()(x))
    model.train()
    load = {name: buffer.zero_() for name, buffer in model.named_buffers()}
    (entry,) = s2o_inductor.prepare(model).entries
    assert entry.status == "declined" and NEAR_MISSES[layer] in entry.reason, entry
    assert state(model)["names"] == before["names"] or layer is Counted  # `calls` is an attribute of its own
    assert all(not buffer.any() for buffer in load.values())
    torch.testing.assert_close(first(model.eval()(x)), expected, rtol=0.0, atol=0.0)


def test_modules_that_loop_over_no_data_are_no_candidates() -> None:
    class Dense(moe_idioms.Separate):
        def forward(self, x: Tensor) -> Tensor:
            p = self.router(x).softmax(dim=-1)
            return sum(p[..., n, None] * expert(x) for n, expert in enumerate(self.experts))

    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 32), 2)
    chain = nn.Sequential(*(moe_idioms.MLP(24, 16) for _ in range(3)))
    assert not s2o_inductor.prepare(nn.ModuleList([Dense(), layers, chain])).entries


# ---------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["probe.probe", "probe.replacement", "comparison.compare"])
def test_what_fails_half_way_leaves_no_module_half_prepared(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error declines the module it is of; an interrupt also undoes what was done before."""
    model = nn.Sequential(moe_idioms.HitExperts(), moe_idioms.HitExperts())
    names, calls, last = state(model)["names"], 0, 2**31

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > last:
            raise error("half way")
        return function(*args)

    owner, name = where.split(".")
    function = getattr(getattr(preparation, owner), name)
    monkeypatch.setattr(getattr(preparation, owner), name, fails)
    assert len(s2o_inductor.prepare(model).prepared) == 2
    s2o_inductor.restore(model)
    calls, last = 0, calls // 2  # the second module is prepared first
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            s2o_inductor.prepare(model)
        assert s2o_inductor.restore(model) == 0
    else:
        declined, prepared = s2o_inductor.prepare(model).entries
        assert (declined.where, prepared.where, prepared.status) == ("0", "1", "prepared")
        assert "ZeroDivisionError: half way" in declined.reason
        assert s2o_inductor.restore(model) == 1
    assert state(model)["names"] == names


# ------------------------------------------------------------------------------------------ report


@pytest.mark.parametrize("name", ["hit experts", "masked tokens", "folded matrices"])
def test_the_report_names_the_loop_that_broke_a_graph_until_it_is_prepared(name: str) -> None:
    model, x = nn.Sequential(moe_idioms.LOOPS[name]().eval()), torch.randn(2, 4, 24)
    where = "0.experts" if name == "folded matrices" else "0"
    (hint,) = s2o_inductor.explain(model, x).hints
    assert hint.startswith(f"a Python loop over data in {where}, ") and "moe_idioms.py" in hint
    assert "call s2o_inductor.prepare(model) before torch.compile" in hint
    torch.compile(model, backend="s2o", options={"inner": "eager"})(x)
    (again,) = s2o_inductor.last_report().to_dict()["hints"]
    assert type(model[0]).__name__ in again or name == "folded matrices"
    assert again in str(s2o_inductor.last_report())
    s2o_inductor.prepare(model)
    assert not s2o_inductor.explain(model, x).hints


# --------------------------------------------------------------------------- operator of separate experts


def operands(spec: ExpertSpec, bias: bool) -> dict[str, Any]:
    experts, width, inner = 5, 6, 4
    shape = (width, inner) if spec.transposed else (inner, width)
    columns = inner if spec.gate == "separate" else spec.halves * inner
    wide = (width, columns) if spec.transposed else (columns, width)
    return {
        "w1": torch.randn(experts, *wide),
        "w2": torch.randn(experts, *shape[::-1]),
        "w3": torch.randn(experts, *shape) if spec.gate == "separate" else None,
        "b1": torch.randn(experts, spec.halves * inner) if bias else None,
        "b2": torch.randn(experts, width) if bias else None,
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", [ExpertSpec("relu2"), ExpertSpec("silu", "separate", transposed=True)])
def test_separate_experts_compute_what_stacked_ones_do(spec: ExpertSpec, bias: bool) -> None:
    given = operands(spec, bias)
    ids = torch.rand(7, 5).topk(2).indices
    leaves = {name: x.requires_grad_() for name, x in given.items() if x is not None}
    leaves |= {"z": torch.randn(7, 6, requires_grad=True), "p": torch.rand(7, 2, requires_grad=True)}
    z, p = leaves["z"], leaves["p"]

    def lists(name: str) -> Any:
        return () if given[name] is None else list(given[name])

    stacked = moe_experts(z, given["w1"], given["w2"], ids, p, spec=spec, **{n: given[n] for n in ("w3", "b1", "b2")})
    separate = moe_list_ops.moe_experts_list(
        z, lists("w1"), lists("w2"), ids, p, spec=spec, **{n: lists(n) for n in ("w3", "b1", "b2")}
    )
    assert torch.equal(stacked, separate)
    weight = torch.randn(7, 6)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), [*leaves.values()]) for y in (stacked, separate)),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)
    detached = {name: [x.detach().requires_grad_() for x in lists(name)] for name in given}
    each = [detached[name] for name in ("w1", "w2", "w3", "b1", "b2")]
    torch.library.opcheck(torch.ops.s2o.moe_experts_list.default, (z, *each, ids, p, spec.text(), True, ""))


def test_lists_that_do_not_fit_say_so() -> None:
    given = {name: list(x) for name, x in operands(ExpertSpec("relu2"), False).items() if x is not None}
    z, ids, p = torch.randn(7, 6), torch.zeros(7, 2, dtype=torch.int64), torch.rand(7, 2)
    with pytest.raises(ValueError, match="w1 must have a tensor for each of the 5 experts; got 4"):
        moe_list_ops.moe_experts_list(z, given["w1"][:4], given["w2"], ids, p, spec=ExpertSpec("relu2"))
    odd = [*given["w1"][:4], given["w1"][4][:, :3]]
    with pytest.raises(
        ValueError, match=r"w1 must be alike; got torch.float32\(4, 6\) on cpu and torch.float32\(4, 3\)"
    ):
        moe_list_ops.moe_experts_list(z, odd, given["w2"], ids, p, spec=ExpertSpec("relu2"))
    with pytest.raises(ValueError, match="at least one expert"):
        moe_list_ops.moe_experts_list(z, [], [], ids, p, spec=ExpertSpec("relu2"))
