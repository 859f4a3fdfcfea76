"""Mask terms in many spellings, as functions on tensors: what models write, and strategies that mix them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

NEG_INF = float("-inf")


@dataclasses.dataclass
class Inputs:
    """What a mask may read. Sizes are taken from the tensors, so that they are symbolic where those are."""

    query_ids: Tensor  # int64 (B, Sq): document of a query
    key_ids: Tensor  # int64 (B, Sk)
    keep: Tensor  # bool (B, Sk): padding mask
    keep_int: Tensor  # int64 (B, Sk): the same as 0/1
    valid: Tensor  # bool (B, Sq)
    length: Tensor  # int64 (B,)

    @property
    def batch(self) -> Any:
        return self.query_ids.shape[0]

    @property
    def queries(self) -> Any:
        return self.query_ids.shape[1]

    @property
    def keys(self) -> Any:
        return self.key_ids.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    # Positions, as columns of queries and rows of keys.
    def q(self, style: int) -> Tensor:
        return _positions(self.queries, style)[:, None]

    def k(self, style: int) -> Tensor:
        return _positions(self.keys, style)[None]


def make_inputs(batch: int, queries: int, keys: int, seed: int) -> Inputs:
    """Random documents, padding and lengths."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    keep = random(4, batch, keys) > 0
    return Inputs(
        query_ids=random(3, batch, queries).cumsum(-1) // 2,
        key_ids=random(3, batch, keys).cumsum(-1) // 2,
        keep=keep,
        keep_int=keep.long(),
        valid=random(4, batch, queries) > 0,
        length=random(keys + 1, batch),
    )


POSITION_STYLES = 5


def _positions(size: Any, style: int) -> Tensor:
    match style:
        case 0:
            return torch.arange(size)
        case 1:
            return torch.arange(1, size + 1) - 1
        case 2:
            return torch.ones(size, dtype=torch.long).cumsum(0) - 1
        case 3:
            return torch.arange(0, 2 * size, 2) // 2
        case _:
            return torch.arange(size, dtype=torch.int32).flip(0).neg() + (size - 1)


Build = Callable[[Inputs, int], Tensor]  # (inputs, style of positions) -> bool, broadcastable to (B, 1, Sq, Sk)


@dataclasses.dataclass(frozen=True)
class Term:
    """One condition of a mask in several spellings that mean the same."""

    name: str
    spellings: tuple[Build, ...]


def causal(offset: int) -> Term:
    """k - q <= offset."""

    def in_place(x: Inputs, p: int) -> Tensor:
        mask = torch.full((x.queries, x.keys), NEG_INF)
        mask.triu_(offset + 1)
        return mask == 0

    def batched(x: Inputs, p: int) -> Tensor:
        rows = torch.vmap(torch.vmap(lambda q, k: k <= q + offset, (None, 0)), (0, None))
        return rows(x.q(p)[:, 0], x.k(p)[0])

    return Term(
        f"causal({offset})",
        (
            lambda x, p: x.k(p) <= x.q(p) + offset,
            lambda x, p: ~(x.k(p) > x.q(p) + offset),
            lambda x, p: (x.q(p) + offset - x.k(p)) >= 0,
            lambda x, p: torch.ones(x.queries, x.keys, dtype=torch.bool).tril(offset),
            lambda x, p: torch.triu(torch.ones(x.queries, x.keys), offset + 1) == 0,
            lambda x, p: torch.logical_not(torch.gt(x.k(p) - x.q(p), offset)),
            lambda x, p: (1 - (x.k(p) > x.q(p) + offset).int()).bool(),
            lambda x, p: torch.where(x.k(p) - offset <= x.q(p), 1, 0).to(torch.bool),
            lambda x, p: (x.k(p).T - offset <= x.q(p).T).transpose(0, 1),
            lambda x, p: torch.maximum(x.k(p) - x.q(p), torch.tensor(offset)) <= offset,
            in_place,
            batched,
        ),
    )


