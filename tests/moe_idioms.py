"""Mixture-of-experts layers in the ways people write them; the table of `moe_grid.py` and the tests run them.

All take (batch, length, width) and return the same. Names say what a layer does; the comment names
where one meets the idiom.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """A gated expert of three `nn.Linear`s."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Sequential):
    """An expert without a gate, its layers numbered."""

    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), nn.Dropout(dropout))


class Layer(nn.Module):
    """A router of one matrix; `experts` is what the layers differ in."""

    def __init__(self, width: int = 24, inner: int = 16, experts: int = 6, choices: int = 2) -> None:
        super().__init__()
        self.width, self.inner, self.number, self.choices = width, inner, experts, choices
        self.router = nn.Linear(width, experts, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, d) -> numbers and normalised weights of the chosen experts, (T, K) each."""
        p, ids = self.router(x).softmax(dim=-1).topk(self.choices, dim=-1)
        return ids, p / p.sum(dim=-1, keepdim=True)


class Separate(Layer):
    """Experts are modules of a list."""

    def __init__(self, *args: Any, expert: Any = MLP, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experts = nn.ModuleList(expert(self.width, self.inner) for _ in range(self.number))


class Stacked(Layer):
    """Gate and up in one matrix per expert, (E, 2 I, d) and (E, d, I)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = nn.Parameter(0.3 * torch.randn(self.number, 2 * self.inner, self.width))
        self.last = nn.Parameter(0.3 * torch.randn(self.number, self.width, self.inner))


# ------------------------------------------------------------------------ loops whose length depends on data


class HitExperts(Separate):
    """Loops over the experts that were hit (transformers 4.57: Mixtral, Qwen3-MoE, OLMoE)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        flat = x.view(-1, shape[-1])
        logits = self.router(flat)
        p, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.choices, dim=-1)
        p = (p / p.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros(flat.shape, dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=self.number).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            slot, token = torch.where(mask[expert].squeeze(0))
            rows = flat[None, token].reshape(-1, shape[-1])
            y = self.experts[expert](rows) * p[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out.reshape(shape), logits


class EveryExpert(Separate):
    """Loops over all experts and picks each one's tokens (transformers 4.40, mistral-inference)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out[token] += p[token, slot, None] * expert(flat[token])
        return out.view_as(x)


class NonEmptyExperts(Separate):
    """A method of its own sums the experts that have tokens (transformers 4.57: DeepSeek-V3, GLM-4)."""

    def routed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=weights.dtype)
        mask = F.one_hot(ids, num_classes=len(self.experts)).permute(2, 0, 1)
        for number in range(len(self.experts)):
            token, slot = torch.where(mask[number])
            if token.numel() > 0:
                out.index_add_(0, token, self.experts[number](x[token]) * weights[token, slot].unsqueeze(-1))
        return out.type(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        return self.routed(flat, *self.route(flat)).view(*x.shape) + x


class SortedSlices(Separate):
    """Sorts choices by expert and cuts slices by counts read on the host (`moe_infer` of DeepSeek's own code)."""

    @torch.no_grad()
    def infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self.experts))).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        rows, outputs, start = x[order // ids.shape[1]], [], 0
        for number, count in enumerate(counts.cpu().numpy()):
            if count == 0:
                continue
            outputs.append(self.experts[number](rows[start : start + count]))
            start += count
        joined = torch.cat(outputs, dim=0)
        placed = torch.empty_like(joined)
        placed[order] = joined
        return (placed.view(*ids.shape, -1).type(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).type(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        if not self.training:
            return self.infer(flat, ids, p).view(*x.shape)
        rows, chosen = flat.repeat_interleave(self.choices, dim=0), ids.view(-1)
        y = torch.empty_like(rows)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(rows[chosen == number])
        return (y.view(*p.shape, -1) * p.unsqueeze(-1)).sum(dim=1).view(*x.shape)


class MaskedTokens(Separate):
    """Masks of tokens and a dense matrix of routing weights (makeMoE, nanoMoE, tutorials)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, expert=Plain, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, ids = logits.topk(self.choices, dim=-1)
        gates = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(dim=-1)
        out, flat, flat_gates = torch.zeros_like(x), x.view(-1, x.size(-1)), gates.view(-1, gates.size(-1))
        for number, expert in enumerate(self.experts):
            mask = (ids == number).any(dim=-1)
            rows = mask.view(-1)
            if rows.any():
                out[mask] += expert(flat[rows]) * flat_gates[rows, number].unsqueeze(1)
        return out


class NamedExperts(Layer):
    """Experts in an `nn.ModuleDict`, as in Switch, and top-1 routing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, choices=1, **kwargs)
        self.experts = nn.ModuleDict({f"expert_{n}": MLP(self.width, self.inner, True) for n in range(self.number)})

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p, chosen = self.router(flat).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts.values()):
            at = (chosen == number).nonzero().squeeze(-1)
            if len(at):
                y[at] = expert(flat[at])
        return (y * p[:, None]).reshape(x.shape)


class FoldedMatrices(nn.Module):
    """Matrices of all experts below one another, (E * I, d), the last one untransposed (DBRX)."""

    def __init__(self, width: int = 24, inner: int = 16, experts: int = 6, choices: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.choices = choices
        self.experts = _Folded(width, inner, experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        p, ids = self.router(flat).softmax(dim=-1).topk(self.choices, dim=-1)
        return self.experts(flat, ids, p).view_as(x)


class _Folded(nn.Module):
    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.number, self.inner, self.width = experts, inner, width
        for name in ("w1", "v1", "w2"):
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(experts * inner, width)))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.number).permute(2, 1, 0)
        w1, v1, w2 = (w.view(self.number, self.inner, self.width) for w in (self.w1, self.v1, self.w2))
        for number in range(self.number):
            slot, token = torch.where(mask[number])
            if token.shape[0] == 0:
                continue
            h = F.gelu(x[token] @ w1[number].T) * (x[token] @ v1[number].T)
            out.index_add_(0, token, (h @ w2[number]) * weights[token, slot, None])
        return out


class InputScaled(Separate):
    """The routing weight multiplies the expert's input (Llama 4, torchtune)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros_like(flat)
        for number in range(self.number):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, self.experts[number](flat[token] * p[token, slot, None]))
        return out.view_as(x)


LOOPS: dict[str, type[nn.Module]] = {
    "hit experts": HitExperts,
    "every expert": EveryExpert,
    "non-empty experts": NonEmptyExperts,
    "sorted slices": SortedSlices,
    "masked tokens": MaskedTokens,
    "named experts": NamedExperts,
    "folded matrices": FoldedMatrices,
    "scaled inputs": InputScaled,
}
