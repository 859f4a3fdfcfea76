"""Sparse attention in the backend: when it runs, that budget 0 and everything short are exact, and what is reported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s2o_inductor
from s2o_inductor import ops, report, sparse_policy
from s2o_inductor.errors import S2OError
from s2o_inductor.kernels import dense, reference, sparse
from s2o_inductor.mask_spec import MaskSpec, parse
from s2o_inductor.sparse_policy import Geometry, SparsePolicy

LENGTH = 2048  # the last tiles have three bundles to read, and stop after two
SPARSE = {"inner": "aot_eager", "min_seq": 512, "budget": 0.7}
CAUSAL = MaskSpec(upper="0").text()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def peaked(queries: int = LENGTH, keys: int = LENGTH, heads: int = 2, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in which a few keys hold most of the mass, so that a budget leaves something out."""
    q, k, v = torch.randn(batch, heads, queries, 16), torch.randn(batch, 1, keys, 16), torch.randn(batch, 1, keys, 16)
    direction = F.normalize(torch.randn(16), dim=0)
    q = q + 8 * direction
    k[:, :, ::37] += 16 * direction
    return q, k, v


class Attention(nn.Module):
    """Causal attention over q, k, v that come in; `padding` (B, S) hides keys as tokenizers' masks do."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = None
        if padding is not None:
            at = torch.arange(q.shape[2], device=q.device)
            mask = (at[None] <= at[:, None])[None, None] & padding[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.second(q + self.first(q, k, v, padding), k, v, padding)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="s2o", options={**SPARSE, **options})


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@torch.no_grad()
def test_densities_are_of_the_sizes_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA many query heads have fewer mean queries each, which is less work."""
    ran = Geometry(sub_means=2)
    monkeypatch.setattr(sparse, "geometry_of", lambda *_: ran)
    compiled(Attention())(*peaked())
    (site,) = s2o_inductor.last_report().sites
    found = site.to_dict()
    (name,) = ops.statistics
    of_heads = ops.statistics[name].bundles.flatten(0, 1).tolist()
    densities = [ops.extents[name].densities(bundles, ran) for bundles in of_heads]
    assert found["sparse"]["work_density"] == pytest.approx(sum(work for _, work in densities) / len(densities))


@torch.no_grad()
def test_long_inference_is_approximated_and_says_how_far(caplog: pytest.LogCaptureFixture) -> None:
    ops._say_approximate.cache_clear()
    inputs = peaked()
    with caplog.at_level(logging.WARNING, "s2o_inductor"):
        model = Model()
        output = compiled(model, audit=LENGTH)(*inputs)
        compiled(model, audit=LENGTH)(*inputs)
    said = [record for record in caplog.records if "approximated" in record.getMessage()]
    assert len(said) == 1 and "options={'budget': 0}" in said[0].getMessage()
    sites = s2o_inductor.last_report().to_dict()["sites"]
    assert [(site["where"], site["exact"], site["route"]) for site in sites[:2]] == [
        ("first", False, "cpu-s2o"),
        ("second", False, "cpu-s2o"),
    ]
    for site in sites[:2]:
        assert 0.0 < site["sparse"]["density"] < 1.0
        assert len(site["sparse"]["head_density"]) == 2
        assert 0.0 < site["sparse"]["mma_density"] < site["sparse"]["work_density"] < 1.1
        assert 0.0 < site["sparse"]["dropped"] < 0.7
    exact = model.first(*inputs)
    measured = relative(compiled(model.first)(*inputs), exact)
    assert sites[0]["sparse"]["error"] == pytest.approx(measured**2, rel=0.2)
    assert 1e-6 < relative(output, model(*inputs)) < 0.2
    assert "density 0." in str(s2o_inductor.last_report())


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"budget": 0}, {"disable": ["sparse"]}, {"min_seq": LENGTH + 1}, {"budgets": {"*": 0}}, {"min_seq": None}],
)
def test_what_turns_it_off_gives_the_very_graph_of_an_exact_run(options: dict[str, Any]) -> None:
    inputs = peaked()
    output = compiled(Model(), **options)(*inputs)
    torch._dynamo.reset()
    assert torch.equal(output, compiled(Model(), budget=0)(*inputs))
    assert all(site["exact"] and site["sparse"] is None for site in s2o_inductor.last_report().to_dict()["sites"])
    assert not ops.statistics


