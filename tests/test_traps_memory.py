"""What shares memory with attention and is written to: the op has other strides, and keeps other tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from torch import Tensor

import s2o_inductor
from s2o_inductor import report
from s2o_inductor.passes.attention import find_attention

AOT = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def heads(grad: bool) -> list[Tensor]:
    return [torch.randn(2, 2, 6, 8, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output lies as (B, H, S, D), that of the op as (B, S, H, D)."""
    return (q @ k.mT * 0.3).softmax(-1) @ v


def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output lies as that of the op."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output lies neither as that of the op nor contiguously."""
    return torch.einsum("bhqk,bhkd->bqhd", (q @ k.mT).softmax(-1), v)


def run(function: Callable[..., Any], grad: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a function of q, k and v."""
    torch.manual_seed(1)
    leaves = heads(grad)
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    grads = torch.autograd.grad(sum(one.square().sum() for one in outputs), leaves) if grad else ()
    return [one.detach() for one in outputs], list(grads)


def compare(function: Callable[..., Any], grad: bool) -> list[str]:
    """Compiled against eager; the status of every site."""
    expected = run(function, grad)
    torch.testing.assert_close(run(torch.compile(function, backend="s2o", options=AOT), grad), expected)
    return [site["status"] for site in s2o_inductor.last_report().to_dict()["sites"]]


# Each looks at the output where strides allow it, and copies it elsewhere.
LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda out: out.reshape(2, -1),
    "flatten": lambda out: out.flatten(1),
    "ravel": lambda out: out.ravel(),
    "contiguous": lambda out: out.contiguous(),
    "merged heads": lambda out: out.transpose(1, 2).reshape(2, 6, 16),
    "turned": lambda out: out.transpose(1, 2).contiguous(),
    "view": lambda out: out[:, 0].view(2, -1),
    "itself": lambda out: out,
}


ATTENDS = {attend.__name__: attend for attend in (written_out, called, by_einsum)}
# Strides such as those of an einsum have no view.
VIEWED = [(name, look) for name in ATTENDS for look in LOOKS if (name, look) != ("by_einsum", "view")]


@pytest.mark.parametrize(("attend", "look"), VIEWED)
def test_a_write_reaches_the_output_as_in_the_code_that_was_replaced(attend: str, look: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = ATTENDS[attend](q, k, v)
        seen = LOOKS[look](out)
        seen.mul_(2.0)
        return out + 0, seen + 0

    assert compare(function, grad=False) == ["declined" if attend == "by_einsum" else "rewritten"]


@pytest.mark.parametrize("look", ["merged heads", "turned", "contiguous", "itself"])
def test_an_output_that_is_written_to_is_none_that_the_backward_pass_reads(look: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = LOOKS[look](written_out(q, k, v))
        seen += 1.0
        return F.relu(seen, inplace=True)

    assert compare(function, grad=True) == ["rewritten"]


def test_two_names_of_an_output_that_leave_the_graph_share_memory_as_before() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = written_out(q, k, v)
        return out, out.reshape(2, -1), out.transpose(1, 2).contiguous()

    for call in (function, torch.compile(function, backend="s2o", options=AOT)):
        out, same, other = call(*heads(grad=False))
        same.zero_()
        assert not out.any() and other.any()


def causal_bias(q: Tensor) -> Tensor:
    return torch.full((6, 6), -math.inf, dtype=q.dtype).triu(1)


def added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).softmax(-1) @ v


def bias_that_is_cleared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = causal_bias(q)
    out = added(q, k, v, bias)
    bias.zero_()
    return out + added(q, k, v, bias)


def bias_that_grows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias, out = torch.zeros(6, 6, dtype=q.dtype), v
    for key in (5, 4, 3):
        bias[:, key] = -math.inf
        out = added(q, k, out, bias)
    return out


def mask_that_is_cleared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    visible.fill_(True)
    return out + F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def keys_behind_their_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k + 1
    out = called(q[:, [0, 0, 1, 1]], k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))
    k.zero_()
    return out


KEPT = (bias_that_is_cleared, bias_that_grows, mask_that_is_cleared, keys_behind_their_copies)


@pytest.mark.parametrize("function", KEPT, ids=lambda function: function.__name__)
def test_operands_that_change_before_the_backward_pass_are_kept_as_they_were(function: Callable[..., Any]) -> None:
    assert set(compare(function, grad=True)) == {"rewritten"}


def test_sinks_that_change_before_the_backward_pass_decline_the_site() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sinks = q.mean((0, 2, 3))
        column = sinks[None, :, None, None].expand(2, 2, 6, 1)
        out = torch.cat([q @ k.mT, column], dim=-1).softmax(-1)[..., :-1] @ v
        sinks.zero_()
        return out

    assert compare(function, grad=True) == ["declined"]


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_only_read_is_not_copied(grad: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        merged = added(q, k, v, causal_bias(q)).transpose(1, 2).reshape(2, 6, 16)
        return F.relu(merged + 1.0, inplace=True)

    gm, _ = capture(function, *heads(grad))
    (site,), declined = find_attention(gm.graph)
    copies = [name for one in (site.q, site.k, site.v, *site.masks) for name, _ in one.steps if name == "clone"]
    assert not (declined or copies or site.out_steps)
