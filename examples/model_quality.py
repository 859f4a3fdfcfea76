"""What sparse selections cost a whole language model: loss and recall of planted keys, over density.

The model is plain PyTorch. Its `F.scaled_dot_product_attention` is caught and answered by one selection at one
threshold, in every layer, so that errors add up through the layers as they would in use. Every selection reads the
same keys densely and takes an exact softmax over what it reads; ours runs the kernels of the backend.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_lm
import torch
import torch.nn.functional as F
from block_selections import SELECTIONS, attend, select
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from s2o_inductor.kernels import sparse
from s2o_inductor.sparse_policy import GEOMETRIES, Geometry

_FILES = ("config.json", "model.safetensors", "heldout.npy", "tokenizer.json")
_CHUNK = 2048  # positions whose logits are held at once
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int, int]]  # output, computed pairs, visible pairs


# ---------------------------------------------------------------- model and text


@dataclass(frozen=True)
class Language:
    """A model, text that it has not seen, and how to write in its tokens.

    Attributes:
        model: the model.
        text: int64 (N,), held-out tokens.
        encode: tokens of a line, and the first character of each.
    """

    model: tiny_lm.TinyLM
    text: Tensor
    encode: Callable[[str], tuple[list[int], list[int]]]


def load_language(folder: Path | None, limit: int) -> Language:
    """The committed model over bytes, or one of a folder.

    A folder holds `config.json`, the fields of `tiny_lm.Config`; `model.safetensors`, the state dict of
    `tiny_lm.TinyLM`; `heldout.npy`, integer (N,) tokens; and `tokenizer.json`, in the format of Hugging Face
    tokenizers.

    Args:
        folder: where; None is the committed model and the standard library's source.
        limit: bytes of text for the committed model.
    """
    if folder is None:
        text = tiny_lm.to_tokens([tiny_lm.load_text(held_out=True, limit=limit)])[0]
        return Language(tiny_lm.load_checkpoint()[0], text, lambda line: (list(line.encode()), [*range(len(line))]))
    missing = [name for name in _FILES if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"--model must be a folder with {', '.join(_FILES)}; {', '.join(missing)} is not in {folder}")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = tiny_lm.TinyLM(tiny_lm.Config(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})

    def encode(line: str) -> tuple[list[int], list[int]]:
        encoded = tokenizer.encode(line)
        return encoded.ids, [start for start, _ in encoded.offsets]

    return Language(model.eval(), torch.from_numpy(np.load(folder / "heldout.npy").astype(np.int64)), encode)


@dataclass(frozen=True)
class Planted:
    """A sequence with keys to recall.

    Attributes:
        tokens: int64 (S,).
        text: bool (S,), tokens that are still the text's.
        answers: for every key, int64 positions of the tokens that only its definition tells.
    """

    tokens: Tensor
    text: Tensor
    answers: list[Tensor]


def plant(language: Language, sequence: int, length: int, keys: int) -> Planted:
    """Sequence number `sequence` of the text with `keys` definitions in its first three quarters, recalled in the last.

    Definitions stand at even distances, and so do the lines that recall them, in random order.

    Raises:
        ValueError: the text is too short, or has no room for so many keys.
    """
    if (sequence + 1) * length > language.text.numel():
        raise ValueError(
            f"sequence {sequence} of {length} tokens lies past the end of the text, {language.text.numel()} tokens"
        )
    rng = random.Random(sequence)
    tokens = language.text[sequence * length : (sequence + 1) * length].clone()
    text, answers = torch.ones(length, dtype=torch.bool), []
    names, places = rng.sample(range(16**4), keys), rng.sample(range(keys), keys)
    first = length * 3 // 4
    step, recall_step = first // max(keys, 1), (length - first) // max(keys, 1)
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        value = f" {rng.randrange(10**6):06d}\n"
        definition, _ = language.encode(f"\nkey_{name:04x} ={value}")
        line = f"\nassert key_{name:04x} =={value}"
        recalled, starts = language.encode(line)
        if max(len(definition), len(recalled)) > min(step, recall_step):
            raise ValueError(f"{length} tokens have no room for {keys} keys; plant fewer")
        for at, ids in ((i * step, definition), (first + place * recall_step, recalled)):
            tokens[at : at + len(ids)] = torch.tensor(ids)
            text[at : at + len(ids)] = False
        known = len(line) - len(value)
        of_answer = [j for j, start in enumerate(starts) if start >= known]
        answers.append(first + place * recall_step + torch.tensor(of_answer))
    return Planted(tokens, text, answers)


# ---------------------------------------------------------------- attention


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int, int]:
    """Exact causal attention."""
    visible = q.shape[1] * q.shape[2] * (q.shape[2] + 1) // 2
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), visible, visible


def s2o(
    q: Tensor, k: Tensor, v: Tensor, budget: float, geometry: Geometry | None = None
) -> tuple[Tensor, int, int]:  # fmt: skip
    """The backend's kernels, in the sizes of the device unless others are given."""
    if q.device.type == "cuda":
        from s2o_inductor.kernels import cuda_sparse as kernels
    else:
        from s2o_inductor.kernels import cpu_sparse as kernels  # type: ignore[no-redef]
    read = kernels.forward(
        q, k, v, scale=q.shape[3] ** -0.5, budgets=(budget,), causal=True, window=None, keys=None, max_density=1.0,
        geometry=geometry or sparse.geometry_for(q, k),
    )  # fmt: skip
    return read.output, int(read.pairs.sum()), int(read.visible.sum())