def test_gradients_keep_it_exact_and_the_report_says_why() -> None:
    q, k, v = peaked()
    output = compiled(Model())(q.requires_grad_(), k, v)
    output.sum().backward()
    assert relative(output, Model()(q, k, v)) < 1e-5
    sites = s2o_inductor.last_report().to_dict()["sites"]
    assert all(site["exact"] and "torch.no_grad()" in site["sparse_reason"] for site in sites)
    assert str(s2o_inductor.last_report()).count("exact although long") == 1


@torch.no_grad()
def test_budgets_of_single_sites() -> None:
    compiled(Model(), budgets={"first": 0.0})(*peaked())
    first, second = s2o_inductor.last_report().to_dict()["sites"]
    assert first["exact"] and not second["exact"]


@torch.no_grad()
def test_a_budget_per_head() -> None:
    inputs = peaked()
    output = compiled(Model().first, budgets={"*": [0.0, 0.9]})(*inputs)
    exact = Model().first(*inputs)
    assert relative(output[:, 0], exact[:, 0]) < 1e-5
    assert relative(output[:, 1], exact[:, 1]) > 1e-6
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    one, other = site["sparse"]["head_density"]
    assert one == 1.0 and other < 1.0


@torch.no_grad()
def test_symbolic_lengths_choose_at_run_time() -> None:
    short, model = peaked(256, 256), compiled(Model())
    for x in short:
        torch._dynamo.mark_dynamic(x, 2)
    model(*short)
    assert all(site["exact"] for site in s2o_inductor.last_report().to_dict()["sites"])
    long = peaked()
    with torch._dynamo.config.patch(error_on_recompile=True):
        output = model(*long)
    assert not any(site["exact"] for site in s2o_inductor.last_report().to_dict()["sites"])
    assert 1e-6 < relative(output, Model()(*long)) < 0.2


@torch.no_grad()
def test_padding_is_lifted_and_its_keys_are_never_read() -> None:
    q, k, v = peaked(batch=2)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, 1100:] = False
    k[1, :, 1100:] = v[1, :, 1100:] = 1e30  # finite, so that eager's masked softmax stays clean
    output = compiled(Model())(q, k, v, padding)
    assert not any(site["exact"] for site in s2o_inductor.last_report().to_dict()["sites"])
    assert relative(output[1, :, :1100], Model()(q, k, v, padding)[1, :, :1100]) < 0.2


def packed_positions(*lengths: int, batch: int = 1) -> Tensor:
    """Position ids (B, S) that begin anew with every document; of a second entry the documents come in reverse."""
    rows = [torch.cat([torch.arange(n) for n in order]) for order in (lengths, lengths[::-1])]
    return torch.stack(rows[:batch])


