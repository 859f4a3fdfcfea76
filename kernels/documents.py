"""Documents packed into one sequence, as the kernels of sparse attention read them: `reference_sparse` says what for.

Nothing here reads a value on the host: a kernel finds in tensors which tiles of queries lie in one document.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from s2o_inductor.sparse_policy import Geometry


@dataclasses.dataclass(frozen=True)
class Documents:
    """The first key of the document of each query and key: a query sees keys of an equal number alone.

    Attributes:
        queries: int32 (B, Sq), Sk where no key is of the query's document.
        keys: int32 (B, Sk).
        tiles: int32 (B, tiles, 2) for the tiles of causal attention: the first key that some row may see, Sk or more
            where no row sees any, and the least key that it may rank; at least the end of its prefix where it ranks
            none.
    """

    queries: Tensor
    keys: Tensor
    tiles: Tensor

    @staticmethod
    def of(queries: Tensor, keys: Tensor, geometry: Geometry) -> Documents:
        """From the ids of documents, in any order, in O(Sk log Sk).

        Args:
            queries: int32 or int64 (B, Sq), 1 <= Sq <= Sk, the ids of the queries at the last positions.
            keys: of the same type (B, Sk).
            geometry: sizes of the tiles.
        """
        values, at = keys.sort(dim=1, stable=True)  # stable: of equal ids the first key comes first
        length = keys.shape[1]

        def first(ids: Tensor) -> Tensor:
            place = torch.searchsorted(values, ids.contiguous()).clamp(max=length - 1)
            found = values.gather(1, place) == ids
            return at.gather(1, place).masked_fill(~found, length).to(torch.int32)

        of_queries, of_keys = first(queries), first(keys)
        return Documents(of_queries, of_keys, _tiles(of_queries, of_keys, geometry))


def _tiles(queries: Tensor, keys: Tensor, geometry: Geometry) -> Tensor:
    """`Documents.tiles`."""
    length, unit, size = keys.shape[1], geometry.block, geometry.tile
    before = length - queries.shape[1]
    number = torch.arange(before // size, -(-length // size), device=keys.device)
    least, most = (
        torch.nn.functional.pad(queries, (before % size, -length % size), value=value).unflatten(1, (-1, size))
        for value in (length, -1)
    )
    least, most = least.amin(dim=2), most.amax(dim=2)
    high = number * size // unit * unit
    last = (high - 1).clamp(min=0).expand(keys.shape[0], -1)
    # Where the run of keys of one document that reaches to each key begins: not its first key, if the id came before.
    at = torch.arange(length, device=keys.device)
    changes = keys != keys.roll(1, dims=1)
    begin = torch.where(changes, at, 0).cummax(dim=1).values.gather(1, last)
    one = (least == most) & (keys.gather(1, last) == least)
    low = (begin + geometry.sink + unit - 1) // unit * unit
    return torch.stack([least, torch.where(one, low, high)], dim=2).to(torch.int32)


def check_documents(documents: tuple[Tensor, Tensor], q: Tensor, k: Tensor, causal: bool) -> None:
    """Raises ValueError unless ids of documents go with q (B, Hq, Sq, D) and k (B, Hkv, Sk, D)."""
    shapes = [(q.shape[0], x.shape[2]) for x in (q, k)]
    kinds = {x.dtype for x in documents}
    if [tuple(x.shape) for x in documents] != shapes or kinds not in ({torch.int32}, {torch.int64}):
        given = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in documents)
        raise ValueError(f"documents must both be int32 or int64, {shapes[0]} and {shapes[1]}; got {given}")
    if not causal:
        raise ValueError("documents go with causal attention; got causal=False: use exact attention")
