"""What the CPU kernels of routed experts are called with: weights per expert, and choices sorted by expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from s2o_inductor.moe_spec import ExpertSpec

# Bytes of the first product that one block holds: what fits a core's second-level cache.
BLOCK_BYTES = 2**20
# What each expert has of its own: a tensor whose first axis is the expert, or one tensor per expert.
PerExpert: TypeAlias = Tensor | Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Experts:
    """The weights of one call, each (out, in), and its formula.

    Attributes:
        w1: the first products of a row: one matrix per expert, or two with gate "separate".
    """

    spec: ExpertSpec
    w1: tuple[PerExpert, ...]
    w2: PerExpert
    b1: PerExpert | None
    b2: PerExpert | None

    @classmethod
    def of(
        cls, spec: ExpertSpec, w1: PerExpert, w2: PerExpert, w3: PerExpert | None, b1: PerExpert | None,
        b2: PerExpert | None,
    ) -> Experts:  # fmt: skip
        first: tuple[PerExpert, ...] = (w1,) if w3 is None else (w1, w3)
        if spec.transposed:
            first, w2 = tuple(map(flipped, first)), flipped(w2)
        return cls(spec, first, w2, b1, b2)

    @property
    def number(self) -> int:
        """How many experts there are."""
        return self.w2.shape[0] if isinstance(self.w2, Tensor) else len(self.w2)

    @property
    def columns(self) -> int:
        """Columns of the first product."""
        return sum([w.shape[1] if isinstance(w, Tensor) else w[0].shape[0] for w in self.w1])


def flipped(weights: PerExpert) -> PerExpert:
    """Each expert's matrix as its transpose, a view."""
    return weights.mT if isinstance(weights, Tensor) else [w.mT for w in weights]


@dataclasses.dataclass(frozen=True)
class Routing:
    """The choices of a call sorted by expert; choices of no expert come last.

    Attributes:
        order: (T * K), the choice t * K + k at each sorted position.
        place: (T * K), the sorted position of each choice.
        counts: choices of each expert.
    """

    choices: int
    order: Tensor
    place: Tensor
    counts: list[int]

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Routing:
        flat = ids.reshape(-1).to(torch.int64)
        flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
        # Stable, so that the rows of an expert come in the order of the tokens.
        order = torch.sort(flat.to(torch.int32), stable=True).indices
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
        return cls(ids.shape[1], order, place, counts)

    @property
    def routed(self) -> int:
        """How many choices are of an expert."""
        return sum(self.counts)

    def blocks(self, row_bytes: int) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        """Sorted positions of a block, and of each of its experts relative to the block.

        A row of the first product has `row_bytes`. An expert is never divided: its weight gradient is one product,
        rounded once.
        """
        most = BLOCK_BYTES // row_bytes
        start = size = 0
        inside: list[tuple[int, slice]] = []
        for expert, count in enumerate(self.counts):
            if inside and size + count > most:
                yield slice(start, start + size), inside
                start, size, inside = start + size, 0, []
            if count:
                inside.append((expert, slice(size, size + count)))
                size += count
        if inside:
            yield slice(start, start + size), inside


def part(vectors: PerExpert, start: int, end: int) -> PerExpert:
    """A range of each expert's vector, a view."""
    return vectors[:, start:end] if isinstance(vectors, Tensor) else [x[start:end] for x in vectors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
