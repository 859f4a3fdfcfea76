"""Spellings of attention: the grid of 96 and a strategy that mixes them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Attend = Callable[..., Tensor]


# ------------------------------------------------------------------------------------ the grid of 96


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the grid: where the scale stands, the mask, grouped heads, and the type of the softmax."""

    scale: str
    mask: str
    grouped: bool
    dtype: torch.dtype
    upcast: bool

    def __str__(self) -> str:
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype] + ("-upcast" if self.upcast else "")
        return f"{self.scale}-{self.mask}-{'grouped' if self.grouped else 'plain'}-{kind}"

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and an additive mask for B, H, S, D = 2, 8, 64, 32."""
        generator = torch.Generator().manual_seed(0)
        heads = 2 if self.grouped else 8
        shapes = ((2, 8, 64, 32), (2, heads, 64, 32), (2, heads, 64, 32))
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        hidden = torch.rand(64, 64, generator=generator) < 0.3
        return q, k, v, torch.zeros(64, 64).masked_fill(hidden, -math.inf).to(self.dtype)

    def function(self) -> Attend:
        """The attention of this cell as a function of `inputs`."""
        cell = self

        def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
            if cell.grouped:
                b, h, s, d = k.shape
                k = k[:, :, None].expand(b, h, 4, s, d).reshape(b, 4 * h, s, d)
                v = v[:, :, None].expand(b, h, 4, s, d).reshape(b, 4 * h, s, d)
            c = q.shape[-1] ** -0.5
            if cell.scale == "q":
                x = (q * c) @ k.transpose(-1, -2)
            elif cell.scale == "k":
                x = q @ (k * c).transpose(-1, -2)
            elif cell.scale == "s_mul":
                x = (q @ k.transpose(-1, -2)) * c
            else:
                x = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            if cell.mask == "add":
                x = x + m
            elif cell.mask == "where":
                x = torch.where(m == 0, x, float("-inf"))
            elif cell.mask == "causal":
                x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
            p = torch.softmax(x.float(), -1).to(q.dtype) if cell.upcast else torch.softmax(x, -1)
            return p @ v

        return attend


def grid() -> Iterator[Cell]:
    """The 96 cells: 4 scales x 4 masks x 2 head layouts x (fp32, bf16, bf16 with an fp32 softmax)."""
    kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    for scale, mask, grouped, (dtype, upcast) in itertools.product(
        ("q", "k", "s_mul", "s_div"), ("none", "add", "where", "causal"), (False, True), kinds
    ):
        yield Cell(scale, mask, grouped, dtype, upcast)


# -------------------------------------------------------------------------------------- the strategy


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write the same attention. Fields name a choice of `SPELLINGS`."""

    sizes: tuple[int, int, int, int, int]  # batch, key/value heads, queries, keys, width
    product: str
    transpose: str
    scale: str
    mask: str
    mask_shape: str
    fill: str
    groups: int
    grouping: str
    softmax: str
    upcast: str
    dropout: str
    values: str

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """q, k, v and a boolean mask (True is seen) in which one row sees nothing."""
        generator = torch.Generator().manual_seed(1)
        b, shared, s, t, d = self.sizes
        q = torch.randn(b, shared * self.groups, s, d, generator=generator).to(dtype)
        k, v = (torch.randn(b, shared, t, d, generator=generator).to(dtype) for _ in range(2))
        shapes = {"qk": (s, t), "11qk": (1, 1, s, t), "b11k": (b, 1, 1, t), "bhqk": (b, shared * self.groups, s, t)}
        visible = torch.rand(shapes[self.mask_shape], generator=generator) < 0.6
        visible[..., 0] = True
        if visible.shape[-2] > 1:
            visible[..., 1, :] = False
        return q, k, v, visible

    @property
    def expected(self) -> tuple[Any, ...]:
        """(scale, groups, kinds of masks, empty): what the record must say whatever the spelling."""
        scale = self.sizes[-1] ** -0.5
        if self.mask == "none":
            return (scale, self.groups, (), "zero")
        added = self.mask in ("add", "iadd", "sub")
        empty = "nan" if added or self.fill in ("-inf", "tensor") else "mean"
        return (scale, self.groups, ("additive" if added else "boolean",), empty)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """The attention; the result may have its heads in two axes."""
        dtype = q.dtype
        if self.upcast == "operands":
            q, k = q.float(), k.float()
        grouped = self.groups > 1 and self.grouping in ("broadcast", "einsum")
        if grouped:
            q = q.unflatten(1, (self.sizes[1], self.groups))
        elif self.groups > 1:
            k, v = self.expand(k), self.expand(v)
        flat = self.product in ("bmm", "baddbmm") and not grouped
        scores = self.scores(q, k, flat, grouped)
        if self.mask != "none":
            scores = self.masked(scores, self.fitted(visible, grouped))
        weights = self.weights(scores)
        if self.dropout == "zero":
            weights = F.dropout(weights, 0.0)
        elif self.dropout == "eval":
            weights = F.dropout(weights, p=0.1, training=False)
        if self.upcast != "none":
            weights = weights.to(dtype)
        return self.output(weights, v, flat, grouped)

    def expand(self, x: Tensor) -> Tensor:
        """Keys or values with one head per query head."""
        b, h, s, d = x.shape
        if self.grouping == "repeat_interleave":
            return x.repeat_interleave(self.groups, dim=1)
        if self.grouping == "repeat":
            return x.unsqueeze(2).repeat(1, 1, self.groups, 1, 1).view(b, h * self.groups, s, d)
        if self.grouping == "flatten":
            return x.unsqueeze(2).expand(-1, -1, self.groups, -1, -1).flatten(1, 2)
        return x[:, :, None, :, :].expand(b, h, self.groups, s, d).reshape(b, h * self.groups, s, d)

    def scores(self, q: Tensor, k: Tensor, flat: bool, grouped: bool) -> Tensor:
        """q k^T with the scale somewhere, (B, H, Sq, Sk) or grouped."""
        width = q.shape[-1]
        root = width**0.25
        if self.scale == "q_mul":
            q = q * width**-0.5
        elif self.scale == "q_div":
            q = q / math.sqrt(width)
        elif self.scale == "k_mul":
            k = width**-0.5 * k
        elif self.scale == "split":
            q, k = q / root, k / root
        if grouped and self.grouping == "einsum":
            scores = torch.einsum("bkgqd,bksd->bkgqs", q, k)
        elif grouped:
            scores = q @ k.unsqueeze(2).transpose(-1, -2)
        elif flat:
            scores = self.flat_scores(q.flatten(0, 1), self.transposed(k.flatten(0, 1))).view(*q.shape[:3], -1)
        elif self.product == "einsum":
            scores = torch.einsum("...id,...jd->...ij", q, k)
        elif self.product == "operator":
            scores = q @ self.transposed(k)
        else:
            scores = torch.matmul(q, self.transposed(k))
        if self.scale == "s_mul":
            return scores * width**-0.5
        if self.scale == "s_div":
            return scores.div(math.sqrt(width))
        if self.scale == "s_imul":
            scores *= width**-0.5
        elif self.scale == "tensor":
            return scores / torch.full([], width**0.5, dtype=scores.dtype, device=scores.device)
        return scores

    def flat_scores(self, q: Tensor, kt: Tensor) -> Tensor:
        """The scores by a product of 3-D tensors."""
        if self.product == "baddbmm":
            empty = q.new_empty(q.shape[0], q.shape[1], kt.shape[2])
            return torch.baddbmm(empty, q, kt, beta=0.0, alpha=1.0)
        return torch.bmm(q, kt)

    def transposed(self, k: Tensor) -> Tensor:
        """k with its last two dimensions swapped."""
        if self.transpose == "mT":
            return k.mT
        if self.transpose == "swapaxes":
            return k.swapaxes(-2, -1)
        if self.transpose == "permute":
            return k.permute(*range(k.dim() - 2), k.dim() - 1, k.dim() - 2)
        return k.transpose(-2, -1)

    def fitted(self, visible: Tensor, grouped: bool) -> Tensor:
        """The mask in the layout of the scores."""
        if not grouped or visible.dim() == 2:
            return visible
        if visible.shape[1] == 1:
            return visible.unsqueeze(2)
        return visible.unflatten(1, (-1, self.groups))

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        """The scores with what `visible` leaves out hidden."""
        fill: Any = {"-inf": -math.inf, "1e9": -1e9, "min": torch.finfo(scores.dtype).min, "tensor": 0.0}[self.fill]
        if self.fill == "tensor":
            fill = torch.tensor(-math.inf, dtype=scores.dtype)
        if self.mask in ("add", "iadd", "sub"):
            bias = torch.zeros(visible.shape, dtype=scores.dtype).masked_fill(~visible, -math.inf)
            if self.mask == "iadd":
                scores += bias
                return scores
            return scores - bias.neg() if self.mask == "sub" else scores + bias
        if self.mask == "where":
            return torch.where(visible, scores, fill)
        if self.mask == "where_not":
            return torch.where(~visible, fill, scores)
        if self.mask == "method_where":
            return scores.where(visible, fill)
        if self.mask == "masked_fill_":
            scores.masked_fill_(~visible, fill)
            return scores
        return scores.masked_fill(visible == 0, fill)

    def weights(self, scores: Tensor) -> Tensor:
        """softmax over the last dimension."""
        if self.upcast == "scores":
            scores = scores.float()
        if self.softmax == "method":
            return scores.softmax(dim=-1)
        if self.softmax == "torch":
            return torch.softmax(scores, 3 if scores.dim() == 4 else 4)
        if self.softmax == "dtype":
            return F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        if self.softmax == "exp":
            powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            return powers / powers.sum(dim=-1, keepdim=True)
        if self.softmax == "shifted":
            scores = scores - scores.max(dim=-1, keepdim=True).values
        return F.softmax(scores, dim=-1)

    def output(self, weights: Tensor, v: Tensor, flat: bool, grouped: bool) -> Tensor:
        """weights v, heads merged again."""
        if grouped and self.grouping == "einsum":
            return torch.einsum("bkgqs,bksd->bqkgd", weights, v).flatten(2)
        if grouped:
            return (weights @ v.unsqueeze(2)).flatten(1, 2)
        if flat:
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(*weights.shape[:3], -1)
        if self.values == "einsum":
            return torch.einsum("bhqk,bhkd->bqhd", weights, v)
        return torch.matmul(weights, v) if self.values == "matmul" else weights @ v


