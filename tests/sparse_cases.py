"""What the sparse CUDA kernels must compute once they have chosen: a replay of their choice in plain torch."""

from __future__ import annotations

import dataclasses
import fractions
import math
import random
from typing import TYPE_CHECKING, Any

import torch
from sparse_rounding import rounding_of_scores
from torch import Tensor

from s2o_inductor.kernels import reference_sparse
from s2o_inductor.kernels.reference_sparse import Sparse
from s2o_inductor.kernels.tail_groups import Groups, groups_within
from s2o_inductor.sparse_policy import Geometry
from s2o_inductor.testing import LAYOUTS, assert_close_to_gold, attention_inputs, in_memory

if TYPE_CHECKING:
    from s2o_inductor.kernels.triton_sparse_groups import GroupTable
    from s2o_inductor.kernels.triton_sparse_order import Ranking
    from s2o_inductor.kernels.triton_sparse_tiles import Tiling

# Bins of the order hold scores that differ by an eighth.
BIN = 1.126
KINDS = 25
SMALL = Geometry(bundle=64, horizon=2, sink=64, block=64, rounds=2)


@dataclasses.dataclass
class SparseProblem:
    """A call of `cuda_sparse.forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    budgets: tuple[float, ...] = (0.1,)
    scale: float | None = None
    causal: bool = True
    window: int | None = None
    keys: Tensor | None = None
    documents: tuple[Tensor, Tensor] | None = None
    max_density: float = 1.0
    geometry: Geometry = SMALL
    _table: GroupTable | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("budgets", "scale", "causal", "window", "keys", "documents", "geometry")
        }  # fmt: skip

    def run(self, **options: Any) -> Sparse:
        from s2o_inductor.kernels import cuda_sparse

        return cuda_sparse.forward(
            self.q, self.k, self.v, max_density=self.max_density, **{**self.options, **options}
        )  # fmt: skip

    def group_table(self) -> GroupTable:
        """The groups of all keys, as `forward` makes them."""
        from s2o_inductor.kernels.operands import aligned
        from s2o_inductor.kernels.triton_sparse_groups import group_keys
        from s2o_inductor.kernels.triton_sparse_tiles import Padding

        return group_keys(aligned(self.k), aligned(self.v), Padding.of(self.keys, self.geometry.run), self.geometry)

    def ranking(self) -> Ranking:
        """Representatives and masses of all tiles, as `forward` makes them."""
        from s2o_inductor.kernels import triton_sparse_order
        from s2o_inductor.kernels.documents import Documents
        from s2o_inductor.kernels.operands import aligned, positive_scale
        from s2o_inductor.kernels.triton_sparse_tiles import Padding

        q, scale, _ = positive_scale(self.q, self.factor)
        packed = None if self.documents is None else Documents.of(*self.documents, self.geometry)
        padding = Padding.of(self.keys, self.geometry.run, packed)
        return triton_sparse_order.rank(
            aligned(q), aligned(self.k), scale, self._tiling(), padding, self.group_table()
        )  # fmt: skip

    def order(self, ranking: Ranking | None = None) -> tuple[Tensor, Tensor]:
        """Page table and counts of all tiles, as `forward` makes them; `ranking` if it is there already."""
        from s2o_inductor.kernels import triton_sparse_order
        from s2o_inductor.kernels.operands import aligned

        density, tiling = fractions.Fraction(self.max_density).limit_denominator(1 << 20), self._tiling()
        order = triton_sparse_order.order(ranking or self.ranking(), aligned(self.k), tiling, density, 0, tiling.count)
        return order.table.cpu(), order.listed.cpu()

    def _tiling(self) -> Tiling:
        from s2o_inductor.kernels.triton_sparse_tiles import Tiling

        return Tiling(self.q.shape[2], self.k.shape[2], self.causal, self.window, self.geometry)

    def representatives(self, ranking: Ranking) -> Tensor:
        """The kernels' mean queries, float32 (B, Hkv, tiles, heads, sub_means, D); heads beyond a group are zero."""
        from s2o_inductor.kernels.operands import positive_scale

        _, scale, sign = positive_scale(self.q, self.factor)
        means = ranking.means.cpu().float() * (sign / (scale * math.log2(math.e)))
        return means.unflatten(2, (-1, self.geometry.sub_means)).unflatten(0, self.k.shape[:2])

    @property
    def factor(self) -> float:
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    @property
    def condition(self) -> float:
        """Types that accumulate in themselves: on a GPU, where a thread adds up keys and channels one after another,
        errors of sums over them grow like the root of their number."""
        if self.q.dtype != torch.float32 or not self.q.is_cuda:
            return 1.0
        return math.sqrt(self.q.shape[3] + self.k.shape[2])

    def tiles(self, b: int) -> list[tuple[int, int, int, int]]:
        """(start, end, low, high) of each tile of a batch entry, from the reference."""
        length, fixed = self.k.shape[2], (self.causal, self.window, self.geometry)
        return [
            (start, end, *reference_sparse._prefix(start, end, length, *fixed, self._packed(b, start, end)))
            for start, end in reference_sparse.tiles_of(self.q.shape[2], length, self.geometry.tile)
        ]

    def _packed(self, b: int, start: int, end: int) -> tuple[Tensor, Tensor] | None:
        """The documents of the queries of a tile and of all keys."""
        if self.documents is None:
            return None
        before = self.k.shape[2] - self.q.shape[2]
        return self.documents[0][b, start - before : end - before].cpu(), self.documents[1][b].cpu()

    def check(self, **options: Any) -> Sparse:
        """Asserts that result, statistics and stops are right for the order that was chosen, and the order itself."""
        result = self.run(**options)
        ranking = self.ranking()
        table, listed = self.order(ranking)
        self.check_order(table, listed, ranking)
        return self.check_replay(result, table, listed)

    def check_order(self, table: Tensor, listed: Tensor, ranking: Ranking) -> None:
        """Each run once, none that is hidden, as many as the density allows, and by falling score up to a bin.

        Scores are those of the kernels' representatives: a query between two means may join either, but they must
        stand for the queries as well as the reference's do.
        """
        group, run = self.q.shape[1] // self.k.shape[1], self.geometry.run
        q, k = self.q.cpu().float(), self.k.cpu().float()
        representatives = self.representatives(ranking)
        for b in range(k.shape[0]):
            for head in range(k.shape[1]):
                groups = self._groups(b, head, torch.float32)
                for t, (start, end, low, high) in enumerate(self.tiles(b)):
                    hidden = ~self._allowed(b)[low:high]
                    rows = slice(start - k.shape[2] + q.shape[2], end - k.shape[2] + q.shape[2])
                    queries = q[b, head * group : (head + 1) * group, rows]
                    means = representatives[b, head, t, :group, : queries.shape[1]]
                    assert not representatives[b, head, t, group:].any()
                    assert not representatives[b, head, t, :, queries.shape[1] :].any()
                    if self.factor:
                        best = apart(queries, reference_sparse.representatives(queries, self.geometry))
                        assert (apart(queries, means) <= best + 0.02 * apart(queries, 0 * means)).all()
                    ranked_by = (
                        means.flatten(0, 1), k[b, head, low:high], self.factor, self.geometry,
                        groups_within(groups, slice(low, high), self.geometry), hidden,
                    )  # fmt: skip
                    scores = reference_sparse.run_scores(*ranked_by)
                    copies = ranking.k.dtype if ranking.arguments["FLOAT8"] else None
                    noise = rounding_of_scores(*ranked_by, self.q.dtype, copies)
                    shown = ~hidden.unflatten(0, (-1, run)).all(dim=1)
                    ranked, count = int(shown.sum()), int(listed[b, head, t])
                    assert count == min(ranked, self._most(ranked) * self.geometry.bundle // run)
                    chosen = table[b, head, t, :count].long()
                    assert (table[b, head, t, count:] == -1).all()
                    assert chosen.unique().numel() == count, "a run is listed twice"
                    if not count:
                        continue
                    assert int(chosen.min()) * run >= low and int(chosen.max()) * run < high
                    assert shown[chosen - low // run].all(), "a hidden run is listed"
                    rest = shown.clone()
                    rest[chosen - low // run] = False
                    ends = scores.clamp(
                        2.0**-23, 2.0**7
                    )  # the first and last bins are open, and half of the first is 2^7
                    most = ends - noise
                    later = torch.cat([most[chosen - low // run], most[rest]]).flip(0).cummax(0).values.flip(0)[:count]
                    allowed = (ends + noise)[chosen - low // run] * BIN
                    assert (later <= allowed).all(), f"tile {t}: a run of a higher score comes later"

    def _allowed(self, b: int) -> Tensor:
        length = self.k.shape[2]
        return torch.ones(length, dtype=torch.bool) if self.keys is None else self.keys[b].cpu()

    def _most(self, ranked: int) -> int:
        return math.ceil(math.ceil(self.max_density * ranked * self.geometry.run) / self.geometry.bundle)

    def check_replay(self, result: Sparse, table: Tensor, listed: Tensor) -> Sparse:
        """Output and lse against float64 with the same selection; stops, tail estimates and counts against theirs."""
        batch, heads, queries, _ = self.q.shape
        group, bundle, run = heads // self.k.shape[1], self.geometry.bundle, self.geometry.run
        length = self.k.shape[2]
        gold, low = (self._empty(dtype) for dtype in (torch.float64, self.q.dtype))
        pairs, visible = (torch.zeros(batch, heads, dtype=torch.int64) for _ in range(2))
        budgets = self.budgets * heads if len(self.budgets) == 1 else self.budgets
        for b in range(batch):
            for h in range(heads):
                for t, (start, end, first, last) in enumerate(self.tiles(b)):
                    sees = reference_sparse._visible(
                        start, end, length, self.causal, self.window, self._allowed(b), self._packed(b, start, end)
                    )
                    rows = slice(start - length + queries, end - length + queries)
                    read = int(result.bundles[b, h, t])
                    chosen = torch.ones(length, dtype=torch.bool)
                    runs = table[b, h // group, t, : int(listed[b, h // group, t])].long()
                    order = (runs[:, None] * run + torch.arange(run)).flatten()
                    if budgets[h] == 0:
                        assert read == -(-self._ranked(b, first, last) // bundle)
                    else:
                        chosen[first:last] = False
                        chosen[order[: read * bundle]] = True
                        at = (b, h, t)
                        self._check_stop(at, rows, sees, slice(first, last), order, result, budgets[h])
                    for (output, lse), dtype in ((gold, torch.float64), (low, self.q.dtype)):
                        x = [
                            y.cpu().to(dtype)
                            for y in (self.q[b, h, rows], self.k[b, h // group], self.v[b, h // group])
                        ]
                        output[b, h, rows], lse[b, h, rows] = reference_sparse._attend(
                            *x, sees, slice(first, last), chosen, self.factor, self._groups(b, h // group, dtype),
                            self.geometry.limit,
                        )  # fmt: skip
                    pairs[b, h] += (sees & chosen).sum()
                    visible[b, h] += sees.sum()
        assert torch.equal(result.pairs.cpu(), pairs) and torch.equal(result.visible.cpu(), visible)
        condition = self.condition
        assert_close_to_gold(result.output.cpu(), low[0], gold[0], what="output", condition=condition)
        assert_close_to_gold(
            result.lse.cpu(), low[1].float(), gold[1], what="lse", dtype=self.q.dtype, condition=condition
        )  # fmt: skip
        assert result.output.transpose(1, 2).is_contiguous()
        return result

    def _ranked(self, b: int, first: int, last: int) -> int:
        """Keys in runs of the prefix [first, last) that have a visible one."""
        run = self.geometry.run
        return int(self._allowed(b)[first:last].unflatten(0, (-1, run)).any(dim=1).sum()) * run

    def _groups(self, b: int, head: int, dtype: torch.dtype) -> Groups | None:
        """The groups of one key/value head: the kernel's assignment, and what follows from it in float64, rounded."""
        if not self.geometry.clusters:
            return None
        if self._table is None:
            object.__setattr__(self, "_table", self.group_table())
        member = self._table.member[b, head].cpu().long()
        member += torch.arange(member.numel()) // self.geometry.block * self.geometry.clusters
        k, v = (x[b, head, : member.numel()].cpu().double() for x in (self.k, self.v))
        shown = self._allowed(b)[: member.numel()]
        count = torch.zeros(self._table.k.shape[2], dtype=torch.float64).index_add_(
            0, member[shown], shown[shown].double()
        )
        mean_k, mean_v, square = (
            torch.zeros(count.numel(), x.shape[1], dtype=torch.float64).index_add_(0, member[shown], x[shown])
            / count.clamp(min=1)[:, None]
            for x in (k, v, k.square())
        )
        variance = (square - mean_k.square()).clamp(min=0.0)
        return Groups(member, mean_k.to(dtype), variance.to(dtype), mean_v.to(dtype))

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = (*self.q.shape[:3], self.v.shape[3])
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape[:3], dtype=dtype)

    def _check_stop(
        self, at: tuple[int, int, int], rows: slice, sees: Tensor, prefix: slice, order: Tensor, result: Sparse,
        budget: float,
    ) -> None:  # fmt: skip
        """The kernel stopped at the first bundle whose worst estimated tail is within the budget, up to rounding."""
        b, h, _ = at
        bundle, group = self.geometry.bundle, self.q.shape[1] // self.k.shape[1]
        logits = self.q[b, h, rows].cpu().double() @ self.k[b, h // group].cpu().double().T * self.factor
        logits = logits.masked_fill(~sees, float("-inf"))
        read, ranked = int(result.bundles[at]), self._ranked(b, prefix.start, prefix.stop)
        assert read <= -(-order.numel() // bundle) and (read > 0) == (order.numel() > 0)
        dense = logits.clone()
        dense[:, prefix] = float("-inf")
        mass = dense.logsumexp(dim=1)
        left = worst = torch.zeros(logits.shape[0], dtype=torch.float64)
        slack = 1e-3 if self.q.dtype == torch.float32 else 5e-2
        for number in range(read):
            tokens = order[number * bundle : (number + 1) * bundle]
            after = torch.logaddexp(mass, logits[:, tokens].logsumexp(dim=1))
            gain = -torch.expm1(mass - after)
            ratio = (ranked - number * bundle - tokens.numel()) / tokens.numel()
            rest, assumed = ratio * gain, max(ratio, self.geometry.horizon) * gain if ratio else 0 * gain
            left, worst, mass = rest / (1 + rest), assumed / (1 + assumed), after
            if number + 1 < read:
                assert float(worst.max()) > budget * (1 - slack), "read on though the budget was kept"
        if read * bundle < order.numel():
            assert float(worst.max()) <= budget * (1 + slack), "stopped before the budget was kept"
        assert abs(float(result.tail[at]) - float(left.mean())) < slack


def apart(q: Tensor, means: Tensor) -> Tensor:
    """(G,): squared distances of queries (G, R, D) from the nearest of their means (G, P, D), added up."""
    return (q[:, :, None] - means[:, None]).square().sum(dim=3).amin(dim=2).sum(dim=1)


def sparse_problem(
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    lengths: tuple[int, int] = (320, 320),
    widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float16,
    *,
    seed: int = 0,
    sharpness: float = 2.0,
    padded: bool = False,
    packed: str = "",
    offset: float = 0.0,
    layout: str = "heads_last",
    device: str = "cpu",
    **options: Any,
) -> SparseProblem:
    """Standard normal operands, q times `sharpness`, so that some tokens count and most do not.

    `offset` times a normal vector is added to all keys: what projections with a bias do, and what ranks none of them.
    """
    q, k, v, _ = attention_inputs(batch, heads, lengths, widths, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if offset:
        k = k + (offset * torch.randn(k.shape[3], generator=generator)).to(dtype)
    if padded:  # the first entry is padded on the left, whole tiles of it, the others have holes
        options["keys"] = torch.rand(batch, lengths[1], generator=generator) < 0.7
        options["keys"][0] = torch.arange(lengths[1]) >= lengths[1] // 2
        options["keys"] = options["keys"].to(device)
    if packed:
        ids = packed_ids(packed, batch, lengths[1], generator).to(device)
        options["documents"] = ids[:, lengths[1] - lengths[0] :], ids
    return SparseProblem(
        *(in_memory(x.to(device), layout) for x in (q * sharpness, k, v)), **options
    )  # fmt: skip


def packed_ids(kind: str, batch: int, keys: int, generator: torch.Generator) -> Tensor:
    """Documents of keys, (B, Sk): of any length "in a row", some coming back "again", or two of whole "tiles"."""
    if kind == "tiles":
        return (torch.arange(keys) >= keys // 2 // 128 * 128).long().expand(batch, -1)
    ids = (torch.rand(batch, keys, generator=generator) < 1 / 150).cumsum(dim=1)
    return ids % 2 if kind == "again" else ids


def random_case(seed: int, *, device: str = "cpu", small: bool = True) -> SparseProblem:
    """Sizes, types, masks, budgets and memory layouts drawn from `seed`; `small` suits the interpreter.

    What kernels are compiled for is one of `KINDS` draws, or GPUs would spend their time on waiting for the compiler.
    """
    kind, draw = random.Random(seed % KINDS), random.Random(seed)
    group = kind.choice([1, 2] if small else [1, 2, 4, 7])
    longest = 256 if small else 512  # blocks, beside which few keys leave no prefix
    tile, block = kind.choice([(128, 128), (128, 64), (128, 64), (64, 32), (32, 16), (128, longest)])
    geometry = Geometry(
        tile=tile, block=block, clusters=kind.choice([1, 4, 4, 8]), rounds=kind.choice([1, 4]),
        sink=kind.choice([0, 1, 2]) * block, bundle=kind.choice([64, 128]),
        sub_means=kind.choice([1, 4, 8]), run=kind.choice([1, 4, 8, 8]),
    )  # fmt: skip
    widths = kind.choice([(16, 16), (24, 40)] if small else [(64, 64), (128, 128), (80, 80), (192, 128), (256, 256)])
    dtypes = [torch.float16, torch.float32] if small else [torch.bfloat16] * 6 + [torch.float16, torch.float32]
    dtype, causal, padded = kind.choice(dtypes), kind.random() < 0.75, kind.random() < 0.25
    windowed = causal and kind.random() < 0.3
    packed = kind.choice(["in a row", "again"]) if causal and kind.random() < 0.3 else ""
    kv_heads = draw.choice([1, 2])
    keys = draw.choice([1, 70, 300, 383] if small else [1, 63, 128, 500, 1000, 1777, 4500])
    queries = min(keys, draw.choice([1, 50, 128, 150] if small else [1, 17, 128, 300, 999, 1024]))
    heads = group * kv_heads
    return sparse_problem(
        draw.choice([1, 2]), (heads, kv_heads), (queries, keys), widths, dtype,
        seed=seed, sharpness=draw.choice([0.5, 2.0, 5.0]), padded=padded, packed=packed, device=device,
        layout=draw.choice(LAYOUTS), causal=causal, geometry=geometry,
        window=draw.choice([1, 100, 200, 5000]) if windowed else None,
        budgets=tuple(draw.choice([0.0, 0.01, 0.3, 0.9]) for _ in range(heads)),
        max_density=draw.choice([0.2, 0.5, 1.0]), scale=draw.choice([None, None, 0.2, -0.1]),
    )  # fmt: skip
