"""The attention finder on models: Hugging Face code as it is, nanoGPT, autocast, checkpointing, generation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import assert_means_what_it_says, capture, capture_all
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from s2o_inductor.passes.attention import find_attention
from s2o_inductor.passes.records import AttentionSite, Declined

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))


def find_all(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[list[AttentionSite], list[Declined]]:
    """Sites and refusals of all graphs of a call, each record checked against what its graph computes."""
    sites: list[AttentionSite] = []
    declined: list[Declined] = []
    for gm, inputs in capture_all(function, *args, **options):
        before = str(gm.graph)
        found = find_attention(gm.graph)
        assert str(gm.graph) == before
        with torch.no_grad():
            assert_means_what_it_says(gm, found[0], inputs)
        sites += found[0]
        declined += found[1]
    return sites, declined


# ---------------------------------------------------------------------------- Hugging Face, written out


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "bert", "gpt_oss", "deepseek_v3"])
def test_written_out_in_hugging_face(name: str, train: bool) -> None:
    pytest.importorskip("transformers")
    import hf_models

    model = hf_models.build(name, "eager", experts="batched_mm").train(train)
    kwargs = hf_models.inputs(name, "left")
    with torch.set_grad_enabled(train):
        sites, declined = find_all(lambda: model(**kwargs))
    assert not declined
    assert [site.where.count("attn") + site.where.count("attention") > 0 for site in sites] == [True, True]
    for site in sites:
        config = model.config
        assert len(site.masks) == 1
        assert site.masks[0].kind == "additive"
        assert site.empty == ("zero" if name == "gpt_oss" else "nan")
        assert (site.sinks is not None) == (name == "gpt_oss")
        shared = getattr(config, "num_key_value_heads", config.num_attention_heads)
        assert site.k.node.meta["example_value"].shape[1] == shared
        assert site.k.steps == site.v.steps == ()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_learned_bias_of_t5(train: bool) -> None:
    pytest.importorskip("transformers")
    import hf_models

    model = hf_models.build("t5", "eager").train(train)
    kwargs = hf_models.inputs("t5", "right")
    with torch.set_grad_enabled(train):
        sites, declined = find_all(lambda: model(**kwargs))
    assert len(sites) + len(declined) == 6
    assert len(sites) >= (2 if train else 6)  # cross attention has no learned bias
    assert {refusal.reason for refusal in declined} <= {"the additive bias needs a gradient"}


SMALL = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
OTHERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "Bloom": ({"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}, None),
    "GPTJ": ({"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, None),
    "OPT": (SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64}, None),
    "Falcon": (SMALL, None),
    "Gemma2": (SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}, "soft-capped"),
    "Mpt": ({"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4}, "a finite fill value"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_in_hugging_face(name: str) -> None:
    """Products of 3-D tensors with a bias inside, scales before the view, and what must be declined."""
    transformers = pytest.importorskip("transformers")
    sizes, reason = OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.randint(3, 128, (2, 12))
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    with torch.no_grad():
        sites, declined = find_all(lambda: model(input_ids=ids, attention_mask=padding, use_cache=False))
    if reason is None:
        assert len(sites) == 2
        assert not declined
    else:
        assert not sites
        assert len(declined) == 2
        assert all(reason in refusal.reason for refusal in declined)


# ------------------------------------------------------------------------------------------- nanoGPT


class SelfAttention(nn.Module):
    """Causal self-attention in the manner of nanoGPT, with the ways of masking seen in its descendants."""

    def __init__(self, masking: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.masking, self.heads, self.dropout = masking, 4, dropout
        self.c_attn = nn.Linear(32, 96)
        self.c_proj = nn.Linear(32, 32)
        self.attn_dropout = nn.Dropout(dropout)
        self.register_buffer("bias", torch.ones(64, 64).tril().view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C)."""
        b, t, c = x.size()
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in self.c_attn(x).split(c, dim=2)
        )
        if self.masking == "call":
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            if self.masking == "buffer":
                att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            elif self.masking == "triu":
                att = att + torch.full((t, t), float("-inf")).triu(1)
            else:
                att = torch.where(torch.ones(t, t, dtype=torch.bool).tril(), att, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


@pytest.mark.parametrize("masking", ["call", "buffer", "triu", "where"])
@pytest.mark.parametrize("mode", ["eval", "train", "autocast", "dropout"])
def test_nanogpt(masking: str, mode: str) -> None:
    module = SelfAttention(masking, 0.1 if mode == "dropout" else 0.0).train(mode != "eval")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        sites, declined = find_all(module, torch.randn(2, 12, 32))
    assert not declined
    assert len(sites) == 1
    assert sites[0].scale == pytest.approx(8**-0.5)
    assert sites[0].causal is (masking == "call")
    assert sites[0].dropout == (0.1 if mode == "dropout" else 0.0)
    assert sites[0].q.node.meta["example_value"].shape == (2, 4, 12, 8)


def test_a_name_that_users_know() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([SelfAttention("triu"), SelfAttention("call")])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.softmax(-1)

    (written, called), _ = find_all(Model(), torch.randn(2, 12, 32))
    assert (written.where, called.where) == ("blocks.0", "blocks.1")
    file = Path(__file__).name
    (site,), _ = find_all(lambda x: F.scaled_dot_product_attention(x, x, x), torch.randn(2, 4, 12, 8))
    assert site.where.startswith(f"{file}:")


# ------------------------------------------------------------------------------ autocast and gradients


def test_autocast_converts_operands() -> None:
    """What autocast does on the way into the products stands in the steps: nothing in the graph says it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q * 0.5, k, v.bfloat16()), (q @ k.mT * 0.3).softmax(-1) @ v

    q, k, v = (torch.randn(2, 4, 12, 8) for _ in range(3))
    (called, written), declined = find_all(attend, q, k, v)
    assert not declined
    assert called.q.steps == called.k.steps == written.q.steps == written.v.steps == (("to", (torch.bfloat16,)),)
    assert called.v.steps == ()


def test_up_casts_are_kept_unless_weights_are_cast_down() -> None:
    def attend(down: bool) -> Callable[..., Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q.float() @ k.float().mT).softmax(-1)
            return weights.to(q.dtype) @ v if down else weights @ v.float()

        return function

    qkv = [torch.randn(2, 4, 12, 8).bfloat16() for _ in range(3)]
    (low,), _ = find_all(attend(True), *qkv)
    (high,), _ = find_all(attend(False), *qkv)
    assert low.q.node.op == low.k.node.op == low.v.node.op == "placeholder"
    assert high.q.node.target == high.k.node.target == high.v.node.target == "float"


def test_gradient_mode_of_something_else_does_not_matter() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        with torch.no_grad():
            shift = v.mean()
        return scores.softmax(-1) @ v + shift

    (site,), declined = find_all(attend, *(torch.randn(2, 4, 12, 8, requires_grad=True) for _ in range(3)))
    assert not declined
    assert site.output.name.startswith("matmul")


def test_a_detached_operand_stays_detached() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = k.repeat_interleave(2, dim=1) * 0.5
        return (q @ frozen.mT).softmax(-1) @ v.detach()

    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 4, 12, 8)
    (site,), _ = find_all(attend, *(x.requires_grad_() for x in (q, k, v)))
    assert site.k.node.target != "repeat_interleave" and site.k.node.op != "placeholder"
    assert site.v.node.target == "detach"
    assert site.scale == 1.0


# ------------------------------------------------------------------------------------- other graphs


def test_bodies_of_checkpointed_regions() -> None:
    module = SelfAttention("triu")
    gm, _ = capture(lambda x: checkpoint(module, x, use_reentrant=False), torch.randn(2, 12, 32, requires_grad=True))
    assert find_attention(gm.graph) == ([], [])
    bodies = [inner.graph for inner in gm.modules() if isinstance(inner, fx.GraphModule) and inner is not gm]
    (site,), declined = find_attention(bodies[0])
    assert not declined
    assert site.scale == pytest.approx(8**-0.5)


def test_one_site_feeding_another() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT).softmax(-1) @ v
        return F.scaled_dot_product_attention(first, k, first)

    (first, second), declined = find_all(attend, *(torch.randn(2, 4, 12, 8) for _ in range(3)))
    assert not declined
    assert second.q.node is second.v.node is first.output


def test_keys_and_values_shared_by_two_sites() -> None:
    """Cross-layer sharing: the repeated keys have two readers, so neither site owns the copy."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(2, 2, 2, 12, 8).reshape(2, 4, 12, 8) for x in (k, v))
        first = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(first.cos(), k, v)

    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    sites, declined = find_all(attend, q, k, k.clone())
    assert not declined
    assert [site.region for site in sites] == [(site.output,) for site in sites]
    assert all(site.k.node.op == "placeholder" for site in sites)


def test_a_view_of_the_output_that_counts_on_its_strides() -> None:
    def contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) @ v).view(8, 12, 8)

    def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, 12, 32)

    qkv = [torch.randn(2, 4, 12, 8) for _ in range(3)]
    (site,), _ = find_all(contiguous, *qkv)
    assert site.out_steps == (("contiguous", ()),)
    sites, declined = find_all(heads_last, *qkv)
    strides = [site.output.meta["example_value"].stride() for site in sites]
    assert not declined and strides == [(384, 8, 32, 1)]
    assert sites[0].out_steps == ()