def window(width: int) -> Term:
    """k - q > -width."""
    return Term(
        f"window({width})",
        (
            lambda x, p: x.k(p) > x.q(p) - width,
            lambda x, p: x.q(p) - x.k(p) < width,
            lambda x, p: torch.ones(x.queries, x.keys).triu(1 - width).bool(),
            lambda x, p: torch.tril(torch.ones(x.queries, x.keys, dtype=torch.bool), -width).logical_not(),
            lambda x, p: ~((x.q(p) - x.k(p)).clamp(min=0) >= width),
        ),
    )


def local(width: int) -> Term:
    """|k - q| <= width."""
    return Term(
        f"local({width})",
        (
            lambda x, p: (x.q(p) - x.k(p)).abs() <= width,
            lambda x, p: (x.k(p) >= x.q(p) - width) & (x.k(p) <= x.q(p) + width),
            lambda x, p: torch.ones(x.queries, x.keys, dtype=torch.bool).triu(-width).tril(width),
            lambda x, p: torch.abs(torch.sub(x.k(p), x.q(p))).lt(width + 1),
            lambda x, p: torch.max(x.q(p) - x.k(p), x.k(p) - x.q(p)) <= width,
        ),
    )


def chunk(size: int) -> Term:
    """q // size == k // size."""
    return Term(
        f"chunk({size})",
        (
            lambda x, p: x.q(p) // size == x.k(p) // size,
            lambda x, p: torch.div(x.q(p), size, rounding_mode="floor") == x.k(p).div(size, rounding_mode="trunc"),
            lambda x, p: (x.q(p) - x.q(p) % size) == (x.k(p) - x.k(p) % size),
            lambda x, p: (x.q(p) // size - x.k(p) // size).abs() < 1,
        ),
    )


def strided(period: int) -> Term:
    """(q - k) % period == 0."""
    return Term(
        f"strided({period})",
        (
            lambda x, p: (x.q(p) - x.k(p)) % period == 0,
            lambda x, p: x.q(p) % period == x.k(p) % period,
            lambda x, p: torch.remainder(x.k(p) - x.q(p), period).logical_not(),
        ),
    )


def prefix(size: int) -> Term:
    """k < size or k <= q."""

    def written(x: Inputs, p: int) -> Tensor:
        mask = torch.ones(x.queries, x.keys, dtype=torch.bool).tril()
        mask[:, :size] = True
        return mask

    return Term(
        f"prefix({size})",
        (
            lambda x, p: (x.k(p) < size) | (x.k(p) <= x.q(p)),
            lambda x, p: ~((x.k(p) >= size) & (x.k(p) > x.q(p))),
            lambda x, p: torch.where(x.k(p) < size, True, x.k(p) <= x.q(p)),
            lambda x, p: (x.k(p) <= x.q(p)).masked_fill(x.k(p) < size, True),
            written,
        ),
    )


def sinks(size: int, width: int) -> Term:
    """k < size or k > q - width."""
    return Term(
        f"sinks({size}, {width})",
        (
            lambda x, p: (x.k(p) > x.q(p) - width) | (x.k(p) < size),
            lambda x, p: torch.logical_or(x.k(p) < size, x.q(p) - x.k(p) < width),
            lambda x, p: ~((x.q(p) - x.k(p) >= width) & (x.k(p) >= size)),
        ),
    )


def _batch(x: Inputs) -> Tensor:
    return torch.arange(x.batch)[:, None, None, None]


PADDING = Term(
    "padding",
    (
        lambda x, p: x.keep[:, None, None, :],
        lambda x, p: x.keep_int[:, None, None].bool(),
        lambda x, p: (x.keep_int != 0)[:, None, None],
        lambda x, p: x.keep_int.view(x.batch, 1, 1, x.keys) > 0,
        lambda x, p: x.keep[_batch(x), x.k(p)[None, None]],
        lambda x, p: ~(1 - x.keep_int).to(torch.bool).unsqueeze(1).unsqueeze(2),
        lambda x, p: x.keep_int.float()[:, None, None, :] > 0.5,
        lambda x, p: x.keep[:, None, :].expand(-1, x.queries, -1)[:, None],
        lambda x, p: torch.cat([x.keep, x.keep], dim=1)[:, None, None, : x.keys],
        lambda x, p: torch.nn.functional.pad(x.keep_int, (0, 2))[:, None, None, :-2].bool(),
        lambda x, p: torch.stack([x.keep, ~x.keep])[0].repeat(1, 2)[:, None, None, : x.keys],
    ),
)
DOCUMENTS = Term(
    "documents",
    (
        lambda x, p: x.query_ids[:, None, :, None] == x.key_ids[:, None, None, :],
        lambda x, p: (x.query_ids.unsqueeze(-1) - x.key_ids.unsqueeze(-2) == 0).unsqueeze(1),
        lambda x, p: x.query_ids[_batch(x), x.q(p)[None, None]] == x.key_ids[_batch(x), x.k(p)[None, None]],
        lambda x, p: ~(x.query_ids[:, None, :, None] != x.key_ids[:, None, None, :]),
        lambda x, p: torch.eq(x.key_ids[:, :, None], x.query_ids[:, None, :]).mT[:, None],
    ),
)
POSITIONS = Term(
    "positions",
    (
        lambda x, p: x.key_ids[:, None, None, :] <= x.query_ids[:, None, :, None],
        lambda x, p: (x.query_ids[:, :, None] - x.key_ids[:, None, :]).ge(0)[:, None],
        lambda x, p: ~(x.key_ids[_batch(x), x.k(p)[None, None]] > x.query_ids[_batch(x), x.q(p)[None, None]]),
    ),
)
ROWS = Term(
    "rows",
    (
        lambda x, p: x.valid[:, None, :, None],
        lambda x, p: x.valid.view(x.batch, 1, x.queries, 1).expand(-1, -1, -1, x.keys),
        lambda x, p: x.valid[:, None, None, :].transpose(2, 3).clone(),
    ),
)
LENGTHS = Term(
    "lengths",
    (
        lambda x, p: x.k(p)[None, None] < x.length[:, None, None, None],
        lambda x, p: (x.k(p)[0] < x.length[:, None])[:, None, None, :],
        lambda x, p: x.k(p) - x.length.view(-1, 1, 1, 1) <= -1,
    ),
)
TERMS: dict[str, Callable[..., Term]] = {
    "causal": causal,
    "window": window,
    "local": local,
    "chunk": chunk,
    "strided": strided,
    "prefix": prefix,
    "sinks": sinks,
}
STANDARD = (
    causal(0), causal(2), causal(-1), window(3), local(2), chunk(4), strided(3), prefix(3), sinks(2, 4),
    PADDING, DOCUMENTS, POSITIONS, ROWS, LENGTHS,
)  # fmt: skip


def _full(x: Inputs, mask: Tensor) -> Tensor:
    return mask.expand(x.batch, 1, x.queries, x.keys)


# Two conditions at once, or one of two, or a choice between two.
CONJUNCTIONS: tuple[Callable[[Inputs, Tensor, Tensor], Tensor], ...] = (
    lambda x, a, b: a & b,
    lambda x, a, b: torch.logical_and(b, a),
    lambda x, a, b: a * b,
    lambda x, a, b: torch.where(a, b, False),
    lambda x, a, b: _full(x, a).masked_fill(~b, False),
    lambda x, a, b: ~(~a | ~b),
    lambda x, a, b: (a.int() + b.int()) == 2,
    lambda x, a, b: torch.stack([_full(x, a), _full(x, b)]).all(0),
)
OTHER_CONNECTIVES: tuple[Callable[[Inputs, Tensor, Tensor], Tensor], ...] = (
    lambda x, a, b: a | b,
    lambda x, a, b: a ^ b,
    lambda x, a, b: a == b,
    lambda x, a, b: a & ~b,
    lambda x, a, b: a | ~b,
    lambda x, a, b: torch.where(x.k(0) < 3, a, b),
    lambda x, a, b: torch.cat([_full(x, a)[:, :, :2], _full(x, b)[:, :, 2:]], dim=2),
    lambda x, a, b: _full(x, a).slice_scatter(_full(x, b)[..., 1:3], 3, 1, 3),
    lambda x, a, b: (a.int() + b.int()).clamp(max=1).bool(),
)
# (kind, how the boolean "visible" becomes the mask)
FINAL: tuple[tuple[str, Callable[[Inputs, Tensor], Tensor]], ...] = (
    ("visible", lambda x, m: m),
    ("visible", lambda x, m: _full(x, m).contiguous()),
    ("hidden", lambda x, m: ~m),
    ("hidden", lambda x, m: _full(x, m).logical_not()),
    ("additive", lambda x, m: torch.where(m, 0.0, NEG_INF)),
    ("additive", lambda x, m: torch.zeros(x.queries, x.keys).masked_fill(~_full(x, m), NEG_INF)),
    ("additive", lambda x, m: torch.where(m, torch.tensor(0.0), torch.finfo(torch.float32).min)),
    ("additive", lambda x, m: (1.0 - m.float()) * torch.finfo(torch.float32).min),
    ("additive", lambda x, m: (~m).to(torch.bfloat16) * torch.finfo(torch.bfloat16).min),
)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A whole mask function with everything that was drawn for it."""

    terms: tuple[tuple[Term, int, int], ...]  # term, spelling, style of positions
    joins: tuple[Callable[[Inputs, Tensor, Tensor], Tensor], ...]
    final: int

    @property
    def kind(self) -> str:
        return FINAL[self.final][0]

    def __call__(self, *tensors: Tensor) -> Tensor:
        x = Inputs(*tensors)
        masks = [term.spellings[at](x, style) for term, at, style in self.terms]
        joined = functools.reduce(lambda a, pair: pair[0](x, a, pair[1]), zip(self.joins, masks[1:]), masks[0])  # noqa: B905
        return FINAL[self.final][1](x, joined)

    def __repr__(self) -> str:
        return f"Spelling({[(term.name, *rest) for term, *rest in self.terms]}, final={self.final})"


def terms() -> st.SearchStrategy[Term]:
    """One term with random widths."""
    small = st.integers(1, 6)
    return st.one_of(
        st.integers(-3, 5).map(causal),
        small.map(window),
        st.integers(0, 5).map(local),
        small.map(chunk),
        st.integers(2, 4).map(strided),
        small.map(prefix),
        st.builds(sinks, st.integers(1, 4), small),
        st.sampled_from([PADDING, DOCUMENTS, POSITIONS, ROWS, LENGTHS]),
    )


@st.composite
def spellings(draw: st.DrawFn, any_connective: bool = False) -> Spelling:
    """One to three terms, joined by "and", or by any connective, in random spellings."""
    chosen = draw(st.lists(terms(), min_size=2 if any_connective else 1, max_size=3))
    joins = CONJUNCTIONS + (OTHER_CONNECTIVES if any_connective else ())
    return Spelling(
        terms=tuple(
            (term, draw(st.integers(0, len(term.spellings) - 1)), draw(st.integers(0, POSITION_STYLES - 1)))
            for term in chosen
        ),
        joins=tuple(draw(st.sampled_from(joins)) for _ in chosen[1:]),
        final=draw(st.integers(0, len(FINAL) - 1)),
    )


def sizes() -> st.SearchStrategy[tuple[int, int, int]]:
    """(B, Sq, Sk), also with one query, one key or more queries than keys."""
    return st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
