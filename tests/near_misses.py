"""Code that looks like attention and must stay as it is, each case with the reason that is expected.

A case is a function of (q, k, v, bias, visible): (2, 4, 12, 8) three times, an added and a boolean
mask of (12, 12). `None` as reason: the code is not even a candidate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, D = 2, 4, 12, 8
INF = math.inf


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """A function, its inputs, and a part of the reason why it is no attention site."""

    function: Callable[..., Any]
    reason: str | None
    inputs: Callable[[], tuple[Any, ...]]


def standard() -> tuple[Tensor, ...]:
    """The inputs that most cases take."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(B, H, S, D, generator=generator) for _ in range(3))
    visible = torch.rand(S, S, generator=generator) < 0.7
    return q, k, v, torch.zeros(S, S).masked_fill(~visible, -INF), visible


def square() -> tuple[Tensor, ...]:
    """As many heads as queries: shapes alone do not tell the axes apart."""
    q, k, v = (torch.randn(B, S, S, S) for _ in range(3))
    return q, k, v, torch.zeros(S, S), torch.ones(S, S, dtype=torch.bool)


def all_equal() -> tuple[Tensor, ...]:
    """Every dimension of one size."""
    return *(torch.randn(4, 4, 4, 4) for _ in range(3)), torch.zeros(4, 4), torch.rand(4, 4) < 0.7


def two_keys() -> tuple[Any, ...]:
    """The standard inputs cut to two keys, and sink logits."""
    q, k, v, bias, visible = standard()
    return q, k[:, :, :2], v[:, :, :2], bias[:, :2], visible[:, :2], torch.randn(H)