class Packed(nn.Module):
    """Causal attention inside documents, found in position ids as transformers does."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, padding: Tensor | None = None) -> Tensor:
        ids = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        at = torch.arange(q.shape[2], device=q.device)
        mask = (at[None] <= at[:, None]) & (ids[:, None, :, None] == ids[:, None, None, :])
        if padding is not None:
            mask = mask & padding[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_are_approximated_each_by_itself(padded: bool) -> None:
    total = LENGTH + 500
    q, k, v = (0.5 * x for x in peaked(total, total, batch=2))  # less peaked: the tail counts
    positions = packed_positions(LENGTH, 90, 410, batch=2)
    padding = torch.rand(2, total) < 0.9 if padded else None
    output = compiled(Packed(), audit=total)(q, k, v, positions, padding)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["route"] == "cpu-s2o" and not site["exact"] and site["sparse"]["density"] < 1.0
    exact = Packed()(q, k, v, positions, padding)
    measured = (output - exact).square().sum((2, 3)) / exact.square().sum((2, 3))
    assert (measured > 1e-9).all() and (measured < 0.04).all()
    (read,) = ops.statistics.values()
    torch.testing.assert_close(read.error, measured, rtol=1e-2, atol=1e-9)
    # The long document is what it is alone, first or last.
    for b, at in ((0, slice(0, LENGTH)), (1, slice(500, total))):
        parts = [x[b : b + 1, :, at] for x in (q, k, v)]
        alone = compiled(Attention())(*parts, None if padding is None else padding[b : b + 1, at])
        if b == 0:  # it begins with a block
            torch.testing.assert_close(output[b, :, at], alone[0], rtol=1e-4, atol=1e-5)
        assert relative(output[b, :, at], alone[0]) < 0.2


@torch.no_grad()
def test_documents_without_causality_stay_exact() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, ids[:, None, :, None] == ids[:, None, None, :], enable_gqa=True)

    inputs = (*peaked(), torch.arange(LENGTH)[None] // 700)
    output = torch.compile(masked, backend="s2o", options=SPARSE)(*inputs)
    assert relative(output, masked(*inputs)) < 1e-5
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["exact"] and "causal attention alone" in site["sparse_reason"]


@torch.no_grad()
def test_documents_in_any_order_are_right() -> None:
    """Ids that come in as they are: nothing tells the compiler that a document is in one piece."""

    def masked(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        mask = (at[None] <= at[:, None]) & (ids[:, None, :, None] == ids[:, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    q, k, v = peaked()
    run = torch.compile(masked, backend="s2o", options={**SPARSE, "budget": 1e-9})
    for ids in (torch.arange(LENGTH) // 700 % 2, torch.randint(0, 3, (LENGTH,)), -(torch.arange(LENGTH) // 900)):
        output = run(q, k, v, ids[None])
        assert relative(output, masked(q, k, v, ids[None])) < 1e-4
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["route"] == "cpu-s2o"


@torch.no_grad()
def test_a_mask_that_stays_a_tensor_stays_exact() -> None:
    q, k, v = peaked()
    mask = torch.rand(LENGTH, LENGTH) < 0.9
    mask.fill_diagonal_(True)

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    output = torch.compile(masked, backend="s2o", options=SPARSE)(q, k, v, mask)
    assert relative(output, masked(q, k, v, mask)) < 1e-5
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["exact"] and site["sparse_reason"] == "its mask stays a tensor"


@torch.no_grad()
@pytest.mark.slow
def test_through_inductor_and_out_of_its_cache() -> None:
    inputs = peaked()
    options = {name: value for name, value in SPARSE.items() if name != "inner"}
    outputs, densities = [], []
    for _ in range(2):
        torch._dynamo.reset()
        outputs.append(torch.compile(Model(), backend="s2o", options=options)(*inputs))
        densities.append([site["sparse"]["density"] for site in s2o_inductor.last_report().to_dict()["sites"]])
    assert torch.equal(*outputs)
    assert densities[0] == densities[1] and max(densities[0]) < 1.0


# The operator.


def call_of(q: Tensor, k: Tensor, v: Tensor, spec: str, *params: int, **fields: Any) -> dense.Call:
    arguments = {"mask": None, "leaves": (), "plan": (), "sinks": None, "seed": None, "scale": 0.25, "dropout_p": 0.0}
    return dense.Call.of(q, k, v, params=params, spec=parse(spec), **{**arguments, **fields})


def sparse_arguments(policy: SparsePolicy, spec: str = CAUSAL, *params: int, **fields: Any) -> tuple[Any, ...]:
    arguments = {
        "leaves": [], "plan": [], "params": list(params), "spec": spec, "sinks": None, "scale": 0.25,
        "policy": policy.text(), "site": "", **fields,
    }  # fmt: skip
    return tuple(arguments.values())


@pytest.mark.parametrize(
    ("sizes", "spec", "reason"),
    [
        ((768, 768), CAUSAL, None),
        ((768, 768), "", None),
        ((300, 768), MaskSpec(upper="468").text(), None),
        ((300, 768), MaskSpec(upper="400").text(), None),
        ((300, 768), MaskSpec(upper="469").text(), "behind the last"),
        ((300, 768), MaskSpec(upper="-1").text(), "before the first"),
        ((768, 768), MaskSpec(upper="0", lower="-300").text(), None),
        ((768, 768), MaskSpec(lower="-300").text(), "without causality"),
        ((768, 768), MaskSpec(upper="0", equal=("q // 400", "k // 400")).text(), None),
        ((768, 768), MaskSpec(equal=("q // 400", "k // 400")).text(), "documents without causality"),
        ((300, 768), MaskSpec(upper="767", equal=("q // 400", "k // 400")).text(), "documents without causality"),
        ((768, 768), MaskSpec(upper="0", rows="q > 3").text(), "not ranked"),
        ((768, 768), MaskSpec(upper="0", at_most=("q // 4", "k // 4")).text(), "not ranked"),
        ((64, 768), MaskSpec(upper="704").text(), "fewer than a tile"),
        ((511, 511), CAUSAL, "shorter than min_seq=512"),
        ((300, 768), MaskSpec(upper="200").text(), "shorter than min_seq=512"),
    ],
)
def test_what_may_be_approximated(sizes: tuple[int, int], spec: str, reason: str | None) -> None:
    q, k, v = peaked(*sizes)
    why = sparse.why_dense(call_of(q, k, v, spec), q, k, v, SparsePolicy((0.5,), min_seq=512))
    assert why is None if reason is None else why is not None and reason in why


@pytest.mark.parametrize("budgets", [(0.0,), (0.0, 0.0)])
def test_budget_zero_is_the_dense_route(budgets: tuple[float, ...]) -> None:
    q, k, v = peaked()
    output, lse = torch.ops.s2o.sparse_attention(q, k, v, *sparse_arguments(SparsePolicy(budgets)))
    exact, exact_lse = ops.attention(q, k, v, spec=CAUSAL, scale=0.25)
    assert torch.equal(output, exact) and torch.equal(lse, exact_lse)


@pytest.mark.parametrize("spec", [CAUSAL, "", MaskSpec(upper="p0", lower="p0 - 300").text()])
def test_a_prefill_chunk_and_a_static_cache_see_what_the_whole_does(spec: str) -> None:
    """Queries at the end of a cache that is longer than what it holds: the keys behind are nobody's."""
    if parse(spec).upper is None:
        chunk = peaked(256, LENGTH)
        wanted, _ = reference.attention(*chunk, scale=0.25)
        output, _, route, _ = sparse.forward(call_of(*chunk, spec), *chunk, SparsePolicy((1e-9,)))
        assert route == "cpu-s2o" and relative(output, wanted) < 1e-4
        return
    q, k, v = peaked()
    behind = torch.full((1, 1, 100, 16), float("nan"))
    spec = MaskSpec(upper="p0", lower=parse(spec).lower).text()
    whole, _, route, _ = sparse.forward(call_of(q, k, v, spec, 0), q, k, v, SparsePolicy((0.6,)))
    cache_k, cache_v = torch.cat([k, behind], 2), torch.cat([v, behind], 2)
    part, _, _, _ = sparse.forward(
        call_of(q[:, :, 512:], cache_k, cache_v, spec, 512), q[:, :, 512:], cache_k, cache_v, SparsePolicy((0.6,))
    )
    assert route == "cpu-s2o"
    torch.testing.assert_close(part, whole[:, :, 512:], rtol=1e-4, atol=1e-4)


