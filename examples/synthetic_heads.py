"""Attention heads made up to be hard in one known way each, where no trained model is at hand.

Random queries and keys attend to everything alike and say nothing about a sparse method. Each kind here plants one
structure that real heads show, at a strength near that of real heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_THETA = 500_000.0
_SINKS = 4


def _rotate(x: Tensor) -> Tensor:
    """Rotary embedding of x (S, D): pairs of channels (i, i + D / 2) turn by position * theta^(-2i / D)."""
    length, width = x.shape
    angles = torch.arange(length)[:, None] * _THETA ** (-2 * torch.arange(width // 2) / width)
    a, b = x.chunk(2, dim=1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class _Maker:
    """Draws from one generator; directions are unit vectors, logits are in nats after scaling."""

    def __init__(self, length: int, width: int, seed: int) -> None:
        self.length, self.width = length, width
        self.generator = torch.Generator().manual_seed(seed)
        self.gain = width**0.25  # |q| |k| / sqrt(D) = 1 for unit directions times this

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def noise(self, level: float) -> Tensor:
        return level * self.gain * self.normal(self.length, self.width) / math.sqrt(self.width)

    def spans(self, topics: int, shortest: int = 64, longest: int = 1024) -> Tensor:
        """int64 (S,), a topic for each position, constant over spans of random length."""
        at = torch.empty(self.length, dtype=torch.long)
        start = 0
        while start < self.length:
            size = int(torch.randint(shortest, longest, (), generator=self.generator))
            at[start : start + size] = int(torch.randint(topics, (), generator=self.generator))
            start += size
        return at

    def vertical(self) -> tuple[Tensor, Tensor]:
        """A few heavy keys that every query looks at, of log-normal strength."""
        direction = _unit(self.normal(self.width))
        heavy = torch.rand(self.length, generator=self.generator) < 0.015
        strength = torch.where(heavy, 4 + self.normal(self.length), 0.0)
        k = self.noise(0.7) + self.gain * strength[:, None] * direction
        return self.noise(0.7) + self.gain * 1.6 * direction, k

    def slash(self) -> tuple[Tensor, Tensor]:
        """Fixed distances: rotated constant vectors whose energy sits in fast channels."""
        fast = torch.zeros(self.width // 2)
        fast[: self.width // 6] = 1.0
        base = _unit(self.normal(self.width) * torch.cat([fast, fast])) * self.gain
        k = _rotate(base.expand(self.length, -1) * 3.0) + self.noise(0.7)
        shifted = torch.zeros(self.length, self.width)
        for distance in (0, 37, 777, 5003):
            moved = _rotate(base.expand(self.length + distance, -1))[: self.length]
            shifted[distance:] += moved[: max(self.length - distance, 0)]
        return 2.5 * shifted + self.noise(0.7), k

    def semantic(self) -> tuple[Tensor, Tensor]:
        """Spans of topics; a query looks at earlier spans of its own topic."""
        topics, at = _unit(self.normal(48, self.width)), self.spans(48)
        return self.gain * 2.4 * topics[at] + self.noise(0.7), self.gain * 2.2 * topics[at] + self.noise(0.7)

    def querymix(self) -> tuple[Tensor, Tensor]:
        """Every token has a topic of its own, so that the rows of a tile want different keys."""
        topics = _unit(self.normal(48, self.width))
        q_at, k_at = (torch.randint(48, (self.length,), generator=self.generator) for _ in range(2))
        return self.gain * 2.4 * topics[q_at] + self.noise(0.7), self.gain * 2.2 * topics[k_at] + self.noise(0.7)

    def needle(self) -> tuple[Tensor, Tensor]:
        """One row in 128 wants four keys far back that no other row wants."""
        q, k = self.noise(1.0), self.noise(1.0)
        for row in range(64, self.length, 128):
            wanted = torch.randint(row, (4,), generator=self.generator)
            direction = _unit(self.normal(self.width))
            q[row] += self.gain * 4 * direction
            k[wanted] += self.gain * 3 * direction
        return q, k

    def diffuse(self) -> tuple[Tensor, Tensor]:
        """Nearly uniform attention."""
        return self.noise(1.0), self.noise(1.0)

    def mix(self) -> tuple[Tensor, Tensor]:
        """Vertical and slash in one head."""
        (a, b), (c, d) = self.vertical(), self.slash()
        return 0.7 * (a + c), 0.7 * (b + d)


KINDS: dict[str, Callable[[_Maker], tuple[Tensor, Tensor]]] = {
    "vertical": _Maker.vertical,
    "slash": _Maker.slash,
    "semantic": _Maker.semantic,
    "querymix": _Maker.querymix,
    "needle": _Maker.needle,
    "diffuse": _Maker.diffuse,
    "mix": _Maker.mix,
}


def synthetic_head(kind: str, length: int, width: int = 128, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One head: q, k and v, each float32 (length, width), with four sink keys of small values.

    Args:
        kind: a key of `KINDS`.
        length: tokens.
        width: of a head, even.
        seed: of everything random.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    maker = _Maker(length, width, seed)
    q, k = KINDS[kind](maker)
    sink = _unit(maker.normal(width)) * maker.gain
    q, k[:_SINKS] = q + sink, 5.0 * sink
    topics = maker.normal(16, width)
    v = topics[maker.spans(16)] + maker.normal(length, width)
    v[:_SINKS] *= 0.1
    return q, k, v
