"""What the attention operators promise besides numbers: work left out, routes, strides, errors, autocast."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from dense_cases import CAUSAL, CPU, SPECS, Problem, call_of, leaves_for, problem
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_inductor import ops
from s2o_inductor.kernels import cpu, cpu_blocks, dense, reference
from s2o_inductor.kernels import mask as masks
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.testing import LAYOUTS, assert_close_to_gold, in_memory

# Work that is not done.


def test_hidden_tiles_are_not_read() -> None:
    """Padding full of NaN: tiles that no query sees are never touched, forward or backward."""
    case = problem(1, lengths=(600, 600), spec=MaskSpec(upper="0", keys="(k >= 256) & (k < 512)"))
    k, v = case.k.clone(), case.v.clone()
    for x in (k, v):
        x[:, :, :256] = x[:, :, 512:] = float("nan")
    clean, dirty = case.run(), dataclasses.replace(case, k=k, v=v).run()
    torch.testing.assert_close((dirty[0], dirty[1], *dirty[2]), (clean[0], clean[1], *clean[2]), atol=0, rtol=0)


LEFT = torch.arange(1024) >= torch.tensor([[0], [512]])
DOCUMENTS = (torch.arange(1024) // 256)[None].expand(2, 1024)


@pytest.mark.parametrize(
    ("spec", "leaves", "calls", "pairs"),
    [
        # Windows of 100 keys: blocks of 128 rows see 128 and then 227 keys.
        (MaskSpec(lower="-99", upper="0"), (), 8, 2 * 128 * (128 + 7 * 227)),
        # Wide bands: blocks of 256 rows.
        (MaskSpec(upper="-1"), (), 4, 2 * 256 * (255 + 511 + 767 + 1023)),
        (MaskSpec(upper="0", equal=("L0[b, q]", "L0[b, k]")), (DOCUMENTS,), 4, 2 * 4 * 256 * 256),
        # No term looks at rows: all rows in one block, batch entries apart since they see different keys.
        (MaskSpec(keys="L0[b, k]"), (LEFT,), 2, 1024 * 1024 + 1024 * 512),
        (MaskSpec(upper="0", keys="L0[b, k]"), (LEFT,), 8, 256 * (256 + 512 + 768 + 1024) + 256 * (256 + 512)),
        # A tile without visible rows widens no range, and its batch entry not the range of others.
        (MaskSpec(rows="q >= 128", keys="k >= 512"), (), 4, 2 * 1024 * 512),
        (MaskSpec(rows="b == 0", keys="k >= 512"), (), 8, 1024 * 512),
        (MaskSpec(rows="q < 0"), (), 4, 0),
    ],
)
def test_pairs_computed(spec: MaskSpec, leaves: tuple[Tensor, ...], calls: int, pairs: int) -> None:
    case = problem(2, lengths=(1024, 1024), spec=spec, leaves=leaves)
    blocks = list(cpu_blocks.blocks(call_of(case), 2, 4, 1024, 1024))
    sizes = [[part.stop - part.start for part in (block.batch, block.rows, block.keys)] for block in blocks]
    assert sum(entries * rows * keys for entries, rows, keys in sizes) == pairs
    assert len(blocks) == calls


@pytest.mark.parametrize("name", ["window", "causal, padding", "documents", "chunks", "cache positions"])
def test_no_tensor_grows_with_queries_times_keys(name: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.untyped_storage().nbytes() if isinstance(x, Tensor) else 0)
            return out

    length = 4096
    case = problem(1, (1, 1), (length, length), spec=SPECS[name], leaves=leaves_for(1, length, length), params=(0, 70))
    with Watch():
        call = call_of(case)
        output, lse = dense.forward(call, case.q, case.k, case.v)
        dense.backward(call, case.grad, case.q, case.k, case.v, output, lse)
    assert 0 < largest <= 256 * length * 4, f"a tensor of {largest} bytes; the scores have {length**2} entries"


@pytest.mark.parametrize("name", SPECS)
def test_matrix_products_read_no_value(name: str) -> None:
    """The route that other devices share: on meta tensors, which have no values, with the strides of CPU."""
    case = problem(lengths=(140, 300), spec=SPECS[name], leaves=leaves_for(2, 140, 300), params=(160, 70))
    call = dataclasses.replace(call_of(case), route="cpu-math")
    output, lse = cpu.forward(call, case.q, case.k, case.v)
    expected = [output, lse, *cpu.backward(call, case.grad, case.q, case.k, case.v, output, lse)]
    moved = dataclasses.replace(call, plan=tuple(x.to("meta") for x in call.plan))
    q, k, v, grad = (x.to("meta") for x in (case.q, case.k, case.v, case.grad))
    output, lse = cpu.forward(moved, q, k, v)
    got = [output, lse, *cpu.backward(moved, grad, q, k, v, output, lse)]
    assert [(x.shape, x.dtype, x.stride()) for x in got] == [(x.shape, x.dtype, x.stride()) for x in expected]


# Choice of a route.


@pytest.mark.parametrize(
    ("spec", "fields", "route"),
    [
        (MaskSpec(), {}, "cpu-flash"),
        (CAUSAL, {}, "cpu-flash"),
        (MaskSpec(upper="9"), {}, "cpu-flash"),  # hides nothing: 10 keys
        (MaskSpec(lower="-7", upper="p0"), {"params": (10,)}, "cpu-flash"),  # nor does this: 8 queries
        (MaskSpec(upper="8"), {}, "cpu-blocks"),
        (MaskSpec(lower="-6"), {}, "cpu-blocks"),
        (MaskSpec(keys="k < 3"), {}, "cpu-blocks"),
        (MaskSpec(dense=True), {"mask": torch.ones(1, 1, 1, 10, dtype=torch.bool)}, "cpu-blocks"),
        (CAUSAL, {"dropout_p": 0.1, "seed": torch.tensor([1])}, "cpu-math"),
    ],
)
def test_routes(spec: MaskSpec, fields: dict[str, Any], route: str) -> None:
    assert call_of(problem(lengths=(8, 10), spec=spec), **fields).route == route


def test_no_route_for_other_devices() -> None:
    case = problem(lengths=(8, 10))
    case = dataclasses.replace(case, q=case.q.to("meta"), k=case.k.to("meta"), v=case.v.to("meta"))
    with pytest.raises(ValueError, match="cpu and cuda; got tensors on 'meta'"):
        call_of(case)


@pytest.mark.parametrize("queries", range(5))
@pytest.mark.parametrize("keys", range(5))
def test_sizes_tell_what_a_band_hides(queries: int, keys: int) -> None:
    def visible(**sides: str | None) -> Tensor:
        return masks.evaluate(MaskSpec(**sides), None, [], [], 1, queries, keys, CPU)[0, 0]

    for lower, upper in itertools.product([None, *map(str, range(-5, 6))], repeat=2):
        case = problem(1, lengths=(queries, keys), spec=MaskSpec(lower=lower, upper=upper))
        empty = bool((~visible(lower=lower, upper=upper).any(-1)).any())
        sides = (None if side is None else int(side) for side in (lower, upper))
        assert dense.band_leaves_empty_rows(*sides, queries, keys) == empty
        call = call_of(case)
        assert call.may_be_empty == empty
        if queries and keys:  # a side of the band is dropped exactly when it hides nothing
            assert call.lower == (None if visible(lower=lower).all() else int(lower or 0))
            assert call.upper == (None if visible(upper=upper).all() else int(upper or 0))


def test_repeated_heads_serve_where_the_kernel_knows_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older torch: its kernel wants as many key/value as query heads."""
    real = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    real_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def equal_heads(q: Tensor, k: Tensor, *rest: Any, **fields: Any) -> Any:
        assert q.shape[1] == k.shape[1]
        return real(q, k, *rest, **fields)

    def equal_heads_backward(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **fields: Any) -> Any:
        assert q.shape[1] == k.shape[1]
        return real_backward(grad, q, k, *rest, **fields)

    assert cpu.fused_kernel_groups_heads()
    monkeypatch.setattr(cpu, "fused_kernel_groups_heads", lambda: False)
    monkeypatch.setattr(cpu, "_flash", equal_heads)
    monkeypatch.setattr(cpu, "_flash_backward", equal_heads_backward)
    for name in ("causal", "window", "causal, padding"):
        problem(spec=SPECS[name], params=(0, 70), leaves=leaves_for(2, 300, 300)).check()