def s2o_without_tail(q: Tensor, k: Tensor, v: Tensor, budget: float) -> tuple[Tensor, int, int]:
    """The same with nothing in place of what is skipped.

    On CUDA keys are ranked by their groups all the same, as the kernels rank no other way; on CPU by their share.
    """
    return ranked_by_groups(q, k, v, budget) if q.device.type == "cuda" else s2o(q, k, v, budget, Geometry(clusters=0))


def ranked_by_groups(q: Tensor, k: Tensor, v: Tensor, budget: float) -> tuple[Tensor, int, int]:
    """Ranked by the CUDA kernels as they do it, then attended to without the groups."""
    from s2o_inductor.kernels import cuda_sparse
    from s2o_inductor.kernels import triton_sparse_order as ordering
    from s2o_inductor.kernels.triton_sparse_groups import group_keys
    from s2o_inductor.kernels.triton_sparse_tiles import Padding, Tiling

    tiling = Tiling(q.shape[2], k.shape[2], True, None, GEOMETRIES["cuda"])
    groups = group_keys(k, v, Padding(), tiling.geometry)
    ranking = ordering.rank(q, k, q.shape[3] ** -0.5, tiling, Padding(), groups)
    order = ordering.order(ranking, k, tiling, fractions.Fraction(1), 0, tiling.count)
    read = cuda_sparse.attend(
        q, k, v, order.table, order.listed, budgets=(budget,), geometry=dataclasses.replace(tiling.geometry, clusters=0)
    )
    return read.output, int(read.pairs.sum()), int(read.visible.sum())


def selected(q: Tensor, k: Tensor, v: Tensor, name: str, knob: float) -> tuple[Tensor, int, int]:
    """Causal attention that reads what a published selection chooses, with the first and the own block of each tile.

    Args:
        q: (B, Hq, S, D), S a multiple of 128.
        k: (B, Hkv, S, D).
        v: (B, Hkv, S, Dv).
        name: one of `block_selections.SELECTIONS`.
        knob: its threshold.

    Raises:
        ValueError: S is not a multiple of 128.
    """
    batch, heads, length, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    output, pairs = [], 0
    for entry in zip(*(x.split(1) for x in (q, k, v)), strict=True):
        result, computed = attend(*entry, select(name, entry[0][0], entry[1][0], knob))
        output.append(result)
        pairs += computed
    return torch.cat(output), pairs, batch * heads * length * (length + 1) // 2


def attention_of(method: str, knob: float) -> Attention:
    """A method of `METHODS` at one threshold."""
    if method == "dense":
        return dense
    if method in SELECTIONS:
        return functools.partial(selected, name=method, knob=knob)
    if method == "S2O":
        return functools.partial(s2o, budget=knob)
    return functools.partial(s2o_without_tail, budget=knob)


METHODS: dict[str, tuple[float, ...]] = {
    "dense": (0.0,),
    "S2O": (0.9, 0.8, 0.7, 0.5, 0.3),
    "S2O, tail dropped": (0.9, 0.8, 0.7, 0.5, 0.3),
    "PBS-Attn": (0.7, 0.8, 0.9, 0.95),
    "PBS-Attn, shares of the prefix alone": (0.6, 0.7, 0.78, 0.85),
    "XAttention": (0.7, 0.8, 0.9, 0.95),
    "block mean": (0.7, 0.8, 0.9, 0.95),
}


class _Answered(TorchFunctionMode):
    """Answers causal `F.scaled_dot_product_attention` by an `Attention`, and counts what it read.

    Args:
        attention: the answer.
        dtype: of its operands; the model goes on in its own.
    """

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention, self.dtype, self.pairs, self.visible = attention, dtype, 0, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if not kwargs.get("is_causal") or kwargs.get("attn_mask") is not None:
            raise ValueError("only causal attention without a mask is answered here")
        output, pairs, visible = self.attention(*(x.to(self.dtype) for x in args[:3]))
        self.pairs, self.visible = self.pairs + pairs, self.visible + visible
        return output.to(args[0].dtype)


# ---------------------------------------------------------------- measuring


@dataclass
class Quality:
    """What a method at one threshold gives; losses in nats per token, one of each sequence."""

    method: str
    knob: float
    density: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    recalled: int = 0
    asked: int = 0


def answered(
    model: tiny_lm.TinyLM, tokens: Tensor, attention: Attention, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """What the output head reads, (S, width), of tokens (S,) whose attention `attention` answers, and its density."""
    with _Answered(attention, dtype) as counted:
        hidden = model.hidden(tokens[None])[0]
    return hidden, counted.pairs / counted.visible


@torch.no_grad()
def run(
    language: Language, planted: Planted, attention: Attention, device: str, dtype: torch.dtype = torch.float32
) -> tuple[float, float, int]:
    """(density, loss over the text's own tokens, keys recalled) of one sequence; attention alone runs in `dtype`."""
    tokens = planted.tokens.to(device)
    hidden, density = answered(language.model, tokens, attention, dtype)
    hidden = hidden[:-1]
    targets, head = tokens[1:], language.model.embedding.weight
    loss, right = torch.zeros((), dtype=torch.float64), torch.empty(targets.numel(), dtype=torch.bool)
    for i in range(0, targets.numel(), _CHUNK):
        part = slice(i, i + _CHUNK)
        logits = F.linear(hidden[part], head).float()
        losses = F.cross_entropy(logits, targets[part], reduction="none").cpu()
        loss += losses[planted.text[1:][part]].double().sum()
        right[part] = (logits.argmax(dim=1) == targets[part]).cpu()
    recalled = sum(bool(right[answer - 1].all()) for answer in planted.answers)
    return density, float(loss / planted.text[1:].sum()), recalled