def test_sinks_join_the_softmax() -> None:
    q, k, v = peaked()
    sinks = torch.tensor([2.0, -1.0])
    policy = SparsePolicy((1e-9,))
    output, lse = torch.ops.s2o.sparse_attention(q, k, v, *sparse_arguments(policy, sinks=sinks))
    exact, exact_lse = ops.attention(q, k, v, spec=CAUSAL, scale=0.25, sinks=sinks)
    torch.testing.assert_close(output, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-5)


def test_an_audit_of_all_rows_is_the_error() -> None:
    q, k, v = peaked()
    call = call_of(q, k, v, CAUSAL)
    output, _, _, read = sparse.forward(call, q, k, v, SparsePolicy((0.7,), audit=LENGTH))
    exact, _ = dense.forward(call, q, k, v)
    assert isinstance(read, sparse.Statistics) and read.error is not None
    wanted = (output - exact).square().sum((2, 3)) / exact.square().sum((2, 3))
    torch.testing.assert_close(read.error, wanted, rtol=1e-3, atol=1e-9)


def test_candidates_leave_the_result_exact_and_are_what_they_say() -> None:
    q, k, v = peaked()
    call = call_of(q, k, v, CAUSAL)
    output, _, route, trials = sparse.forward(call, q, k, v, SparsePolicy((0.5,), candidates=(0.9, 0.3)))
    exact, _ = dense.forward(call, q, k, v)
    assert torch.equal(output, exact) and route == "cpu-flash"
    assert isinstance(trials, list) and [trial.budget for trial in trials] == [0.9, 0.3]
    for trial in trials:
        alone, _, _, read = sparse.forward(call, q, k, v, SparsePolicy((trial.budget,)))
        assert isinstance(read, sparse.Statistics)
        torch.testing.assert_close(trial.density, read.pairs / read.visible)
        torch.testing.assert_close(trial.error, (alone - exact).square().sum((2, 3)), rtol=1e-3, atol=1e-9)
    assert trials[0].density.sum() <= trials[1].density.sum()


@pytest.mark.parametrize("policy", [SparsePolicy((0.7,)), SparsePolicy((0.0,)), SparsePolicy((0.7,), min_seq=4096)])
def test_opcheck(policy: SparsePolicy) -> None:
    q, k, v = peaked(256, 300)
    arguments = sparse_arguments(policy, MaskSpec(upper="p0").text(), 44)
    torch.library.opcheck(
        torch.ops.s2o.sparse_attention.default, (q, k, v, *arguments), test_utils=("test_schema", "test_faketensor")
    )


