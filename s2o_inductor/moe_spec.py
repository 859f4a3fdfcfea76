"""What an expert computes and where its routing weight enters, without its tensors.

An `ExpertSpec` is what the finder reads out of a graph, what `s2o::moe_experts` carries as one string,
and what the kernels run. For a row x of the expert's input, with W1, b1, W2, b2 of that expert:

    gate "none"      h = act(min(a, limit)),                                      a = W1 x + b1
    otherwise        h = act(min(g, limit)) * (clamp(u, -limit, limit) + shift),  (g, u) = W1 x + b1
    y = W2 h + b2

The layouts of (g, u) are those of public checkpoints: halves (Qwen3-MoE, Mixtral, DeepSeek-V3),
interleaved columns (GPT-OSS), two tensors (torchtitan). LatentMoE (arXiv 2601.18089) is the same
with rows of the latent width: its two projections stay outside.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Literal, get_args

Activation = Literal["identity", "relu", "relu2", "silu", "gelu", "gelu_tanh"]
Gate = Literal["none", "half", "half_swapped", "interleaved", "separate"]
Score = Literal["output", "hidden", "input"]


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The formula of an expert.

    Attributes:
        activation: "relu2" is relu(x)^2; "silu" is x * sigmoid(alpha * x); "gelu" is exact, "gelu_tanh" its
            tanh approximation.
        gate: how the first product holds gate and up: "none" (one half, no gate), "half" (gate, then up),
            "half_swapped" (up, then gate), "interleaved" (gate in even columns, up in odd ones),
            "separate" (a tensor of weights for each).
        score: what the routing weight multiplies: the expert's "output" y, its "hidden" h, or its
            "input" x. "hidden" equals "output" when there is no b2; "input" equals neither.
        transposed: weights are stored (experts, in, out) rather than (experts, out, in).
        alpha: slope inside the sigmoid of silu.
        limit: bound of the first product, None for none.
        shift: added to the up half.
    """

    activation: Activation = "silu"
    gate: Gate = "none"
    score: Score = "output"
    transposed: bool = False
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("activation", Activation), ("gate", Gate), ("score", Score)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        if self.alpha == 0.0:
            raise ValueError("alpha must not be 0; use activation 'identity' with weights of half the size")
        if self.limit is not None and not self.limit > 0.0:
            raise ValueError(f"limit must be positive, or None for none; got {self.limit}")
        if self.gate == "none" and self.shift:
            raise ValueError(f"shift is added to the up half, and gate 'none' has none; got shift={self.shift}")

    @property
    def halves(self) -> int:
        """How many columns of the first product make one of the hidden ones: 1 plain, 2 gated."""
        return 1 if self.gate == "none" else 2

    def text(self) -> str:
        """The spec as a canonical string: fields at their default are left out."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return json.dumps(fields, sort_keys=True) if fields else ""

    def describe(self) -> str:
        """The formula in a few words, for reports."""
        words = [self.activation if self.alpha == 1.0 else f"{self.activation}({self.alpha:g} x)"]
        words += [] if self.gate == "none" else [f"gate {self.gate.replace('_', ' ')}"]
        words += [] if self.limit is None else [f"clamp {self.limit:g}"]
        words += [f"up + {self.shift:g}"] if self.shift else []
        return ", ".join([*words, f"weight on {self.score}"])


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ExpertSpec:
    """The inverse of `ExpertSpec.text`.

    Raises:
        ValueError: the text is not one of a spec.
    """
    try:
        return ExpertSpec(**json.loads(text)) if text else ExpertSpec()
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not the text of an expert spec: {text!r} ({error})") from None
