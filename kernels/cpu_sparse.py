"""S2O sparse attention on CPU: `s2o_inductor.kernels.reference_sparse` with rule "tail" and shared orders, fast.

The work is done by cpu_sparse.cpp, compiled at the first call (see `s2o_inductor.kernels.native`), or where that
cannot be had by torch code, `s2o_inductor.kernels.cpu_sparse_torch`, which float64 always takes. Both compute in
float32 (float64) and agree but for rounding, which may send a token to the neighbouring bundle.

They differ from the reference where values are not finite: what a row may not see, NaN or infinity included, never
reaches it, not even as a weight of 0 times NaN.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s2o_inductor.kernels import cpu_sparse_torch, native
from s2o_inductor.kernels.dense import empty_heads_last, heads_last, lse_dtype
from s2o_inductor.kernels.documents import Documents, check_documents
from s2o_inductor.kernels.reference_sparse import Sparse, tiles_of
from s2o_inductor.sparse_policy import Geometry

# Reading all of a prefix in place takes about as long as ranking it and gathering this share of it: 0.75 to 0.95 for
# one to four heads and 8,192 to 32,768 keys.
FULL = 0.85
_CHUNK = 64  # kKeys of cpu_vectors.h


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    budgets: Sequence[float],
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    documents: tuple[Tensor, Tensor] | None = None,
    max_density: float,
    geometry: Geometry,
    full: float = FULL,
) -> Sparse:
    """S2O sparse attention.

    Args:
        q: (B, Hq, Sq, D), float32, float64, bfloat16 or float16, any strides.
        k: (B, Hkv, Sk, D), Sq <= Sk; query head h reads key/value head h // (Hq / Hkv).
        v: (B, Hkv, Sk, Dv).
        scale: of the scores.
        budgets: thresholds of the stop rule, one for all query heads or one for each; 0 reads everything.
        causal: query i of Sq sees keys up to i + Sk - Sq.
        window: with `causal`, it sees the last `window` of these alone.
        keys: bool (B, Sk), keys that may be seen at all; None is all of them.
        documents: with `causal`, both int32 or int64, (B, Sq) and (B, Sk), the documents of queries and keys: a query
            sees keys of an equal number alone. None is one document.
        max_density: largest share of a prefix that a tile reads, rounded up to a bundle.
        geometry: sizes.
        full: a tile that is expected to read more than this share of its prefix reads all of it, which costs less than
            to rank it; 1 never does (`s2o_inductor.kernels.stop_rule.expected_share`).

    Returns:
        `Sparse`: output in the dtype of q, stored as (B, Sq, Hq, Dv); lse and tail in float32, float64 for float64.

    Raises:
        ValueError: sizes, budgets, shares, window or documents are out of range.
        MemoryError: there is no memory for the scores of one tile per thread.
    """
    _check(q, k, v, budgets, causal, window, keys, documents, max_density, full)
    budgets = tuple(budgets) * (q.shape[1] if len(budgets) == 1 else 1)
    wide = lse_dtype(q.dtype)
    # Converted once: a key is read by many tiles.
    wide_q, wide_k, wide_v = (x.to(wide) for x in (q, k, v))
    if keys is not None:
        wide_k, wide_v = (x.masked_fill(~keys[:, None, :, None], 0.0) for x in (wide_k, wide_v))
    if not any(budgets) and max_density == 1.0:  # nothing is skipped, so nothing need stand in for it
        geometry = dataclasses.replace(geometry, clusters=0)
    library = None if wide == torch.float64 or 0 in q.shape[:3] else native.library("cpu_sparse")
    run = cpu_sparse_torch.run if library is None else _Native(library)
    batch, heads, queries, _ = q.shape
    tiles = len(tiles_of(queries, k.shape[2], geometry.tile))
    output = empty_heads_last((batch, heads, queries, v.shape[3]), wide_q)
    lse = torch.empty(batch, heads, queries, dtype=wide)
    tail = torch.empty(batch, heads, tiles, dtype=wide)
    bundles, pairs, visible = (torch.empty(batch, heads, tiles, dtype=torch.int64) for _ in range(3))
    result = Sparse(output, lse, bundles, tail, pairs, visible)
    packed = None if documents is None or tiles == 0 else Documents.of(*documents, geometry)
    run(result, wide_q, wide_k, wide_v, scale, budgets, causal, window, keys, packed, max_density, full, geometry)
    return dataclasses.replace(
        result, output=heads_last(output.to(q.dtype)), pairs=pairs.sum(dim=2), visible=visible.sum(dim=2)
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, budgets: Sequence[float], causal: bool, window: int | None,
    keys: Tensor | None, documents: tuple[Tensor, Tensor] | None, max_density: float, full: float,
) -> None:  # fmt: skip
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q (B, Hq, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv) must agree; got {shapes}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the query heads must be a multiple of the key/value heads; got {heads} and {kv_heads}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"sparse attention needs at least as many keys as queries; got {k.shape[2]} keys and {q.shape[2]} queries"
        )
    if len(budgets) not in (1, heads):
        raise ValueError(f"there must be one budget, or one for each of {heads} query heads; got {len(budgets)}")
    if not all(budget >= 0 for budget in budgets) or not 0 < max_density <= 1:
        raise ValueError(
            f"budgets must be at least 0 and max_density in (0, 1]; got {tuple(budgets)} and {max_density}"
        )
    if not 0 <= full <= 1:
        raise ValueError(f"full is a share of the prefix, 0 to 1; got {full}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window goes with causal attention and is at least 1; got {window}, causal={causal}")
    if keys is not None and (keys.dtype != torch.bool or keys.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"keys must be bool (B, Sk) = {(k.shape[0], k.shape[2])}; got {keys.dtype} {tuple(keys.shape)}"
        )
    if documents is not None:
        check_documents(documents, q, k, causal)


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Problem(ctypes.Structure):
    """`Problem` of cpu_sparse.cpp, field by field."""

    _fields_ = [
        *_fields(
            "q k v tail_k tail_spread tail_v columns size member keys query_documents key_documents tile_documents "
            "budgets output lse tail bundles pairs visible",
            ctypes.c_void_p,
        ),
        *_fields("q_strides k_strides v_strides", ctypes.c_int64 * 3),
        *_fields("batch heads kv_heads queries length width value_width causal window", ctypes.c_int64),
        *_fields("tile sink bundle horizon sub_means run block rounds clusters threads", ctypes.c_int64),
        *_fields("scale max_density limit full", ctypes.c_double),
    ]


class _Native:
    """Runs the compiled kernel; `cpu_sparse_torch.run` with the same arguments does the same in torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(
        self, result: Sparse, q: Tensor, k: Tensor, v: Tensor, scale: float, budgets: Sequence[float], causal: bool,
        window: int | None, keys: Tensor | None, documents: Documents | None, max_density: float, full: float,
        geometry: Geometry,
    ) -> None:  # fmt: skip
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        exact = not any(budgets) and max_density == 1.0  # then nothing is ranked
        heads, padded = k.shape[:2], -(-k.shape[2] // _CHUNK) * _CHUNK
        groups = (*heads, k.shape[2] // geometry.block * geometry.clusters)
        tensors = {
            "q": q,
            "k": k,
            "v": v,
            "tail_k": q.new_empty(*groups, q.shape[3]),
            "tail_spread": q.new_empty(*groups, q.shape[3]),
            "tail_v": q.new_empty(*groups, v.shape[3]),
            "columns": None if exact else q.new_empty(*heads, padded, q.shape[3]),
            "size": q.new_empty(*groups, dtype=torch.int32),
            "member": q.new_empty(*heads, padded, dtype=torch.int32),
            "keys": None if keys is None else keys.contiguous(),
            "query_documents": None if documents is None else documents.queries,
            "key_documents": None if documents is None else documents.keys,
            "tile_documents": None if documents is None else documents.tiles,
            "budgets": torch.tensor(budgets, dtype=torch.float32),
            **{field.name: getattr(result, field.name) for field in dataclasses.fields(result)},
        }
        problem = _Problem(
            **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
            **{f"{name}_strides": (ctypes.c_int64 * 3)(*x.stride()[:3]) for name, x in (("q", q), ("k", k), ("v", v))},
            batch=q.shape[0],
            heads=q.shape[1],
            kv_heads=k.shape[1],
            queries=q.shape[2],
            length=k.shape[2],
            width=q.shape[3],
            value_width=v.shape[3],
            causal=causal,
            window=window or 0,
            **{
                name: getattr(geometry, name)
                for name in ("tile", "sink", "bundle", "horizon", "sub_means", "run", "block", "rounds", "clusters")
            },
            threads=torch.get_num_threads(),
            scale=scale,
            max_density=max_density,
            limit=geometry.limit * math.log2(math.e),
            full=full,
        )
        if self.library.s2o_cpu_sparse(ctypes.byref(problem)):
            raise MemoryError(f"no memory for sparse attention over {k.shape[2]} keys on {problem.threads} threads")
