"""Tiny random Hugging Face models of many architectures, and inputs for them: unmodified code, no download.

The sizes are the smallest at which every mask an architecture uses appears: sliding windows are
shorter than the sequence, and models that mix layer types have one layer of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 128
LENGTH = 24
WINDOW = 8

# GPT-2 and BERT have names of their own for the sizes.
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Larger than usual: attention far from uniform, so that a wrong mask or scale shows.
    "initializer_range": 0.1,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MIXED_LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """One architecture and how to call it.

    Attributes:
        config: name of its configuration class in `transformers`.
        sizes: arguments of that class.
        head: "CausalLM", "MaskedLM" or "Seq2SeqLM".
        sites: attention calls in one forward.
        dropout: its dropout arguments, whose defaults are above zero.
        implementations: values of `attn_implementation` that it supports on CPU.
        packed: whether it takes several documents in one row through `position_ids`.
        experts: whether it is a mixture of experts.
    """

    config: str
    sizes: Mapping[str, Any]
    head: str = "CausalLM"
    sites: int = 2
    dropout: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ("sdpa", "eager")
    packed: bool = True
    experts: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", _DECODER),
    "qwen3": Architecture("Qwen3Config", _DECODER | {"head_dim": 16}),
    "mistral": Architecture("MistralConfig", _DECODER | {"sliding_window": WINDOW}),
    "gemma3": Architecture("Gemma3TextConfig", _DECODER | _MIXED_LAYERS | {"head_dim": 16}),
    "gpt2": Architecture(
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.1,
        },
        dropout=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    ),
    "bert": Architecture(
        "BertConfig",
        {name: size for name, size in _DECODER.items() if name != "num_key_value_heads"},
        head="MaskedLM",
        dropout=("attention_probs_dropout_prob", "hidden_dropout_prob"),
        packed=False,
    ),
    "t5": Architecture(
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        head="Seq2SeqLM",
        sites=6,
        dropout=("dropout_rate",),
        packed=False,
    ),
    "gpt_oss": Architecture(
        "GptOssConfig",
        _DECODER | _MIXED_LAYERS | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        implementations=("eager",),  # attention sinks: transformers refuses "sdpa"
        packed=False,  # transformers 5.17 does not pass its position_ids to the mask
        experts=True,
    ),
    "mixtral": Architecture(
        "MixtralConfig", _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}, experts=True
    ),
    "qwen3_moe": Architecture("Qwen3MoeConfig", _DECODER | _MOE | {"head_dim": 16, "num_experts": 4}, experts=True),
    "deepseek_v3": Architecture(
        "DeepseekV3Config",
        _DECODER
        | _MOE
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        experts=True,
    ),
    "nemotron_h": Architecture(
        "NemotronHConfig",
        {name: size for name, size in (_DECODER | _MOE).items() if name != "num_hidden_layers"}
        | {
            "layers_block_type": ["mamba", "attention", "moe", "attention"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 48,
        },
        packed=False,  # a state-space layer runs over document boundaries
        experts=True,
    ),
}


def build(
    name: str, attention: str = "sdpa", *, experts: str | None = None, dropout: bool = False, seed: int = 0
) -> nn.Module:
    """A model with random weights, float32 on the CPU, in eval mode.

    Args:
        name: key of `ARCHITECTURES`.
        attention: "sdpa" or "eager", what transformers calls `attn_implementation`.
        experts: what transformers calls `experts_implementation`; None leaves its choice, grouped
            matrix products. Those cannot be trained under any torch.compile backend but in
            bfloat16: the gradient of the float32 fallback reads sizes from a tensor, which
            AOTAutograd refuses (transformers 5.17). "batched_mm" can.
        dropout: the architecture's default dropout instead of none.
        seed: of the weights.

    Raises:
        ValueError: an unknown architecture, or attention that it does not support.
    """
    import transformers

    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if attention not in architecture.implementations:
        raise ValueError(f"{name} supports attention {' or '.join(architecture.implementations)}; got {attention!r}")
    sizes = dict(architecture.sizes)
    if not dropout:
        sizes |= dict.fromkeys(architecture.dropout, 0.0)
    config = getattr(transformers, architecture.config)(**sizes)
    auto_class = getattr(transformers, f"AutoModelFor{architecture.head}")
    torch.manual_seed(seed)
    chosen = {"experts_implementation": experts} if architecture.experts and experts is not None else {}
    model: nn.Module = auto_class.from_config(config, attn_implementation=attention, **chosen)
    return model.eval()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    """(B, S) random token ids, none of them the padding id 0."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(side: str, batch: int = 2, length: int = LENGTH) -> Tensor:
    """(B, S) int64, 1 for text: the first row is full, each further row has five tokens more of padding on `side`."""
    position = torch.arange(length)
    pads = 5 * torch.arange(batch)[:, None]
    visible = position >= pads if side == "left" else position < length - pads
    return visible.long()


def inputs(name: str, padding: str | None = None) -> dict[str, Tensor]:
    """Keyword arguments of a forward: tokens and, with `padding` "left" or "right", masks."""
    ids = tokens()
    result = {"input_ids": ids}
    if padding is not None:
        result["attention_mask"] = padding_mask(padding)
        result["input_ids"] = ids * result["attention_mask"]
    if ARCHITECTURES[name].head == "Seq2SeqLM":
        result["decoder_input_ids"] = tokens(length=LENGTH - 8, seed=2)
        if padding is not None:
            result["decoder_attention_mask"] = padding_mask("right", length=LENGTH - 8)
    return result


def packed_inputs() -> dict[str, Any]:
    """Keyword arguments of a forward over several documents in each row, told by restarting `position_ids`."""
    first, second = torch.arange(LENGTH), torch.arange(LENGTH)
    for row, starts in ((first, (9,)), (second, (5, 17))):
        for start in starts:
            row[start:] = torch.arange(LENGTH - start)
    return {"input_ids": tokens(), "position_ids": torch.stack((first, second)), "use_cache": False}
