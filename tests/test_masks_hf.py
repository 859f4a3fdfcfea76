"""Masks of unmodified Hugging Face models: what their compiled graphs build is lifted and equals the mask.

Attention is replaced, on the Dynamo graph, by an operator that is opaque to AOTAutograd, so that the
mask reaches the joint graph as it would in front of `s2o::attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mask_tracing import Run, predicate, seen
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table

from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes.masks import LiftedMask, MaskLifter

transformers = pytest.importorskip("transformers")

LIBRARY = "mask_probe"
torch.library.define(
    f"{LIBRARY}::attention", "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor"
)


@torch.library.impl(f"{LIBRARY}::attention", "CompositeExplicitAutograd")
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).nan_to_num() @ v).to(q.dtype)


@torch.library.register_fake(f"{LIBRARY}::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*(torch.zeros_like(x) for x in ctx.saved_tensors), None, None, None)


torch.library.register_autograd(
    f"{LIBRARY}::attention", _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3])
)
PROBE = torch.ops.mask_probe.attention.default


@dataclasses.dataclass
class Found:
    """The mask of one attention: how it was lifted, or why not; None when there was no mask tensor."""

    lifted: LiftedMask | str | None
    mask: fx.Node | None
    shape: tuple[Any, ...]


@dataclasses.dataclass
class Probe:
    """A compile backend that lifts every mask and checks the predicates whenever the graph runs."""

    found: list[Found] = dataclasses.field(default_factory=list)
    checked: int = 0

    def backend(self) -> Any:
        common = {"decompositions": select_decomp_table(), "bw_compiler": lambda gm, _: gm}
        aot = aot_autograd(
            fw_compiler=functools.partial(self._compile, lift=False),
            inference_compiler=functools.partial(self._compile, lift=True),
            partition_fn=self._partition,
            **common,
        )

        def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            for node in gm.graph.find_nodes(
                op="call_function", target=torch.nn.functional.scaled_dot_product_attention
            ):
                q, k, v, *rest = node.args
                given = {**dict(zip(("attn_mask", "dropout_p", "is_causal", "scale"), rest)), **node.kwargs}  # noqa: B905
                scale = given.get("scale") or q.meta["example_value"].shape[-1] ** -0.5
                args = (q, k, v, given.get("attn_mask"), given.get("is_causal", False), scale)
                node.target, node.args, node.kwargs = PROBE, args, {}
            gm.recompile()
            return aot(gm, inputs)

        return compile_graph

    def _partition(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        self._lift(joint.graph)
        return default_partition(joint, inputs, **options)

    def _lift(self, graph: fx.Graph) -> None:
        lifter = MaskLifter(graph)
        for node in graph.find_nodes(op="call_function", target=PROBE):
            q, k, _, mask, *_ = node.args
            shape = (*q.meta["val"].shape[:3], k.meta["val"].shape[2])
            lifted = None
            if mask is not None:
                kind = "visible" if mask.meta["val"].dtype == torch.bool else "additive"
                lifted = lifter.lift_node(mask, kind, shape, MaskSpec())
            self.found.append(Found(lifted, mask, shape))

    def _compile(self, gm: fx.GraphModule, inputs: Any, lift: bool) -> Callable[..., Any]:
        start = len(self.found)
        if lift:
            self._lift(gm.graph)
        # A training graph was lifted before partitioning, which keeps the names of nodes.
        mine = self.found[start:] if lift else list(self.found)

        def run(*args: Any) -> Any:
            values = Run(gm, args)
            named = {node.name: value for node, value in values.env.items()}
            probes = gm.graph.find_nodes(op="call_function", target=PROBE)
            for found, node in zip(mine[-len(probes) :], probes, strict=True):
                if isinstance(found.lifted, LiftedMask):
                    q, k, _, mask, *_ = (named[a.name] if isinstance(a, fx.Node) else a for a in node.args)
                    sizes = (q.shape[0], q.shape[2], k.shape[2])
                    kind = "visible" if mask.dtype == torch.bool else "additive"
                    actual = seen(mask, kind).expand(sizes[0], -1, *sizes[1:])
                    assert torch.equal(
                        predicate(found.lifted, lambda leaf: named[leaf.name], sizes).expand_as(actual), actual
                    )
                    self.checked += 1
            (output,) = gm.graph.find_nodes(op="output")
            return fx.node.map_arg(output.args[0], lambda node: named[node.name])

        return run

    def terms(self) -> list[Any]:
        """What each mask became: terms, a reason, or None without a mask."""
        return [one.lifted.spec.terms() if isinstance(one.lifted, LiftedMask) else one.lifted for one in self.found]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


COMMON = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
ONE = {**COMMON, "num_hidden_layers": 1, "intermediate_size": 48}
GQA = {**ONE, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "qwen3": lambda: transformers.Qwen3Config(**GQA),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**GQA, "num_hidden_layers": 2}, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **TOKENS,
    ),
    "bert": lambda: transformers.BertConfig(
        **ONE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **{**ONE, "num_hidden_layers": 2}, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1,
        sep_token_id=2, **TOKENS,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**GQA, "num_hidden_layers": 2}, sliding_window=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], **TOKENS,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0
    ),
}  # fmt: skip
CAUSAL, WINDOW, PADDING = "causal", "window(k - q >= -7)", "keys(L0[b, k] != 0)"
# Terms of every layer, apart from padding.
BANDS: dict[str, list[list[str]]] = {
    "llama": [[CAUSAL]],
    "qwen3": [[CAUSAL]],
    "mistral": [[CAUSAL, WINDOW]],
    "gemma3": [[CAUSAL, WINDOW], [CAUSAL]],
    "gpt2": [[CAUSAL]],
    "bert": [[]],
    "modernbert": [[], ["k - q <= 4", "window(k - q >= -4)"]],
}


def build(name: str, implementation: str = "sdpa") -> Any:
    """A tiny random model without its head."""
    model = transformers.T5EncoderModel if name == "t5" else transformers.AutoModel.from_config
    return model(CONFIGS[name](), **({} if name == "t5" else {"attn_implementation": implementation}))


def batch(padded: bool, length: int = 12) -> dict[str, Tensor]:
    """Two rows, one of them padded on the left."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": torch.randint(3, 99, (2, length))}
    return {**inputs, "attention_mask": mask} if padded else inputs