# The operators.


def op_arguments(case: Problem, **fields: Any) -> dict[str, Any]:
    return {
        "mask": case.mask, "leaves": list(case.leaves), "plan": [], "params": list(case.params),
        "spec": case.spec.text(), "sinks": case.sinks, "seed": None, "scale": 0.25, "dropout_p": 0.0, "site": "",
        **fields,
    }  # fmt: skip


OPCHECKED = {
    "full": problem(lengths=(20, 30)),
    "gaps": dataclasses.replace(problem(lengths=(20, 30)), q=in_memory(problem(lengths=(20, 30)).q, "gaps")),
    "bfloat16 window, sinks": problem(
        lengths=(20, 30), dtype=torch.bfloat16, spec=SPECS["window"], params=(10, 7), sinks=torch.zeros(4)
    ),
    "terms": problem(
        lengths=(20, 30), widths=(16, 8), dtype=torch.float64, spec=SPECS["all"], params=(10, 7),
        leaves=leaves_for(2, 20, 30),
    ),
    "dense": problem(lengths=(20, 30), spec=MaskSpec(dense=True), mask=torch.rand(2, 1, 20, 30) < 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    case = OPCHECKED[name]
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (case.q, case.k, case.v)]
    fields = op_arguments(case)
    if fields["sinks"] is not None:
        fields["sinks"] = fields["sinks"].clone().requires_grad_()
    torch.library.opcheck(torch.ops.s2o.attention.default, (*inputs, *fields.values()))
    output, lse = torch.ops.s2o.attention(case.q, case.k, case.v, *op_arguments(case).values())
    arguments = (case.grad, case.q, case.k, case.v, output, lse, *op_arguments(case).values())
    torch.library.opcheck(torch.ops.s2o.attention_backward.default, arguments)
    mask_arguments = (case.mask, list(case.leaves), list(case.params), case.spec.text(), *case.sizes)
    torch.library.opcheck(torch.ops.s2o.attention_mask.default, mask_arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes", [(2, 4, 2, 20, 30), (1, 1, 1, 1, 1), (2, 4, 2, 1, 30), (0, 4, 2, 5, 6), (2, 4, 2, 0, 6), (2, 4, 2, 5, 0)]
)
def test_results_have_the_strides_that_fakes_promise(sizes: tuple[int, ...], layout: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, heads, kv_heads, queries, keys = sizes
    for spec in (MaskSpec(), CAUSAL, SPECS["window"], MaskSpec(keys="k < 3", empty="mean")):
        case = problem(
            batch, (heads, kv_heads), (queries, keys), (16, 8), spec=spec, params=(0, 3), sinks=torch.zeros(heads)
        )
        q, k, v = (in_memory(x, layout) for x in (case.q, case.k, case.v))
        fields = list(op_arguments(case).values())
        output, lse = torch.ops.s2o.attention(q, k, v, *fields)
        grads = torch.ops.s2o.attention_backward(case.grad, q, k, v, output, lse, *fields)
        plan = torch.ops.s2o.attention_mask(None, [], [], "{}", batch, queries, keys, CPU)
        mode = FakeTensorMode()
        with mode:
            fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in (q, k, v, *fields)]
            promised = [
                *torch.ops.s2o.attention(*fake),
                *torch.ops.s2o.attention_backward(
                    *(mode.from_tensor(x) for x in (case.grad, q, k, v, output, lse)), *fake[3:]
                ),
                *torch.ops.s2o.attention_mask(None, [], [], "{}", batch, queries, keys, CPU),
            ]  # fmt: skip
        for actual, fact in zip((output, lse, *grads, *plan), promised, strict=True):
            assert (actual.shape, actual.dtype, actual.stride()) == (fact.shape, fact.dtype, fact.stride())


@pytest.mark.parametrize("empty", ["zero", "mean", "shifted", "nan"])
def test_no_keys_at_all(empty: str) -> None:
    case = problem(lengths=(5, 0), spec=MaskSpec(empty=empty))
    output, lse, grads = case.run()
    assert output.eq(0).all() and lse.eq(float("-inf")).all() and all(x.eq(0).all() for x in grads)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.ones(2, 8, 16)}, "4-D"),
        ({"q": torch.ones(2, 3, 8, 16)}, "multiple of key/value heads; got 3 and 2"),
        ({"q": torch.ones(2, 4, 8, 12)}, "got .2, 4, 8, 12., .2, 2, 10, 16."),
        ({"v": torch.ones(2, 2, 9, 16)}, "needs q"),
        ({"k": torch.ones(2, 2, 10, 16).bfloat16()}, "one dtype"),
        ({"k": torch.ones(2, 2, 10, 16, device="meta")}, "one device"),
        (dict.fromkeys(("q", "k", "v"), torch.ones(2, 4, 8, 16).int()), "supports float16"),
        ({"mask": torch.ones(1, 1, 8, 10)}, "go together; got a mask .1, 1, 8, 10. and spec ''"),
        ({"spec": '{"dense":true}'}, "go together; got no mask"),
        ({"spec": '{"dense":true}', "mask": torch.ones(8, 10)}, "4-D"),
        ({"spec": '{"dense":true}', "mask": torch.ones(1, 1, 8, 10).int()}, "boolean or floating point"),
        ({"spec": '{"dense":true}', "mask": torch.ones(1, 3, 8, 10)}, "must broadcast to"),
        ({"spec": '{"upper":"p3"}'}, "p3 needs 4 parameters; got 0"),
        ({"spec": '{"upper":"k"}'}, "unknown name"),
        ({"spec": '{"keys":"L0[b, k]"}', "leaves": [torch.ones(2, 9)]}, "out of range for size 9"),
        ({"spec": '{"typo":1}'}, "not a mask spec"),
        ({"sinks": torch.ones(3)}, "one logit per query head"),
        ({"plan": [torch.ones(1)]}, "4 tensors"),
        ({"dropout_p": 0.5}, "needs a seed"),
        ({"dropout_p": 1.5, "seed": torch.tensor([1])}, "probability; got 1.5"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change: dict[str, Any], reason: str) -> None:
    case = problem(lengths=(8, 10))
    fields: dict[str, Any] = {"q": case.q, "k": case.k, "v": case.v, "mask": None, **change}
    operands = [fields.pop(name) for name in ("q", "k", "v", "mask")]
    with pytest.raises(ValueError, match=reason):
        ops.attention(*operands, **fields)