SPELLINGS: dict[str, tuple[Any, ...]] = {
    # Equal sizes, where shapes do not tell the axes apart, and sizes of one, which reshapes lose.
    "sizes": (
        (2, 2, 5, 7, 8),
        (2, 4, 6, 6, 8),
        (4, 4, 4, 4, 4),
        (1, 2, 5, 7, 8),
        (2, 1, 5, 7, 8),
        (2, 2, 1, 7, 8),
        (1, 1, 1, 7, 8),
        (2, 2, 2, 2, 2),
        (3, 2, 1, 1, 8),
        (1, 1, 5, 5, 1),
    ),
    "product": ("matmul", "operator", "einsum", "bmm", "baddbmm"),
    "transpose": ("transpose", "mT", "permute", "swapaxes"),
    "scale": ("q_mul", "q_div", "k_mul", "s_mul", "s_div", "s_imul", "split", "tensor"),
    "mask": ("none", "add", "iadd", "sub", "where", "where_not", "method_where", "masked_fill", "masked_fill_"),
    "mask_shape": ("qk", "11qk", "b11k", "bhqk"),
    "fill": ("-inf", "1e9", "min", "tensor"),
    "groups": (1, 2, 4),
    "grouping": ("expand", "flatten", "repeat", "repeat_interleave", "broadcast", "einsum"),
    "softmax": ("functional", "torch", "method", "dtype", "exp", "shifted"),
    "upcast": ("none", "scores", "operands"),
    "dropout": ("none", "zero", "eval"),
    "values": ("operator", "matmul", "einsum"),
}


def spellings() -> st.SearchStrategy[Spelling]:
    """Any combination of the choices."""
    return st.builds(Spelling, **{name: st.sampled_from(choices) for name, choices in SPELLINGS.items()})
