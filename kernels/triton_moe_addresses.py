"""Weights of experts that are separate tensors, read and written where they lie: a table of their addresses.

The host knows the addresses, and hands them to a kernel as arguments, which stores them. So nothing waits for a copy
from the host, which no CUDA graph could capture either, and nothing is remembered between calls: parameters move.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import Config, launch
from s2o_inductor.kernels.moe_routing import PerExpert

# Addresses that one launch stores: 1 KiB of the 4 that arguments of a kernel may take.
_TOGETHER = 128
# Bytes at whose multiples matrices and their rows start where loads are as wide as can be.
_UNIT = 16


@triton.jit
def _addresses_kernel(addresses, table_ptr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table_ptr + i, tl.cast(addresses[i], tl.int64))


@triton.jit
def address_of(table, expert, KIND: tl.constexpr):
    """Where the matrix of an expert begins, of dtype KIND.

    The compiler learns nothing about the alignment of what a table holds: those who load or store there tell it.
    """
    return tl.load(table + expert).to(tl.pointer_type(KIND))


@dataclasses.dataclass(frozen=True)
class Addresses:
    """A matrix (m, n) per expert, each a tensor of its own; all have one shape and one stride.

    Attributes:
        table: int64 (E), on the device: where each begins, a multiple of 16 bytes.
        one: the matrix of the first expert.
    """

    table: Tensor
    one: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, m, n)."""
        return self.table.shape[0], *self.one.shape

    @property
    def mT(self) -> Addresses:
        """Each matrix as its transpose, a view."""
        return Addresses(self.table, self.one.mT)

    def stride(self) -> tuple[int, ...]:
        """As of one tensor (E, m, n), but that no number leads from expert to expert."""
        return 0, *self.one.stride()

    def is_contiguous(self) -> bool:
        """Whether each matrix is."""
        return self.one.is_contiguous()


Matrices: TypeAlias = Tensor | Addresses


def matrices(given: Sequence[PerExpert]) -> list[Matrices]:
    """Weights as kernels read them: no copy, but for lists whose tensors lie in no common way, which are stacked."""
    found: list[PerExpert] = [x if isinstance(x, Tensor) or _addressable(x) else torch.stack(list(x)) for x in given]
    lists = [x for x in found if not isinstance(x, Tensor)]
    tables = iter(_tables(lists)) if lists else iter(())
    return [x if isinstance(x, Tensor) else Addresses(next(tables), x[0]) for x in found]


def addresses_of(given: Sequence[Tensor]) -> Addresses:
    """Matrices of one shape and stride to be written, which start at multiples of 16 bytes, as new tensors do."""
    assert all(x.data_ptr() % _UNIT == 0 for x in given)
    return Addresses(_tables([given])[0], given[0])


def _addressable(given: Sequence[Tensor]) -> bool:
    """Whether kernels read a list of matrices as they lie, 16 bytes at a time."""
    one = given[0]
    wide = sorted(step * one.element_size() for step in one.stride())
    return (
        one.numel() > 0 and wide[0] == one.element_size() and wide[1] % _UNIT == 0
        and all(x.stride() == one.stride() and x.data_ptr() % _UNIT == 0 for x in given)
    )  # fmt: skip


def _tables(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The addresses of each list, int64 (E), made by as few launches as can be."""
    experts, device = len(lists[0]), lists[0][0].device
    # Rows of an even length start at multiples of 16 bytes.
    padding = experts % 2
    flat = [x.data_ptr() for given in lists for x in itertools.chain(given, given[:padding])]
    table = torch.empty(len(flat), dtype=torch.int64, device=device)
    for start in range(0, len(flat), _TOGETHER):
        part = tuple(flat[start : start + _TOGETHER])
        arguments: dict[str, Any] = {"addresses": part, "table_ptr": table[start:], "COUNT": len(part)}
        launch(_addresses_kernel, [Config(1, 1, 1, 1)], lambda _: 1, lambda _: arguments)  # noqa: B023 - called at once
    return [row[:experts] for row in table.view(len(lists), experts + padding)]
