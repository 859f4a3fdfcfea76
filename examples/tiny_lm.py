"""A small Llama-like language model over bytes, written the way such models usually are, and the text it reads.

Nothing here knows about s2o. The model is plain PyTorch: RMSNorm, rotary positions, grouped-query
attention through `F.scaled_dot_product_attention`, SwiGLU. Its text is the Python source that every
Python installation holds, with planted `key_1a2b = 123456 ... assert key_1a2b == 123456` lines, so
that predicting well takes looking far back. The vocabulary is the 256 byte values.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECKPOINT = Path(__file__).parent / "data" / "tiny_lm.pt"


@dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are those of the committed checkpoint (7.8 M parameters)."""

    width: int = 384
    layers: int = 6
    query_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 768
    rope_theta: float = 500_000.0
    vocabulary: int = 256


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021): x is (B, H, S, D), cos and sin are (S, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention: query head i reads key/value head i // (query_heads / kv_heads)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.query_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.query_heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), Attention(config)
        self.feed_forward_norm, self.feed_forward = RMSNorm(config.width), FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class TinyLM(nn.Module):
    """The language model; the output head shares its weight with the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):  # the two that write to the residual stream start smaller, as in GPT-2
                shrink = (2 * config.layers) ** -0.5 if name.endswith((".o", ".down")) else 1.0
                nn.init.normal_(module.weight, std=shrink * module.in_features**-0.5)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the next byte.

        Args:
            tokens: (B, S) int64 byte values.
            attention_mask: (B, S), 1 where a token is text and 0 where it is padding, as Hugging Face
                models take it; like them, this one makes a 4-D boolean mask of it. None: all is text.

        Returns:
            (B, S, 256) logits in the dtype of the weights.
        """
        return F.linear(self.hidden(tokens, attention_mask), self.embedding.weight)

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the output head reads, (B, S, width), for the arguments of `forward`."""
        config, positions = self.config, torch.arange(tokens.shape[1], device=tokens.device)
        steps = torch.arange(0, config.head_dim, 2, device=tokens.device, dtype=torch.float32) / config.head_dim
        angles = positions.float()[:, None] * config.rope_theta**-steps
        cos, sin = angles.cos(), angles.sin()
        mask = None
        if attention_mask is not None:
            mask = (positions[:, None] >= positions) & attention_mask[:, None, None, :].bool()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        out: Tensor = self.norm(x)
        return out


# ---------------------------------------------------------------- checkpoint


def save_checkpoint(path: Path, model: TinyLM, notes: dict[str, Any]) -> None:
    """Writes the weights as int8, one float32 scale (row maximum / 127) per output row; norms stay float32."""
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        weight = weight.detach().float().cpu()
        if weight.dim() == 2:
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            weights[name + ".scale"], weight = scale, (weight / scale).round().to(torch.int8)
        weights[name] = weight
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": asdict(model.config), "weights": weights, "notes": notes}, path)


def load_checkpoint(path: Path = CHECKPOINT) -> tuple[TinyLM, dict[str, Any]]:
    """Reads what `save_checkpoint` wrote: the model, float32 on the CPU, in eval mode, and the notes."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model, weights = TinyLM(Config(**stored["config"])), stored["weights"]
    model.load_state_dict(
        {n: w.float() * weights.get(n + ".scale", 1.0) for n, w in weights.items() if not n.endswith(".scale")}
    )
    return model.eval(), stored["notes"]


# ---------------------------------------------------------------- text

# Not text that a reader of Python sees: code page tables, build files; site-packages is a root of its own.
_SKIPPED = {"encodings", "site-packages", "dist-packages", "__pycache__"}


def is_held_out(parts: tuple[str, ...]) -> bool:
    """Whether a module is kept from training: one name in 16, by hash, wherever on its dotted path the name is.

    Copies of a held-out module that other packages vendor have its name, so they are held out with it.
    """
    return any(hashlib.sha256(name.encode()).digest()[0] % 16 == 0 for name in parts)


def _modules(root: Path, held_out: bool) -> Iterator[Path]:
    """Python files under `root` on the asked side of the split, in an order that does not depend on the machine."""
    found = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and is_held_out(parts) == held_out and not (held_out and "test" in parts):
            found.append((hashlib.sha256("/".join(parts).encode()).digest(), file))
    return (file for _, file in sorted(found))


def load_text(held_out: bool, limit: int) -> bytes:
    """Up to `limit` bytes of Python source of this installation, one zero byte after each file.

    Held-out text is of the standard library alone, so that it is much the same on every machine.
    Training text is the standard library and what is installed in site-packages.
    """
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])] if held_out else [Path(paths["stdlib"]), Path(paths["purelib"])]
    text = bytearray()
    for file in (f for root in roots for f in _modules(root, held_out)):
        text += file.read_bytes() + b"\0"
        if len(text) >= limit:
            break
    if not text:
        raise FileNotFoundError(f"no Python source under {roots[0]}: this example reads the standard library's text")
    return bytes(text[:limit])


