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
        self.glu = _Matrices(width, inner, experts)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        batch, out = x.shape[0], torch.zeros_like(x)
        mask = F.one_hot(ids, self.number).permute(2, 1, 0)
        w1, v1, w2 = (w.view(self.number, self.inner, self.width) for w in self.glu.parameters())
        for number in range(self.number):
            slot, token = torch.where(mask[number])
            if token.shape[0] == 0:
                continue
            out.index_add_(
                0, token, self.glu(x[token], w1[number], v1[number], w2[number]) * weights[token, slot, None]
            )
        return out.view(batch, -1, self.width)


class _Matrices(nn.Module):
    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.number = experts
        for name in ("w1", "v1", "w2"):
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(experts * inner, width)))

    def forward(self, x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
        return (F.gelu(x @ w1.T) * (x @ v1.T)) @ w2


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


# ----------------------------------------------------------------------- forms that a graph holds as they are


class Grouped(Stacked):
    """Rows sorted by expert, grouped products, un-sorted and summed (transformers 5 `grouped_mm`)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids, p = self.route(flat)
        chosen, order = torch.sort(ids.reshape(-1))
        rows = flat[order // self.choices]
        ends = torch.cumsum(torch.histc(chosen.float(), self.number, 0, self.number - 1), 0, dtype=torch.int32)
        low = _low(x)
        gate, up = grouped(rows.to(low), self.first.to(low).transpose(-2, -1), ends).chunk(2, dim=-1)
        y = grouped(F.silu(gate) * up, self.last.to(low).transpose(-2, -1), ends) * p.reshape(-1)[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0])
        return y[place].view(flat.shape[0], self.choices, -1).sum(dim=1).to(x.dtype).view_as(x)


def _low(x: Tensor) -> torch.dtype:
    """The dtype of grouped products: Inductor has them in bfloat16 alone; float64 is for the truth."""
    return torch.float64 if x.dtype == torch.float64 else torch.bfloat16


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped product, which does not take float64."""
    if rows.dtype != torch.float64:
        return torch._grouped_mm(rows, weight, offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([rows[a:b] @ w for a, b, w in zip(starts, starts[1:], weight, strict=False)])


class Batched(Stacked):
    """One gathered matrix per choice (transformers 5 `batched_mm`)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids, p = self.route(flat)
        chosen = ids.reshape(-1)
        rows = flat.repeat_interleave(self.choices, dim=0)
        gate, up = torch.bmm(self.first[chosen], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        y = torch.bmm(self.last[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * p.reshape(-1, 1)
        return y.view(flat.shape[0], self.choices, -1).sum(dim=1).view_as(x)


class IndexedEinsum(Layer):
    """Gathered matrices in einsums, gate and up apart (gpt-fast)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.w1 = nn.Parameter(0.3 * torch.randn(self.number, self.inner, self.width))
        self.w2 = nn.Parameter(0.3 * torch.randn(self.number, self.width, self.inner))
        self.w3 = nn.Parameter(0.3 * torch.randn(self.number, self.inner, self.width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        gate = F.silu(torch.einsum("ti,taoi->tao", flat, self.w1[ids]))
        up = torch.einsum("ti,taoi->tao", flat, self.w3[ids])
        y = torch.einsum("tao,taio->tai", gate * up, self.w2[ids])
        return torch.einsum("tai,ta->ti", y, p).reshape(x.shape)


class DenseInterleaved(Layer):
    """Every expert on every token, most routing weights zero; biases, clamps, interleaved halves (GPT-OSS)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = nn.Parameter(0.3 * torch.randn(self.number, self.width, 2 * self.inner))
        self.first_bias = nn.Parameter(0.3 * torch.randn(self.number, 2 * self.inner))
        self.last = nn.Parameter(0.3 * torch.randn(self.number, self.inner, self.width))
        self.last_bias = nn.Parameter(0.3 * torch.randn(self.number, self.width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.width)
        logits = self.router(flat)
        top, ids = torch.topk(logits, self.choices, dim=-1)
        scores = torch.zeros_like(logits).scatter_(1, ids, top.softmax(dim=1))
        rows = flat.repeat(self.number, 1).view(self.number, -1, self.width)
        both = torch.bmm(rows, self.first) + self.first_bias[..., None, :]
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(min=-7.0, max=7.0)
        y = torch.bmm((up + 1) * (gate * torch.sigmoid(gate * 1.702)), self.last) + self.last_bias[..., None, :]
        y = y.view(self.number, x.shape[0], -1, self.width)
        return (y * scores.transpose(0, 1).view(self.number, x.shape[0], -1)[..., None]).sum(dim=0)


class DenseScaledInputs(Layer):
    """Every expert on every token, scaled by a sigmoid that is zero for most (Llama 4)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = nn.Parameter(0.3 * torch.randn(self.number, self.width, 2 * self.inner))
        self.last = nn.Parameter(0.3 * torch.randn(self.number, self.inner, self.width))
        self.shared = MLP(self.width, self.inner)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.width)
        logits = self.router(flat)
        top, ids = torch.topk(logits, self.choices, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, top)
        scores = torch.sigmoid(scores.float()).to(scores.dtype)
        rows = flat.repeat(self.number, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(self.number, -1, self.width), self.first).chunk(2, dim=-1)
        y = torch.bmm(up * F.silu(gate), self.last).view(-1, self.width)
        out = self.shared(flat)
        out.add_(y.reshape(self.number, -1, self.width).sum(dim=0))
        return out.view_as(x)


class GroupedScattered(IndexedEinsum):
    """Grouped products of separate matrices, scattered into the shared expert's output (torchtitan)."""

    scaled_inputs = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = None if self.scaled_inputs else MLP(self.width, self.inner)

    def forward(self, x: Tensor) -> Tensor:
        flat, low = x.view(-1, self.width), _low(x)
        p, ids = torch.sigmoid(self.router(flat).float()).topk(self.choices, dim=1)
        counts = torch.histc(ids.view(-1).float(), self.number, 0, self.number)
        order = torch.argsort(ids.view(-1), stable=True)
        weights, token = p.view(-1)[order], (order // self.choices).reshape(-1, 1).expand(-1, self.width)
        rows = torch.gather(flat, dim=0, index=token)
        if self.scaled_inputs:
            rows = (rows.float() * weights.reshape(-1, 1)).to(x.dtype)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(grouped(rows.to(low), self.w1.to(low).transpose(-2, -1), ends))
        h = h * grouped(rows.to(low), self.w3.to(low).transpose(-2, -1), ends)
        y = grouped(h, self.w2.to(low).transpose(-2, -1), ends).type_as(x)
        if not self.scaled_inputs:
            y = (y.float() * weights.reshape(-1, 1)).to(x.dtype)
        base = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        return base.scatter_add(dim=0, index=token, src=y).reshape(x.shape)


class GroupedScaledInputs(GroupedScattered):
    """The same with weights on the experts' inputs (torchtune, torchtitan's option)."""

    scaled_inputs = True


class Latent(Stacked):
    """A latent space around the experts, squared relu, sigmoid router with a bias for the choice (Nemotron-H)."""

    def __init__(self, width: int = 24, inner: int = 16, experts: int = 6, choices: int = 2, latent: int = 12) -> None:
        Layer.__init__(self, width, inner, experts, choices)
        self.first = nn.Parameter(0.3 * torch.randn(experts, inner, latent))
        self.last = nn.Parameter(0.3 * torch.randn(experts, latent, inner))
        self.into, self.out_of = nn.Linear(width, latent, bias=False), nn.Linear(latent, width, bias=False)
        self.register_buffer("correction", 0.1 * torch.randn(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = F.linear(flat.float(), self.router.weight.float()).sigmoid()
        ids = (scores + self.correction).topk(self.choices, dim=-1, sorted=False).indices
        p = scores.gather(1, ids)
        p = 2.5 * p / (p.sum(dim=-1, keepdim=True) + 1e-20)
        z, chosen = self.into(flat), ids.reshape(-1)
        rows = z.unsqueeze(1).expand(-1, self.choices, -1).reshape(-1, z.shape[-1])
        h = torch.bmm(self.first[chosen], rows.unsqueeze(-1)).squeeze(-1).relu().square()
        y = torch.bmm(self.last[chosen], h.unsqueeze(-1)).squeeze(-1) * p.reshape(-1, 1)
        return self.out_of(y.view(*ids.shape, -1).sum(dim=1).to(x.dtype)).view_as(x)


class StackedEachStep(Separate):
    """Matrices of separate experts stacked in every forward, then grouped products (nanochat)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids, p = self.route(flat)
        w1, w3, w2 = (
            torch.stack([getattr(expert, name).weight for expert in self.experts]) for name in ("gate", "up", "down")
        )
        chosen = ids.reshape(-1)
        rows = flat[torch.arange(flat.shape[0]).repeat_interleave(self.choices)]
        h = F.silu(torch.bmm(w1[chosen], rows.unsqueeze(-1))) * torch.bmm(w3[chosen], rows.unsqueeze(-1))
        y = torch.bmm(w2[chosen], h).squeeze(-1) * p.reshape(-1, 1)
        return y.view(*ids.shape, -1).sum(dim=1).view_as(x)


class Slots(IndexedEinsum):
    """Tokens fill a bounded number of slots per expert, and the rest are dropped (GShard, NLLB)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.width)
        ids, p = self.route(flat)
        capacity = 2 * flat.shape[0] * self.choices // self.number
        hot = F.one_hot(ids, self.number)
        slot = (hot.reshape(-1, self.number).cumsum(dim=0).view_as(hot) - 1) * hot
        kept = (hot * (slot < capacity)).to(p.dtype)
        place = kept.unsqueeze(-1) * F.one_hot(slot.clamp(max=capacity - 1), capacity).to(p.dtype)
        combine = torch.einsum("tk,tkec->tec", p, place)
        rows = torch.einsum("tec,td->ecd", (combine > 0).to(x.dtype), flat)
        h = F.silu(torch.einsum("ecd,eod->eco", rows, self.w1)) * torch.einsum("ecd,eod->eco", rows, self.w3)
        return torch.einsum("tec,ecd->td", combine, torch.einsum("eco,edo->ecd", h, self.w2)).view_as(x)


class SoftMixture(Separate):
    """All experts on all tokens, weighted by a softmax over all of them."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(dim=-1)
        return (torch.stack([expert(x) for expert in self.experts], dim=-1) * p.unsqueeze(-2)).sum(dim=-1)


class ChosenOfAll(Separate):
    """All experts on all tokens, of which the chosen ones are gathered afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        every = torch.stack([expert(flat) for expert in self.experts], dim=1)
        chosen = every.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return (chosen * p.unsqueeze(-1)).sum(dim=1).view_as(x)


class GatedColumns(Separate):
    """All experts on all tokens, one column of a sparse matrix of weights each (makeMoE without its masks)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, expert=Plain, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, ids = logits.topk(self.choices, dim=-1)
        gates = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + gates[..., number : number + 1] * expert(x)
        return out


class StackedGates(Separate):
    """The same with a stack of all outputs and an einsum."""

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.router(x).topk(self.choices, dim=-1)
        gates = torch.zeros(*x.shape[:-1], self.number, dtype=x.dtype).scatter(-1, ids, top.softmax(dim=-1))
        return torch.einsum("ebsd,bse->bsd", torch.stack([expert(x) for expert in self.experts]), gates)


class MaskedWeights(Separate):
    """All experts on all tokens, weighted where the expert is among a token's choices (made to be exported)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        return sum(
            expert(flat) * (p * (ids == number)).sum(dim=-1, keepdim=True) for number, expert in enumerate(self.experts)
        ).view_as(x)


class OneHotLoop(Separate):
    """Tokens looked up in a one-hot mask, outputs added in place (transformers 4.40: Mixtral, Qwen2-MoE)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = torch.zeros(flat.shape, dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=self.number).permute(2, 1, 0)
        for number in range(self.number):
            slot, token = torch.where(mask[number])
            rows = flat[None, token].reshape(-1, x.shape[-1])
            out.index_add_(0, token, (self.experts[number](rows) * p[token, slot, None]).to(x.dtype))
        return out.reshape(x.shape)


class MatricesInLoop(Stacked):
    """A loop over the parts of stacked matrices, into the shared expert's output (gpt-oss in plain torch)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = MLP(self.width, self.inner)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        out = self.shared(flat)
        for number in range(self.number):
            token, slot = torch.where(ids == number)
            gate, up = F.linear(flat[token], self.first[number]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.last[number])
            out = out.index_add(0, token, y * p[token, slot].unsqueeze(-1))
        return out.view_as(x)


class Split(Stacked):
    """Sorted rows split by counts read on the host (JetMoE, ScatterMoE without its kernels)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        ids, p = self.route(flat)
        order = ids.view(-1).argsort()
        parts = flat[order // self.choices].split(torch.bincount(ids.view(-1), minlength=self.number).tolist())
        outputs = []
        for rows, first, last in zip(parts, self.first, self.last, strict=True):
            gate, up = F.linear(rows, first).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, last))
        y = torch.cat(outputs) * p.view(-1)[order, None]
        return torch.zeros_like(flat).index_add(0, order // self.choices, y).view_as(x)


CAPTURED: dict[str, type[nn.Module]] = {
    "grouped products": Grouped,
    "batched products": Batched,
    "indexed einsum": IndexedEinsum,
    "dense, interleaved": DenseInterleaved,
    "dense, scaled inputs": DenseScaledInputs,
    "grouped, scattered": GroupedScattered,
    "grouped, scaled inputs": GroupedScaledInputs,
    "latent": Latent,
    "stacked each step": StackedEachStep,
    "chosen of all": ChosenOfAll,
    "gated columns": GatedColumns,
    "stacked gates": StackedGates,
    "masked weights": MaskedWeights,
}
# Captured only with `capture_dynamic_output_shape_ops` or fullgraph=True, one branch per expert. Otherwise the loop
# breaks the graph, and is for `prepare`.
UNROLLED: dict[str, type[nn.Module]] = {
    "one-hot loop": OneHotLoop,
    "every expert": EveryExpert,
    "scaled inputs": InputScaled,
    "matrices in a loop": MatricesInLoop,
}
# What no operator computes: a reason, and the graph as it was.
DECLINED: dict[str, type[nn.Module]] = {"slots": Slots, "soft mixture": SoftMixture}