def run(name: str, inputs: dict[str, Any], train: bool = False, dynamic: bool = False, **options: Any) -> Probe:
    """Compiles and runs a model once; its predicates are compared with its masks on the way."""
    probe = Probe()
    compiled = torch.compile(build(name, **options).train(train), backend=probe.backend(), dynamic=dynamic)
    with torch.set_grad_enabled(train):
        compiled(**inputs)
    assert probe.checked == sum(isinstance(one.lifted, LiftedMask) for one in probe.found)
    return probe


def _decoder(name: str) -> dict[str, Any]:
    return {} if name in ("bert", "modernbert", "t5") else {"use_cache": False}


@pytest.mark.parametrize("name", list(BANDS))
def test_masks_with_padding(name: str) -> None:
    probe = run(name, {**batch(padded=True), **_decoder(name)})
    assert probe.terms() == [[*band, PADDING] for band in BANDS[name]]
    for one in probe.found:
        assert isinstance(one.lifted, LiftedMask)
        assert [leaf.op for leaf in one.lifted.leaves] == ["placeholder"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_masks_without_padding_hold_no_tensor(name: str) -> None:
    """Detection of packed documents from position ids that are an arange is proved to find none."""
    probe = run(name, {**batch(padded=False), **_decoder(name)})
    bands = [[CAUSAL]] if name == "llama" else BANDS[name]
    assert [terms or [] for terms in probe.terms()] == bands


def test_training_graph() -> None:
    probe = run("mistral", {**batch(padded=True), "use_cache": False}, train=True)
    assert probe.terms() == [[CAUSAL, WINDOW, PADDING]]


def test_dynamic_shapes() -> None:
    probe = run("mistral", {**batch(padded=True), "use_cache": False}, dynamic=True)
    assert probe.terms() == [[CAUSAL, WINDOW, PADDING]]


def test_packed_position_ids() -> None:
    documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]])
    probe = run("llama", {**batch(padded=False), "position_ids": documents, "use_cache": False})
    (terms,) = probe.terms()
    assert "segments(L0[b, q] == L0[b, k])" in terms
    assert CAUSAL in terms or any("at_most" in term for term in terms)


def test_decoding_with_a_growing_cache() -> None:
    probe, model, inputs = Probe(), build("llama").eval(), batch(padded=True)
    cache, mask = transformers.DynamicCache(config=model.config), inputs["attention_mask"]
    compiled = torch.compile(model, backend=probe.backend(), dynamic=True)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for _ in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            compiled(input_ids=torch.ones(2, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
    assert probe.checked == 2
    assert probe.terms() == [[PADDING]]  # k <= past is proved, the keys being past + 1


def test_static_cache() -> None:
    probe, model, inputs = Probe(), build("llama").eval(), batch(padded=True)
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    compiled = torch.compile(model, backend=probe.backend())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        compiled(input_ids=torch.ones(2, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
    assert probe.checked == 1
    (found,) = probe.found
    assert isinstance(found.lifted, LiftedMask), found.lifted
    assert all(leaf.op == "placeholder" for leaf in found.lifted.leaves)


@pytest.fixture
def eager_masks() -> Iterator[str]:
    """An attention implementation of our own, with the additive masks that eager attention gets."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return torch.ops.mask_probe.attention(q, k, v, mask, False, scaling).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("mask_probe", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("mask_probe", eager_mask)
    yield "mask_probe"
    del ALL_ATTENTION_FUNCTIONS._global_mapping["mask_probe"]
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["mask_probe"]


def test_additive_masks_of_gpt_oss(eager_masks: str) -> None:
    """finfo.min is not -inf: a row that sees nothing, such as a padded query, averages over all keys."""
    probe = run("gpt_oss", {**batch(padded=True), "use_cache": False}, implementation=eager_masks)
    assert probe.terms() == [[CAUSAL, WINDOW, PADDING], [CAUSAL, PADDING]]
    assert [one.lifted.spec.empty for one in probe.found if isinstance(one.lifted, LiftedMask)] == [
        "shifted",
        "shifted",
    ]


def test_bias_of_t5_stays_a_tensor() -> None:
    (reason,) = run("t5", batch(padded=True)).terms()
    assert isinstance(reason, str)
    assert "embedding" in reason and "floating-point values that only run time knows" in reason, reason