def test_the_fused_encoder_layer_is_declined() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    with torch.no_grad():
        sites, declined = find_all(layer, torch.randn(2, 12, 32))
    assert not sites
    assert [refusal.reason.split(";")[0] for refusal in declined] == ["fused encoder layer"]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("function", [F.scaled_dot_product_attention, written_out])
def test_tensors_that_are_not_plain(function: Callable[..., Tensor]) -> None:
    """Without metadata, or with another kind of tensor, a candidate is declined and never guessed at."""
    qkv = [torch.randn(2, 4, 12, 8) for _ in range(3)]
    gm, _ = capture(lambda q, k, v: function(q, k, v), *qkv)
    values = next(node for node in gm.graph.nodes if node.name == "l_v_")
    shape = values.meta.pop("example_value").shape

    def reason() -> str:
        sites, declined = find_attention(gm.graph)
        assert not sites
        return declined[0].reason if declined else "no candidate"

    assert "not known at compile time" in reason() or reason() == "no candidate"

    class Marked(Tensor):
        pass

    values.meta["example_value"] = torch.empty(shape).as_subclass(Marked)
    assert "Marked" in reason()
    values.meta["example_value"] = torch.empty(shape, layout=torch.sparse_coo)
    assert "sparse" in reason()
    for node in gm.graph.nodes:
        if node.op != "output" and "example_value" in node.meta:
            node.meta["example_value"] = torch.empty(node.meta["example_value"].shape, dtype=torch.complex64)
    assert reason() == "attention in torch.complex64 is not supported"


def test_a_functorch_transform_is_declined() -> None:
    qkv = [torch.randn(3, 2, 4, 12, 8) for _ in range(3)]
    (gm, _), *_ = capture_all(lambda q, k, v: torch.vmap(F.scaled_dot_product_attention)(q, k, v), *qkv)
    sites, declined = find_attention(gm.graph)
    assert not sites
    assert all("functorch" in refusal.reason for refusal in declined)