def one_more(extra: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    """The standard inputs and one more."""
    return lambda: (*standard(), extra())


def other_heads(keys: int, values: int) -> Callable[[], tuple[Any, ...]]:
    """The standard inputs with fewer key or value heads."""
    return lambda: (standard()[0], standard()[1][:, :keys], standard()[2][:, :values], *standard()[3:])


NEAR_MISSES: dict[str, NearMiss] = {}


def near_miss(reason: str | None, inputs: Callable[[], tuple[Any, ...]] = standard) -> Callable[[Any], Any]:
    """Adds the decorated function to the cases."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES[function.__name__] = NearMiss(function, reason, inputs)
        return function

    return add


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores, (B, H, S, S)."""
    return (q @ k.transpose(-1, -2)) * D**-0.5


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights, (B, H, S, S)."""
    return scores_of(q, k).softmax(-1)


# ------------------------------------------------------------------------------ not that softmax


@near_miss("not over the last one")
def softmax_over_queries(q, k, v, bias, visible):
    return scores_of(q, k).softmax(-2) @ v


@near_miss("not over the last one")
def softmax_over_heads(q, k, v, bias, visible):
    return scores_of(q, k).softmax(1) @ v


@near_miss("not over the last one")
def softmax_over_batch(q, k, v, bias, visible):
    return F.softmax(scores_of(q, k), dim=0) @ v


@near_miss("not summed over the keys")
def softmax_over_transposed_scores(q, k, v, bias, visible):
    return scores_of(k, q).softmax(-1).mT @ v


@near_miss("does not run over the keys")
def softmax_over_queries_and_keys(q, k, v, bias, visible):
    return scores_of(q, k).flatten(2).softmax(-1).view(B, H, S, S) @ v


@near_miss("does not run over the keys")
def softmax_over_heads_and_keys(q, k, v, bias, visible):
    scores = scores_of(q, k).transpose(1, 2).flatten(2)
    return scores.softmax(-1).view(B, S, H, S).transpose(1, 2) @ v


@near_miss(None)
def sigmoid(q, k, v, bias, visible):
    return scores_of(q, k).sigmoid() @ v


@near_miss(None)
def relu_normalised(q, k, v, bias, visible):
    weights = scores_of(q, k).relu()
    return weights / weights.sum(-1, keepdim=True) @ v


@near_miss(None)
def log_softmax(q, k, v, bias, visible):
    return scores_of(q, k).log_softmax(-1) @ v


@near_miss(None)
def softmin(q, k, v, bias, visible):
    return F.softsign(scores_of(q, k)) @ v


@near_miss(None)
def exponentials_not_normalised(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return torch.exp(scores - scores.amax(-1, keepdim=True)) @ v


@near_miss(None)
def exponentials_that_overflow(q, k, v, bias, visible):
    powers = scores_of(q, k).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


@near_miss("not over the last one")
def exponentials_normalised_over_queries(q, k, v, bias, visible):
    scores = scores_of(q, k)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-2, keepdim=True) @ v


@near_miss(None)
def exponentials_shifted_over_queries(q, k, v, bias, visible):
    scores = scores_of(q, k)
    powers = (scores - scores.amax(-2, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


@near_miss(None)
def exponentials_over_another_sum(q, k, v, bias, visible):
    scores = scores_of(q, k)
    powers, others = (scores - scores.amax(-1, keepdim=True)).exp(), (2 * scores).exp()
    return powers / others.sum(-1, keepdim=True) @ v


@near_miss("'softmax'")
def softmax_twice(q, k, v, bias, visible):
    return weights_of(q, k).softmax(-1) @ v


# --------------------------------------------------------------------------- scores with a past


@near_miss("soft-capped")
def soft_cap(q, k, v, bias, visible):
    return (torch.tanh(scores_of(q, k) / 30.0) * 30.0).softmax(-1) @ v


@near_miss("pass through 'clamp'")
def clamped(q, k, v, bias, visible):
    return scores_of(q, k).clamp(min=-5.0).softmax(-1) @ v


@near_miss("pass through 'relu'")
def rectified(q, k, v, bias, visible):
    return F.relu(scores_of(q, k)).softmax(-1) @ v


@near_miss("pass through 'dropout'")
def dropout_on_scores(q, k, v, bias, visible):
    return F.dropout(scores_of(q, k), 0.1, True).softmax(-1) @ v


@near_miss("pass through 'pow'")
def squared(q, k, v, bias, visible):
    return (scores_of(q, k) ** 2).softmax(-1) @ v


@near_miss("pass through 'abs'")
def absolute(q, k, v, bias, visible):
    return scores_of(q, k).abs().softmax(-1) @ v


@near_miss("pass through 'cumsum'")
def accumulated(q, k, v, bias, visible):
    return scores_of(q, k).cumsum(-1).softmax(-1) @ v


@near_miss("pass through 'roll'")
def rolled(q, k, v, bias, visible):
    return scores_of(q, k).roll(1, -1).softmax(-1) @ v


@near_miss("pass through 'flip'")
def flipped(q, k, v, bias, visible):
    return scores_of(q, k).flip(-1).softmax(-1) @ v


@near_miss("pass through 'detach'")
def detached_scores(q, k, v, bias, visible):
    return scores_of(q, k).detach().softmax(-1) @ v


@near_miss("pass through 'layer_norm'")
def normalised_scores(q, k, v, bias, visible):
    return F.layer_norm(scores_of(q, k), (S,)).softmax(-1) @ v


@near_miss("pass through 'conv2d'")
def convolved_scores(q, k, v, bias, visible):
    return F.conv2d(scores_of(q, k), torch.ones(H, H, 1, 1)).softmax(-1) @ v


@near_miss(None)
def shortened_scores(q, k, v, bias, visible):
    return scores_of(q, k)[..., 1:].softmax(-1) @ v[:, :, 1:].contiguous().cos()


@near_miss(None)
def padded_scores(q, k, v, bias, visible):
    return F.pad(scores_of(q, k), (1, 0)).softmax(-1)[..., 1:] @ v


@near_miss("used elsewhere")
def symmetrised_scores(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores + scores.mT).softmax(-1) @ v


@near_miss("used elsewhere")
def centred_scores(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores - scores.mean(-1, keepdim=True)).softmax(-1) @ v


@near_miss("used elsewhere")
def less_minimum(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores - scores.amin(-1, keepdim=True)).softmax(-1) @ v


@near_miss("used elsewhere")
def maximum_over_queries(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


@near_miss("used elsewhere")
def noise_shaped_like_scores(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores + torch.rand_like(scores)).softmax(-1) @ v


@near_miss("used elsewhere")
def top_k_of_scores(q, k, v, bias, visible):
    scores = scores_of(q, k)
    least = scores.topk(3, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -INF).softmax(-1) @ v


@near_miss("used elsewhere")
def scores_returned(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores


@near_miss("used elsewhere")
def unscaled_scores_returned(q, k, v, bias, visible):
    scores = q @ k.mT
    return (scores * 0.5).softmax(-1) @ v, scores


@near_miss("used elsewhere")
def scores_in_a_loss(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores.square().mean()


@near_miss("multiplied by a tensor", one_more(lambda: torch.rand(H, 1, 1)))
def temperature_per_head(q, k, v, bias, visible, temperature):
    return (scores_of(q, k) * temperature).softmax(-1) @ v


@near_miss("multiplied by a tensor", one_more(lambda: torch.tensor(0.3)))
def temperature_of_one_entry(q, k, v, bias, visible, temperature):
    return (scores_of(q, k) / temperature).softmax(-1) @ v


@near_miss("used elsewhere", all_equal)
def maximum_without_its_dimension(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores - scores.amax(-1)).softmax(-1) @ v


@near_miss("not floating point")
def less_the_place_of_the_maximum(q, k, v, bias, visible):
    scores = scores_of(q, k)
    return (scores - scores.max(-1, keepdim=True).indices).softmax(-1) @ v


@near_miss("multiplied by a tensor")
def quotient_rounded_down(q, k, v, bias, visible):
    return torch.div(q @ k.mT, 0.1, rounding_mode="floor").softmax(-1) @ v


@near_miss(None)
def half_of_a_bias_in_the_product(q, k, v, bias, visible):
    scores = torch.baddbmm(bias.expand(B * H, S, S), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1))


@near_miss("multiplied by a tensor")
def reciprocal_scores(q, k, v, bias, visible):
    return (0.5 / (q @ k.mT)).softmax(-1) @ v


@near_miss("multiplied by a tensor")
def cosine_of_scores(q, k, v, bias, visible):
    lengths = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1)[:, :, None]
    return ((q @ k.mT) / lengths).softmax(-1) @ v


@near_miss("multiplied by a tensor")
def masked_by_a_product(q, k, v, bias, visible):
    return (scores_of(q, k) * visible.float()).softmax(-1) @ v


@near_miss(None)
def distances(q, k, v, bias, visible):
    return (-torch.cdist(q, k)).softmax(-1) @ v


@near_miss("does not run over the keys", one_more(lambda: torch.randn(H, H)))
def talking_heads(q, k, v, bias, visible, mix):
    return torch.einsum("bhqk,hg->bgqk", scores_of(q, k), mix).softmax(-1) @ v


@near_miss(None, one_more(lambda: torch.zeros(3, 1, 1, S, S)))
def mask_that_adds_a_dimension(q, k, v, bias, visible, wide):
    return (scores_of(q, k) + wide).softmax(-1) @ v


@near_miss("do not line up")
def broadcast_queries(q, k, v, bias, visible):
    return ((q[:1] @ k.mT) * 0.3).softmax(-1) @ v


@near_miss("do not line up")
def shared_keys_with_own_values(q, k, v, bias, visible):
    return ((q @ k[:, :1].mT) * 0.3).softmax(-1) @ v


@near_miss("do not line up", other_heads(4, 1))
def own_keys_with_shared_values(q, k, v, bias, visible):
    return weights_of(q, k) @ v


@near_miss("several logits")
def two_key_sets(q, k, v, bias, visible):
    scores = torch.cat([scores_of(q, k), scores_of(q, v)], dim=-1)
    return scores.softmax(-1)[..., :S] @ v


# -------------------------------------------------------------------------------- masks that are not


@near_miss("does not hide them")
def filled_with_zero(q, k, v, bias, visible):
    return scores_of(q, k).masked_fill(~visible, 0.0).softmax(-1) @ v


@near_miss("does not hide them")
def filled_with_too_little(q, k, v, bias, visible):
    return scores_of(q, k).masked_fill(~visible, -100.0).softmax(-1) @ v


@near_miss("does not hide them")
def filled_with_plus_infinity(q, k, v, bias, visible):
    return scores_of(q, k).masked_fill(~visible, INF).softmax(-1) @ v


@near_miss("does not hide them")
def filled_then_scaled_away(q, k, v, bias, visible):
    return ((q @ k.mT).masked_fill(~visible, -1e5) * 1e-4).softmax(-1) @ v


@near_miss("does not hide them")
def filled_then_multiplied_by_zero(q, k, v, bias, visible):
    return ((q @ k.mT).masked_fill(~visible, -INF) * 0.0).softmax(-1) @ v


@near_miss("pass through 'setitem'", all_equal)
def leading_dimensions_filled(q, k, v, bias, visible):
    scores = scores_of(q, k)
    scores[visible] = -INF
    return scores.softmax(-1) @ v


@near_miss("does not hide them")
def filled_then_negated(q, k, v, bias, visible):
    return ((q @ k.mT).masked_fill(~visible, -INF) * -1.0).softmax(-1) @ v


@near_miss("replaced by a tensor")
def filled_with_other_scores(q, k, v, bias, visible):
    return torch.where(visible, scores_of(q, k), scores_of(k, q)).softmax(-1) @ v


@near_miss("replaced by a tensor", one_more(lambda: torch.tensor(-1e9)))
def filled_with_an_input(q, k, v, bias, visible, value):
    return torch.where(visible, scores_of(q, k), value).softmax(-1) @ v


@near_miss("replaced by a tensor")
def filled_with_a_number_that_changes(q, k, v, bias, visible):
    value = torch.full([], -1e9)
    value.fill_(-1.0)
    return torch.where(visible, scores_of(q, k), value).softmax(-1) @ v


@near_miss("do not line up", one_more(lambda: torch.zeros(2, 1, S, S)))
def mask_per_shared_head(q, k, v, bias, visible, per_head):
    scores = q.view(B, 2, 2, S, D) @ k[:, :2, None].mT * 0.3 + per_head
    return scores.softmax(-1) @ v[:, :2, None]


@near_miss("scaled after a mask")
def scaled_after_adding(q, k, v, bias, visible):
    return ((q @ k.mT + bias) * D**-0.5).softmax(-1) @ v


@near_miss("a finite fill value")
def finite_fill_and_added_mask(q, k, v, bias, visible):
    return (scores_of(q, k).masked_fill(~visible, -1e9) + bias).softmax(-1) @ v


@near_miss("a finite fill value")
def added_mask_and_finite_fill(q, k, v, bias, visible):
    return (scores_of(q, k) + bias).masked_fill(~visible, -1e9).softmax(-1) @ v


@near_miss("a finite fill value")
def two_finite_fills(q, k, v, bias, visible):
    scores = scores_of(q, k).masked_fill(~visible, -1e9)
    return torch.where(visible.mT, scores, -1e8).softmax(-1) @ v


@near_miss("a finite fill value")
def finite_fill_and_infinite_fill(q, k, v, bias, visible):
    return scores_of(q, k).masked_fill(~visible, -1e9).masked_fill(~visible.mT, -INF).softmax(-1) @ v


@near_miss("something other than a mask")
def constant_added(q, k, v, bias, visible):
    return (scores_of(q, k) + 1.0).softmax(-1) @ v


@near_miss("something other than a mask")
def mask_added_twice_over(q, k, v, bias, visible):
    return torch.add(scores_of(q, k), bias, alpha=2).softmax(-1) @ v


@near_miss("something other than a mask")
def subtracted_from_a_mask(q, k, v, bias, visible):
    return (bias - scores_of(q, k)).softmax(-1) @ v


@near_miss("not floating point")
def integers_added(q, k, v, bias, visible):
    return (scores_of(q, k) + visible.long()).softmax(-1) @ v


@near_miss("needs a gradient", one_more(lambda: torch.zeros(H, S, S, requires_grad=True)))
def learned_bias(q, k, v, bias, visible, learned):
    return (scores_of(q, k) + learned).softmax(-1) @ v


@near_miss("needs a gradient", one_more(lambda: torch.zeros(H, S, S, requires_grad=True)))
def learned_bias_in_a_call(q, k, v, bias, visible, learned):
    return F.scaled_dot_product_attention(q, k, v, learned[None])


@near_miss("needs a gradient", one_more(lambda: torch.zeros(H, S, S, requires_grad=True)))
def learned_bias_in_baddbmm(q, k, v, bias, visible, learned):
    scores = torch.baddbmm(learned, q[0], k[0].mT)
    return torch.bmm(scores.softmax(-1), v[0])


# ------------------------------------------------------------------------------------ sinks that are not


@near_miss("do not line up", one_more(lambda: torch.randn(B, H, S, 1)))
def sink_per_query(q, k, v, bias, visible, sink):
    return torch.cat([scores_of(q, k), sink], -1).softmax(-1)[..., :-1] @ v


@near_miss("not summed over the keys", one_more(lambda: torch.randn(H)))
def sink_with_a_value(q, k, v, bias, visible, sink):
    column = sink.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat([scores_of(q, k), column], -1).softmax(-1) @ F.pad(v, (0, 0, 0, 1))


@near_miss("changed before they reach the values", one_more(lambda: torch.randn(H)))
def sink_dropped_on_the_wrong_side(q, k, v, bias, visible, sink):
    column = sink.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat([scores_of(q, k), column], -1).softmax(-1)[..., 1:] @ v


@near_miss(None, one_more(lambda: torch.randn(H)))
def sink_dropped_with_heads(q, k, v, bias, visible, sink):
    column = sink.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat([scores_of(q, k), column], -1).softmax(-1)[:, :2, :, :-1] @ v[:, :2]


@near_miss(None, two_keys)
def every_other_weight_beside_a_sink(q, k, v, bias, visible, sink):
    column = sink.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat([scores_of(q, k), column], -1).softmax(-1)[..., ::2] @ v


@near_miss("masked or scaled along", one_more(lambda: torch.randn(H)))
def sink_scaled_along(q, k, v, bias, visible, sink):
    column = sink.view(1, H, 1, 1).expand(B, H, S, 1)
    return (torch.cat([q @ k.mT, column], -1) * 0.3).softmax(-1)[..., :-1] @ v


@near_miss("masked or scaled along", one_more(lambda: torch.randn(H)))
def sink_masked_along(q, k, v, bias, visible, sink):
    column = sink.view(1, H, 1, 1).expand(B, H, S, 1)
    return (torch.cat([scores_of(q, k), column], -1) + F.pad(bias, (0, 1))).softmax(-1)[..., :-1] @ v


@near_miss("several logits", one_more(lambda: torch.randn(H, 2)))
def two_sinks(q, k, v, bias, visible, sinks):
    columns = sinks.view(1, H, 1, 2).expand(B, H, S, 2)
    return torch.cat([scores_of(q, k), columns], -1).softmax(-1)[..., :S] @ v


# ------------------------------------------------------------------------------ weights with a future


@near_miss("weights are used elsewhere")
def weights_returned(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return weights @ v, weights


@near_miss("weights are used elsewhere")
def averaged_weights_returned(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return weights @ v, weights.mean(1)


@near_miss("weights are used elsewhere")
def weights_used_twice(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return weights @ v, weights @ k


@near_miss("weights are used elsewhere")
def entropy_of_weights(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return weights @ v, torch.special.entr(weights).sum()


@near_miss("weights are used elsewhere")
def weights_stored(q, k, v, bias, visible):
    weights = weights_of(q, k)
    store = torch.empty(B, H, S, S).copy_(weights)
    return weights @ v, store


@near_miss("weights are used elsewhere")
def cast_weights_returned(q, k, v, bias, visible):
    weights = weights_of(q, k).to(torch.bfloat16)
    return weights @ v.bfloat16(), weights


@near_miss("changed before they reach the values ('masked_fill')")
def masked_after_softmax(q, k, v, bias, visible):
    return weights_of(q, k).masked_fill(~visible, 0.0) @ v


@near_miss("changed before they reach the values ('mul')")
def multiplied_by_mask_after_softmax(q, k, v, bias, visible):
    return (weights_of(q, k) * visible) @ v


@near_miss("changed before they reach the values ('masked_fill')")
def masked_in_place_after_softmax(q, k, v, bias, visible):
    weights = weights_of(q, k)
    weights.masked_fill_(~visible, 0.0)
    return weights @ v


@near_miss("weights are used elsewhere")
def renormalised(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return (weights / weights.sum(-2, keepdim=True)) @ v


@near_miss("changed before they reach the values ('add')")
def bias_after_softmax(q, k, v, bias, visible):
    return (weights_of(q, k) + visible) @ v


@near_miss("weights are used elsewhere")
def thresholded(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return (weights * (weights > 0.1)) @ v


@near_miss("changed before they reach the values ('nan_to_num')")
def without_nan(q, k, v, bias, visible):
    return (scores_of(q, k) + bias).softmax(-1).nan_to_num() @ v


@near_miss("changed before they reach the values ('mul')")
def scaled_weights(q, k, v, bias, visible):
    return (weights_of(q, k) * 2.0) @ v


@near_miss("dropped out twice")
def two_dropouts(q, k, v, bias, visible):
    return F.dropout(F.dropout(weights_of(q, k), 0.1), 0.1) @ v


@near_miss("leaves no weights")
def dropout_of_everything(q, k, v, bias, visible):
    return F.dropout(weights_of(q, k), 1.0) @ v


@near_miss("changed before they reach the values ('dropout2d')")
def dropout_of_heads(q, k, v, bias, visible):
    return F.dropout2d(weights_of(q, k), 0.1) @ v


@near_miss("changed before they reach the values ('detach')")
def detached_weights(q, k, v, bias, visible):
    return weights_of(q, k).detach() @ v


@near_miss("changed before they reach the values ('flip')")
def heads_reversed(q, k, v, bias, visible):
    return weights_of(q, k).flip(1) @ v


@near_miss("changed before they reach the values ('getitem')")
def heads_shuffled(q, k, v, bias, visible):
    return weights_of(q, k)[:, [1, 0, 3, 2]] @ v


@near_miss("changed before they reach the values ('getitem')")
def weights_shortened(q, k, v, bias, visible):
    return weights_of(q, k)[..., :5] @ v[:, :, :5]


@near_miss("not summed over the keys")
def summed_over_queries(q, k, v, bias, visible):
    return weights_of(q, k).mT @ v


@near_miss("not summed over the keys")
def summed_over_queries_by_einsum(q, k, v, bias, visible):
    return torch.einsum("bhqk,bhqd->bhkd", weights_of(q, k), v)


@near_miss("not summed over the keys")
def not_summed(q, k, v, bias, visible):
    return torch.einsum("bhqk,bhkd->bhqkd", weights_of(q, k), v)


@near_miss("not summed over the keys")
def summed_over_heads_too(q, k, v, bias, visible):
    return torch.einsum("bhqk,bhkd->bqd", weights_of(q, k), v)


@near_miss(None, all_equal)
def diagonal_of_values(q, k, v, bias, visible):
    return torch.einsum("bhqk,bhkk->bhq", weights_of(q, k), v)


@near_miss(None)
def values_summed_away(q, k, v, bias, visible):
    return torch.einsum("bhqk,bhkd->bhq", weights_of(q, k), v)


@near_miss("not summed over the keys", one_more(lambda: torch.randn(H, H)))
def heads_mixed_after_softmax(q, k, v, bias, visible, mix):
    return torch.einsum("bhqk,hg->bgqk", weights_of(q, k), mix) @ v


@near_miss("do not line up", square)
def values_per_query(q, k, v, bias, visible):
    return weights_of(q, k).transpose(1, 2) @ v


@near_miss("do not fit together", one_more(lambda: torch.randn(3, 1, H, S, D)))
def values_with_more_batches(q, k, v, bias, visible, many):
    return weights_of(q, k)[None] @ many


@near_miss("added to the attention output")
def output_added_to_a_residual(q, k, v, bias, visible):
    weights = weights_of(q, k).flatten(0, 1)
    return torch.baddbmm(q.flatten(0, 1), weights, v.flatten(0, 1))


@near_miss("added to the attention output")
def output_scaled_in_the_product(q, k, v, bias, visible):
    weights = weights_of(q, k).flatten(0, 1)
    return torch.baddbmm(q.flatten(0, 1), weights, v.flatten(0, 1), beta=0, alpha=2.0)


@near_miss("not multiplied by values", square)
def weights_squared_as_a_matrix(q, k, v, bias, visible):
    weights = weights_of(q, k)
    return weights @ weights


@near_miss("not in the dtype of the result")
def scores_in_a_wider_type_than_values(q, k, v, bias, visible):
    return weights_of(q, k).to(torch.bfloat16) @ v.to(torch.bfloat16)


@near_miss("not in the dtype of the result")
def scores_in_a_narrower_type_than_values(q, k, v, bias, visible):
    return weights_of(q.bfloat16(), k.bfloat16()).float() @ v


# ---------------------------------------------------------------------------------- in-place writers


@near_miss("changed in place")
def queries_changed_after_scores(q, k, v, bias, visible):
    q = q.clone()
    scores = scores_of(q, k)
    q.add_(1.0)
    return scores.softmax(-1) @ v, q


@near_miss("changed in place")
def keys_cleared_after_scores(q, k, v, bias, visible):
    weights = weights_of(q, k)
    k.zero_()
    return weights @ v


@near_miss("changed in place")
def keys_overwritten_through_a_slice(q, k, v, bias, visible):
    weights = weights_of(q, k)
    k[:, :, 3:5] = 0.0
    return weights @ v


@near_miss("changed in place")
def mask_changed_after_use(q, k, v, bias, visible):
    weights = (scores_of(q, k) + bias).softmax(-1)
    bias.fill_(0.0)
    return weights @ v


@near_miss("changed in place", other_heads(2, 2))
def keys_changed_after_their_copy(q, k, v, bias, visible):
    repeated = k.repeat_interleave(2, dim=1)
    k.mul_(0.5)
    return F.scaled_dot_product_attention(q, repeated, v.repeat_interleave(2, dim=1))


@near_miss("changed in place")
def keys_changed_by_an_out_argument(q, k, v, bias, visible):
    k = k.clone()
    weights = weights_of(q, k)
    torch.mul(k, 2.0, out=k)
    return weights @ v, k


@near_miss("used elsewhere", one_more(lambda: torch.zeros(B * H, S, S)))
def product_written_into_an_input(q, k, v, bias, visible, store):
    scores = store.baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0)
    return scores.softmax(-1) @ v.flatten(0, 1)


@near_miss("used elsewhere", one_more(lambda: torch.zeros(B, H, S, S)))
def product_with_an_out_argument(q, k, v, bias, visible, store):
    return torch.matmul(q, k.mT, out=store).softmax(-1) @ v


@near_miss("pass through 'setitem'")
def scores_assigned_in_a_slice(q, k, v, bias, visible):
    scores = scores_of(q, k)
    scores[..., 0] = 0.0
    return scores.softmax(-1) @ v


@near_miss("through a view")
def scores_cleared_through_a_view(q, k, v, bias, visible):
    scores = scores_of(q, k)
    part = scores[..., :4]
    part.zero_()
    return scores.softmax(-1) @ v


@near_miss("used elsewhere")
def scores_read_after_a_change_in_place(q, k, v, bias, visible):
    scores = q @ k.mT
    entries = scores.view(-1)
    scores.mul_(D**-0.5)
    return scores.softmax(-1) @ v, entries


@near_miss("pass through 'copy'")
def scores_overwritten(q, k, v, bias, visible):
    scores = scores_of(q, k)
    scores.copy_(q @ q.mT)
    return scores.softmax(-1) @ v


@near_miss("changed before they reach the values ('mul')")
def weights_changed_in_place(q, k, v, bias, visible):
    weights = weights_of(q, k)
    weights *= visible
    return weights @ v


# --------------------------------------------------------------------------------- modes and others


@near_miss("gradient mode or autocast changes")
def gradient_switched_off_for_scores(q, k, v, bias, visible):
    with torch.no_grad():
        scores = scores_of(q, k)
    return scores.softmax(-1) @ v


@near_miss("gradient mode or autocast changes")
def autocast_for_scores_alone(q, k, v, bias, visible):
    with torch.autocast("cpu", torch.bfloat16):
        scores = scores_of(q, k)
    return scores.softmax(-1).to(torch.bfloat16) @ v.to(torch.bfloat16)


@near_miss("leaves no weights")
def call_that_drops_everything(q, k, v, bias, visible):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)


@near_miss(None, one_more(lambda: torch.randn(D, 3)))
def classifier(q, k, v, bias, visible, matrix):
    return (q @ matrix).softmax(-1)


@near_miss(None, one_more(lambda: torch.randn(5, D)))
def memory_behind_a_linear_layer(q, k, v, bias, visible, memory):
    return F.linear(q, memory).softmax(-1) @ memory


@near_miss("do not line up", one_more(lambda: (torch.randn(D, 5), torch.randn(B, 5, S, D))))
def mixture_of_everything(q, k, v, bias, visible, experts):
    router, outputs = experts
    probabilities = (q[:, 0] @ router).softmax(-1)
    return torch.einsum("bse,besd->bsd", probabilities, outputs)


@near_miss(None)
def linear_attention(q, k, v, bias, visible):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)
