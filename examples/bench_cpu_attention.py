"""Times attention under a structured mask on CPU: torch's SDPA with the mask as a tensor against s2o::attention.

    python examples/bench_cpu_attention.py --threads 1

Neither side is charged for making its mask (a boolean tensor here, a plan there): models make it once for all
layers. Runs alternate, and the best of each is taken, so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_inductor import ops
from s2o_inductor.kernels import mask as masks
from s2o_inductor.mask_spec import MaskSpec


def best_times(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of the fastest of `repeats` alternating runs of each function, after one run to warm up."""
    best = [float("inf")] * len(functions)
    for repeat in range(repeats + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if repeat:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def ours(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """The output of `s2o::attention`."""
    return ops.attention(q, k, v, **mask)[0]


def train(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    """Forward and backward."""
    function(*(x.detach().requires_grad_() for x in (q, k, v))).backward(grad)


def cases(length: int, batch: int) -> dict[str, tuple[MaskSpec, list[Tensor]]]:
    """Specs with their leaves: a window of 512, padding on the right by a half, documents of 512 tokens."""
    lengths = torch.linspace(length, length // 2, batch).long()
    right = torch.arange(length) < lengths[:, None]
    documents = (torch.arange(length) // 512).expand(batch, length)
    return {
        "causal": (MaskSpec(upper="0"), []),
        "causal, 512 keys": (MaskSpec(lower="-511", upper="0"), []),
        "causal, right padding": (MaskSpec(upper="0", keys="L0[b, k]"), [right]),
        "causal, left padding": (MaskSpec(upper="0", keys="L0[b, k]"), [right.flip(1)]),
        "causal, documents": (MaskSpec(upper="0", equal=("L0[b, q]", "L0[b, k]")), [documents]),
        "right padding": (MaskSpec(keys="L0[b, k]"), [right]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 8], metavar=("QUERY", "KEY_VALUE"))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.dtype}, batch {args.batch}, heads {args.heads}, D {args.dim}, ", end="")
    print(f"{args.threads} threads; milliseconds, best of {args.repeats}")
    print(f"{'mask':24}{'S':>6}  {'SDPA':>8}{'s2o':>8}{'ratio':>7}   {'+backward':>9}{'s2o':>8}{'ratio':>7}")
    for length in args.lengths:
        for name, (spec, leaves) in cases(length, args.batch).items():
            q, k, v = (
                torch.randn(args.batch, length, heads, args.dim, dtype=getattr(torch, args.dtype)).transpose(1, 2)
                for heads in (args.heads[0], args.heads[1], args.heads[1])
            )
            facts = (args.batch, length, length, q.device)
            visible = masks.evaluate(spec, None, leaves, [], *facts)
            plan = () if spec.is_band else masks.plan(None, leaves, [], spec, *facts)
            grad = torch.randn_like(q)

            grouped = args.heads[0] != args.heads[1]
            attend = (
                functools.partial(scaled_dot_product_attention, attn_mask=visible, enable_gqa=grouped),
                functools.partial(ours, leaves=leaves, plan=plan, spec=spec.text()),
            )
            torch.testing.assert_close(attend[0](q, k, v), attend[1](q, k, v), atol=2e-2, rtol=2e-2)
            forward = best_times([functools.partial(f, q, k, v) for f in attend], args.repeats)
            both = best_times([functools.partial(train, f, q, k, v, grad) for f in attend], args.repeats)
            columns = []
            for theirs, own in (forward, both):
                columns.append(f"{theirs * 1e3:9.1f}{own * 1e3:8.1f}{theirs / own:6.2f}x")
            print(f"{name:24}{length:6} " + "   ".join(columns))


if __name__ == "__main__":
    main()