def to_tokens(rows: Sequence[bytes | bytearray]) -> Tensor:
    """(B, S) int64 byte values of B equally long rows."""
    return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows]).long()


# ---------------------------------------------------------------- key recall

SLOT = 64  # a planted line lies somewhere inside a slot of this many bytes, so that planted lines never overlap
ANSWER = 7  # bytes of a recall line that only its definition tells: six digits and the line's end


def _plant(row: bytearray, slot: int, line: bytes, rng: random.Random) -> None:
    start = slot * SLOT + rng.randrange(SLOT - len(line) + 1)
    row[start : start + len(line)] = line


def _key_lines(rng: random.Random) -> tuple[bytes, bytes]:
    key, value = rng.randrange(16**4), rng.randrange(10**6)
    return b"\nkey_%04x = %06d\n" % (key, value), b"\nassert key_%04x == %06d\n" % (key, value)


def plant_keys(row: bytearray, pairs: int, rng: random.Random) -> None:
    """Overwrites 2 * `pairs` places of `row` with keys and, anywhere later, the lines that recall them."""
    slots = rng.sample(range(len(row) // SLOT), 2 * pairs)
    for places in zip(slots[::2], slots[1::2], strict=True):
        for slot, line in zip(sorted(places), _key_lines(rng), strict=True):
            _plant(row, slot, line, rng)


def recall(
    logits_of: Callable[[Tensor], Tensor],
    text: bytes,
    length: int,
    count: int,
    device: str | torch.device,
    batch: int = 1,
) -> float:
    """Share of `count` sequences of `length` bytes whose last line is recalled without an error.

    Each sequence is held-out text with one key line at its own depth, evenly from the beginning to
    the end, three other key lines anywhere, and the recall line at the end. It counts when the
    argmax is right for all seven bytes that only the key line tells. `logits_of` maps (batch, length)
    tokens to (batch, length, 256) logits; `count` is rounded up to whole batches.
    """
    right, slots = 0, length // SLOT - 1
    count = -(-count // batch) * batch
    rows = []
    for i in range(count):
        rng = random.Random(i)
        start = rng.randrange(max(1, len(text) - length))
        row = bytearray(text[start : start + length])
        depth = i * slots // count
        for slot in rng.sample([s for s in range(slots) if s != depth], min(3, slots - 1)):
            _plant(row, slot, _key_lines(rng)[0], rng)
        definition, last = _key_lines(rng)
        _plant(row, depth, definition, rng)
        row[-len(last) :] = last
        rows.append(row)
    for first in range(0, count, batch):
        tokens = to_tokens(rows[first : first + batch]).to(device)
        with torch.no_grad():
            guess = logits_of(tokens)[:, -ANSWER - 1 : -1].argmax(-1)
        right += int((guess == tokens[:, -ANSWER:]).all(dim=1).sum())
    return right / count