# Autocast.


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_autocast_casts_as_sdpa_does(mode: str) -> None:
    case = problem(heads=(4, 4), lengths=(20, 30))
    mask = torch.randn(1, 1, 20, 30)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, _ = ops.attention(q, k.to(torch.bfloat16), v, mask, spec='{"dense":true}')
            return ours, scaled_dot_product_attention(q, k, v, mask)

    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    ours, theirs = torch.compile(function, backend=mode, fullgraph=True)(q, k, v)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    grads = [torch.autograd.grad(x, (q, k, v), case.grad.to(x.dtype), retain_graph=True) for x in (ours, theirs)]
    assert all(g.dtype == torch.float32 for g in grads[0])
    torch.testing.assert_close(*grads, atol=3e-2, rtol=3e-2)


def test_autocast_leaves_the_rest_alone() -> None:
    case = problem(lengths=(20, 30), dtype=torch.float64)
    sinks = torch.full((4,), 1.0 + 2**-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, lse = ops.attention(case.q, case.k, case.v)
        assert output.dtype == lse.dtype == torch.float64
        # A row with no key has the sink as its log-sum-exp: in float32, not rounded to bfloat16.
        _, lse = ops.attention(*(x.float() for x in (case.q, case.k, case.v)), sinks=sinks, spec='{"upper":"-3"}')
        assert torch.equal(lse[0, :, 0], sinks) and not torch.equal(sinks, sinks.bfloat16().float())
        # A leaf compared in float32: in bfloat16 it would be 1 and hide nothing.
        leaf = torch.full((30,), 1.0 - 2**-12)
        _, lse = ops.attention(
            *(x.float() for x in (case.q, case.k, case.v)), leaves=[leaf], spec='{"keys":"L0[k] >= 1"}'
        )
        assert lse.eq(float("-inf")).all()
    off, _ = ops.attention(*(x.float() for x in (case.q, case.k, case.v)))
    assert off.dtype == torch.float32


# The reference itself.


def test_reference_agrees_with_torch() -> None:
    case = problem(heads=(4, 2), lengths=(20, 30), dtype=torch.float64)
    visible = masks.evaluate(SPECS["window"], None, [], [10, 7], 2, 20, 30, CPU)
    output, _ = reference.attention(case.q, case.k, case.v, visible=visible)
    expected = scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    bias = torch.randn(1, 4, 20, 30, dtype=torch.float64)
    output, lse = reference.attention(case.q, case.k, case.v, bias=bias, scale=0.7)
    expected = scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=bias, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    scores = case.q @ case.k.repeat_interleave(2, 1).transpose(-1, -2) * 0.7 + bias
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())
    with pytest.raises(ValueError, match=r"empty must be .*; got 'none'"):
        reference.attention(case.q, case.k, case.v, empty="none")