def test_there_is_no_gradient_and_no_silence_about_it() -> None:
    q, k, v = peaked()
    output, _ = torch.ops.s2o.sparse_attention(q.requires_grad_(), k, v, *sparse_arguments(SparsePolicy((0.7,))))
    with pytest.raises(NotImplementedError, match=r"has no gradient.*s2o::attention"):
        output.sum().backward()


def test_a_policy_is_text_and_back() -> None:
    policy = SparsePolicy((0.5, 0.0), 0.25, 7, 3, (0.1,))
    assert sparse_policy.parse(policy.text()) == policy
    for text in ("", "[]", "{}", '{"budgets": 1}'):
        with pytest.raises(ValueError, match=r"not a sparse policy: .*SparsePolicy\.text"):
            sparse_policy.parse(text)


# Calibration.


class Two(nn.Module):
    """Attention whose first head is peaked and whose second is flat: the second needs everything."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(q * torch.tensor([1.0, 0.01])[:, None, None], k, v)


def test_calibration_meets_its_target_at_less_than_full_cost() -> None:
    batches = [peaked(), peaked()]
    config = s2o_inductor.calibrate(Two(), batches, target_error=0.03, options={"min_seq": 512}, progress=False)
    (budgets,) = config.budgets.values()
    assert isinstance(budgets, tuple) and len(budgets) == 2
    assert config.inner == "inductor"
    errors, densities = [], []
    with torch.no_grad():
        for batch in batches:
            torch._dynamo.reset()
            model = torch.compile(Two(), backend="s2o", options={**config.options(), "inner": "aot_eager"})
            errors.append(relative(model(*batch), Two()(*batch)))
            densities += [site["sparse"]["density"] for site in s2o_inductor.last_report().to_dict()["sites"]]
    assert sum(errors) / 2 <= 0.03
    assert max(densities) < 1.0
    tighter = s2o_inductor.calibrate(Two(), batches, target_error=1e-6, options={"min_seq": 512}, progress=False)
    assert sum(*tighter.budgets.values()) < sum(budgets)  # type: ignore[arg-type]


def test_calibration_leaves_nothing_behind_and_says_what_is_wrong() -> None:
    compiled(Model())(*(x.detach() for x in peaked()))
    before = s2o_inductor.last_report().to_dict()["sites"]
    s2o_inductor.calibrate(Two(), [peaked()], target_error=0.1, options={"min_seq": 512}, progress=False)
    assert s2o_inductor.last_report().to_dict()["sites"] == before
    assert torch.is_grad_enabled()
    with pytest.raises(S2OError, match=r"target_error must be above 0; got 0"):
        s2o_inductor.calibrate(Two(), [peaked()], target_error=0)
    for batches in (5, peaked()[0]):  # a tensor would be taken for a list of its rows
        with pytest.raises(S2OError, match="batches must be a list of inputs"):
            s2o_inductor.calibrate(Two(), batches, target_error=0.1)
    with pytest.raises(S2OError, match="at least one batch"):
        s2o_inductor.calibrate(Two(), [], target_error=0.1)
    with pytest.raises(S2OError, match="min_seq"):
        s2o_inductor.calibrate(Two(), [peaked(128, 128)], target_error=0.1, progress=False)


def test_calibration_by_a_metric_of_the_user() -> None:
    seen = []

    def worst(output: Tensor, exact: Tensor) -> float:
        seen.append((output - exact).abs().max().item())
        return seen[-1]

    config = s2o_inductor.calibrate(
        Two(), [peaked()], target_error=1e9, metric=worst, options={"min_seq": 512}, progress=False
    )
    assert len(seen) > 1 and max(seen) > 0
    (budgets,) = config.budgets.values()
    assert budgets == (0.9, 0.9)


def test_the_geometry_refuses_what_does_not_fit() -> None:
    for fields, says in (
        ({"tile": 0}, "tile must be at least 1"),
        ({"sub_means": 7}, "sub_means must divide"),
        ({"run": 3}, "run must divide bundle and block"),
        ({"sink": 65}, "sink must be a multiple of block, and tile too or the other way round; got 65"),
        ({"tile": 96}, "got 256, 96 and 256"),
        ({"clusters": 257}, "clusters must be from 0 to block"),
    ):
        with pytest.raises(ValueError, match=says):
            Geometry(**fields)
