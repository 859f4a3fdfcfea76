"""What s2o does to the mixtures of experts in unmodified Hugging Face models: tiny random ones, on the CPU.

    python examples/coverage_moe.py                              # every model, a few minutes
    python examples/coverage_moe.py --models mixtral --markdown

Each model runs in eager mode and compiled with `experts=True`, float32, in evaluation, in training (forward and
backward) and in `generate()` (a prefill and five steps), with the experts implementation that transformers picks for
compiled code, with batched products, and in Python loops after `s2o_inductor.prepare`. Differences are the largest
from eager mode: of logits absolute, of gradients as a share of the largest one. The exit status is 1 when a site was
not rewritten, a difference is above 1e-4, or other tokens were generated.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import s2o_inductor

BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
LATENT_ATTENTION = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
# Configuration class and what differs from BASE; None leaves a field out.
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "nemotron_h, latent": (
        "NemotronHConfig",
        {"num_hidden_layers": None, "layers_block_type": ["mamba", "moe", "attention", "moe"], "head_dim": 12,
         "mamba_num_heads": 4, "mamba_head_dim": 24, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8,
         "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_latent_size": 24,
         "moe_shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**EIGHT, "head_dim": 12}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, **LATENT_ATTENTION}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 12, "intermediate_size_mlp": 64,
         "interleave_moe_layer_step": 1, "attention_chunk_size": 32},
    ),
    "glm4_moe": ("Glm4MoeConfig", {**DEEPSEEK, "head_dim": 12}),
    "qwen2_moe": ("Qwen2MoeConfig", {**EIGHT, "shared_expert_intermediate_size": 32}),
    "phimoe": (
        "PhimoeConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0,
         "moe_num_shared_experts": 1},
    ),
    "dots1": ("Dots1Config", DEEPSEEK),
    "jamba": (
        "JambaConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "expert_layer_period": 1, "expert_layer_offset": 0,
         "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    ),
    "minimax": ("MiniMaxConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 12}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 8, "moe_topk": 2, "head_dim": 12}),
    "dbrx": (
        "DbrxConfig",
        {"hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
         "num_key_value_heads": None, "max_position_embeddings": None, "d_model": 48, "n_heads": 4, "n_layers": 2,
         "max_seq_len": 64, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
         "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 48}},
    ),
    "jetmoe": (
        "JetMoeConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 12},
    ),
}  # fmt: skip
FORMS = ("grouped_mm", "batched_mm", "eager")
# Models with one way of their own: dense products that a graph holds, or a loop.
OWN_FORM = {"llama4": "grouped_mm", "dbrx": "eager", "jetmoe": "eager"}


def build(name: str, form: str) -> nn.Module:
    """A model with random weights; a form that it does not have leaves what it has."""
    config_class, fields = MODELS[name]
    merged = {key: value for key, value in {**BASE, **fields}.items() if value is not None or key == "eos_token_id"}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**merged)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad(), contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation(form)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():  # weights that the architecture leaves at zero would hide an error
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@dataclass
class Row:
    """One model in one form."""

    model: str
    form: str
    sites: int = 0
    rewritten: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    logits: float = 0.0
    gradients: float = 0.0
    tokens: str = "-"
    note: str = ""

    @property
    def passed(self) -> bool:
        exact = self.logits < 1e-4 and self.gradients < 1e-4 and self.tokens != "DIFFER"
        return not self.note and exact and 0 < self.rewritten == self.sites


@contextlib.contextmanager
def calling(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`model.generate` calls what stands in the instance."""
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def run(model: nn.Module, forward: Callable[..., Any]) -> dict[str, Tensor]:
    """Logits in evaluation, logits and gradients in training, and generated tokens."""
    tokens = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = {"logits": forward(input_ids=tokens, use_cache=False).logits}
    model.train()
    model.zero_grad()
    logits = forward(input_ids=tokens, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found["trained"] = logits.detach()
    # A loop leaves experts without tokens without a gradient, which means zero.
    found |= {
        f"grad {name}": torch.zeros_like(x) if x.grad is None else x.grad.clone()
        for name, x in model.named_parameters()
    }
    model.eval()
    with calling(model, forward):
        found["tokens"] = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]
    return found


def measure(name: str, form: str, inner: str) -> Row:
    row = Row(name, form)
    model = build(name, form)
    try:
        expected = run(model, model.forward)
    except Exception as error:  # not ours: the model does not run in this form
        row.note = f"not in eager mode either: {type(error).__name__}"
        return row
    if form == "eager":
        prepared = s2o_inductor.prepare(model)
        row.reasons += Counter(entry.reason for entry in prepared.declined)
        if not prepared.entries:
            row.note = "no loop"
            return row
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="s2o", options={"inner": inner, "experts": True})
    try:
        actual = run(model, compiled)
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        return row
    sites = [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "moe"]
    row.sites, row.rewritten = len(sites), sum(site["status"] == "rewritten" for site in sites)
    row.reasons += Counter(site["reason"] for site in sites if site["reason"])
    grads = [key for key in expected if key.startswith("grad ")]
    scale = max(float(expected[key].abs().max()) for key in grads)
    row.gradients = max(float((actual[key] - expected[key]).abs().max()) for key in grads) / scale
    row.logits = max(float((actual[key] - expected[key]).abs().max()) for key in ("logits", "trained"))
    row.tokens = "equal" if torch.equal(actual["tokens"], expected["tokens"]) else "DIFFER"
    return row


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| model | experts | sites rewritten | logits | gradients | generated | why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        why = row.note or "; ".join(f"{reason} ({count})" for reason, count in row.reasons.items()) or "-"
        form = "loop, prepared" if row.form == "eager" else "dense" if row.model in OWN_FORM else row.form
        numbers = f"{row.logits:.0e} | {row.gradients:.0e} | {row.tokens}" if not row.note else "- | - | -"
        lines.append(f"| {row.model} | {form} | {row.rewritten} of {row.sites} | {numbers} | {why} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--inner", default="aot_eager", choices=("aot_eager", "inductor"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity(logging.CRITICAL)
    rows = []
    for name in arguments.models:
        for form in arguments.forms if name not in OWN_FORM else (OWN_FORM[name],):
            rows.append(measure(name, form, arguments.inner))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    return int(any(not row.passed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