# The tools of these tests.


def test_bound_accepts_rounding_and_nothing_more() -> None:
    gold = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = gold.to(torch.bfloat16)
    band = torch.finfo(torch.bfloat16).eps * float(gold.abs().max())
    worst = float((low - gold).abs().max())
    assert_close_to_gold(low.float(), low.float(), gold)
    within, beyond = low.double(), low.double()
    within[2, 3] = gold[2, 3] + 1.9 * (worst + band)
    beyond[2, 3] = gold[2, 3] + 2.1 * (worst + band)
    assert_close_to_gold(within.float(), low.float(), gold, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"max err .* allowed .*the first at \(2, 3\)"):
        assert_close_to_gold(beyond.float(), low.float(), gold, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="rms err"):  # a drift no larger than single errors may be
        assert_close_to_gold((gold + 1.9 * band).float(), low.float(), gold, dtype=torch.bfloat16)


def test_bound_compares_what_is_not_a_number() -> None:
    gold = torch.ones(3, dtype=torch.float64)
    for value, name in ((float("nan"), "NaN"), (float("inf"), "inf"), (float("-inf"), "-inf")):
        special = gold.clone()
        special[1] = value
        assert_close_to_gold(special.float(), special.float(), special)
        for actual, truth in ((special, gold), (gold, special)):
            with pytest.raises(AssertionError, match=f"{name} differs from gold at 1 places, the first at \\(1,\\)"):
                assert_close_to_gold(actual.float(), truth.float(), truth)
    with pytest.raises(AssertionError, match=r"dtype is .*float32; torch gives .*bfloat16"):
        assert_close_to_gold(gold.float(), gold.bfloat16(), gold)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_gold(gold.float()[:2], gold.float(), gold)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    x = torch.randn(2, 3, 5, 7)
    y = in_memory(x, layout)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()
    assert (y.stride() == x.stride()) == (layout in ("contiguous", "odd_offset"))
    storage = torch.empty(0).set_(y.untyped_storage())
    assert storage.isnan().sum() == storage.numel() - x.numel(), "gaps hold NaN"


def test_unwritten_memory_holds_nan() -> None:
    assert dense.empty_heads_last((1, 2, 3, 4), torch.zeros(1)).isnan().all()
