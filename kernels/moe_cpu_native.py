"""Routed experts in C++ on CPU, cpu_moe.cpp: all of a call with few rows per expert, what surrounds products otherwise.

A decoding step reads each matrix of the chosen experts once and does little with it, so it takes as long as
these take to come from memory. With a call of torch for each product it takes as long again. Where experts have many
rows torch's products are the fast ones, and only activations and sums are made here, in one pass each.

The library is compiled at the first call (see `native`). Without it, and for operands that it does not take, every
function here returns None, and callers have torch code.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, get_args

import torch
from torch import Tensor

from s2o_inductor.kernels import native
from s2o_inductor.kernels.moe_routing import Experts, PerExpert, Routing
from s2o_inductor.moe_spec import Activation, ExpertSpec, Gate

# Up to how many rows per expert, in the mean over rows, this is faster than a product of torch's for each expert: where
# a float32 matrix lies as (in, out), whose columns are apart; in general; and where an expert has so few bytes that a
# call of torch takes longer than what it does. BENCHMARKS.md, "Mixture of experts on CPU".
FEW_ACROSS, FEW, FEW_OF_SMALL, SMALL = 8.0, 24.0, 32.0, 2**18
_SCORED = ("input", "hidden", "output")


class _Weights(ctypes.Structure):
    """`Weights` of cpu_moe.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "table")),
        *((name, ctypes.c_int64) for name in ("expert", "out", "in")),
    ]


class _Formula(ctypes.Structure):
    """`Formula` of cpu_moe_hidden.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("activation", "gate")),
        *((name, ctypes.c_double) for name in ("alpha", "limit", "shift")),
    ]


class _Problem(ctypes.Structure):
    """`Problem` of cpu_moe.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "ids", "p")),
        *((name, _Weights) for name in ("w1", "w2", "w3", "b1", "b2")),
        *((name, ctypes.c_void_p) for name in ("hidden", "results", "order", "output")),
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "experts", "width", "inner", "bytes", "half")),
        *((name, ctypes.c_int64) for name in ("scored", "threads")),
        ("few", ctypes.c_double),
        ("formula", _Formula),
    ]


class _Hidden(ctypes.Structure):
    """`HiddenRows` of cpu_moe_rows.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pre", "weights", "hidden")),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "bytes", "threads")),
        ("formula", _Formula),
    ]


class _HiddenGradients(ctypes.Structure):
    """`HiddenGradients` of cpu_moe_rows.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pre", "grad", "weights", "grad_pre", "hidden", "grad_weights")),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "bytes", "threads")),
        ("formula", _Formula),
    ]


class _Sums(ctypes.Structure):
    """`Sums` of cpu_moe_rows.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "place", "weights", "output")),
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "width", "bytes", "threads")),
    ]


def _library() -> ctypes.CDLL | None:
    return native.library("cpu_moe", ("-fopenmp",))


def _library_for(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library, if its passes over the rows of torch's products take their dtype."""
    return _library() if dtype in (torch.float32, torch.bfloat16) else None


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@functools.lru_cache(maxsize=256)
def _formula(spec: ExpertSpec) -> _Formula:
    limit = float("inf") if spec.limit is None else spec.limit
    position = get_args(Activation).index(spec.activation), get_args(Gate).index(spec.gate)
    return _Formula(*position, spec.alpha, limit, spec.shift)


def forward(experts: Experts, z: Tensor, ids: Tensor, p: Tensor) -> Tensor | None:
    """The output (T, l) in z's dtype; None also where experts have too many rows for this to be the faster way.

    Args:
        experts: their weights.
        z: (T, l).
        ids: (T, K).
        p: (T, K).
    """
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not ids.numel():
        return None
    few = _few(experts, z.dtype)
    # Experts have fewest rows, in the mean over rows, if all have the same number.
    if ids.numel() > few * experts.number or (library := _library()) is None:
        return None
    chosen = ids.to(torch.int64).contiguous()
    weights = {"w1": experts.w1[0], "w2": experts.w2, "b1": experts.b1, "b2": experts.b2}
    if experts.spec.gate == "separate":
        weights["w3"] = experts.w1[1]
    tables = _Tables(chosen)
    places = {name: tables.place(given) for name, given in weights.items() if given is not None}
    if None in places.values():
        return None
    x, scores = z.float().contiguous(), p.float().contiguous()
    if experts.spec.score == "input":
        x = (x.unsqueeze(1) * scores.unsqueeze(2)).flatten(0, 1)
    inner = experts.w2[0].shape[1]
    hidden, results = x.new_empty(ids.numel(), inner), x.new_empty(ids.numel(), z.shape[1])
    order = chosen.new_empty(ids.numel() + 3 * experts.number + 2)
    output = x.new_empty(z.shape)
    problem = _Problem(
        x=x.data_ptr(),
        ids=chosen.data_ptr(),
        p=scores.data_ptr(),
        **places,
        hidden=hidden.data_ptr(),
        results=results.data_ptr(),
        order=order.data_ptr(),
        output=output.data_ptr(),
        tokens=ids.shape[0],
        choices=ids.shape[1],
        experts=experts.number,
        width=z.shape[1],
        inner=inner,
        bytes=z.itemsize,
        half=z.dtype == torch.float16,
        scored=_SCORED.index(experts.spec.score),
        threads=torch.get_num_threads(),
        few=few,
        formula=_formula(experts.spec),
    )
    if library.s2o_cpu_moe(ctypes.byref(problem)):
        return None
    return output.to(z.dtype)


def _few(experts: Experts, dtype: torch.dtype) -> float:
    matrices = [weight[0] for weight in (*experts.w1, experts.w2)]
    if dtype == torch.float32 and any(matrix.stride(1) != 1 for matrix in matrices):
        return FEW_ACROSS
    return FEW_OF_SMALL if sum(matrix.nbytes for matrix in matrices) <= SMALL else FEW


class _Tables:
    """Where weights of experts lie; holds the tables of addresses of separate tensors while a call runs."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.kept: list[Any] = []
        self.numbers: list[int] | None = None

    def place(self, given: PerExpert) -> _Weights | None:
        """None for matrices neither of whose strides is 1, and for separate tensors that lie in different ways."""
        data = table = None
        if isinstance(given, Tensor):
            (expert, *strides), data = given.stride(), given.data_ptr()
        else:
            if self.numbers is None:  # tensors that no token chose are not looked at: there may be hundreds
                self.numbers = [e for e in set(self.ids.flatten().tolist()) if 0 <= e < len(given)]
            expert, strides = 0, list(given[0].stride())
            addresses = (ctypes.c_void_p * len(given))()
            for e in self.numbers:
                if list(given[e].stride()) != strides:
                    return None
                addresses[e] = given[e].data_ptr()
            self.kept.append(addresses)
            table = ctypes.addressof(addresses)
        if len(strides) == 2 and 1 not in strides:
            return None
        return _Weights(data, table, expert, *(*strides, 0)[:2])


def route(ids: Tensor, experts: int) -> Routing | None:
    """`Routing.of`."""
    if (library := _library()) is None:
        return None
    ids = ids.to(torch.int64).contiguous()
    order, place, counts = (ids.new_empty(size) for size in (ids.numel(), ids.numel(), experts + 1))
    addresses = [ctypes.c_void_p(x.data_ptr()) for x in (ids, order, place, counts)]
    sizes = ctypes.c_int64(ids.numel()), ctypes.c_int64(experts)
    library.s2o_cpu_moe_route(addresses[0], *sizes, *addresses[1:])
    return Routing(ids.shape[1], order, place, counts[:experts].tolist())


def hidden(pre: Tensor, spec: ExpertSpec, weights: Tensor | None) -> Tensor | None:
    """`moe_cpu.hidden` times weights in one pass, in the dtype of the first products.

    Args:
        pre: (rows, columns), contiguous.
        spec: the formula of an expert.
        weights: (rows, 1) float32, or None for ones.
    """
    if (library := _library_for(pre.dtype)) is None:
        return None
    result = pre.new_empty(pre.shape[0], pre.shape[1] // spec.halves)
    weights = None if weights is None else weights.contiguous()
    rows = _Hidden(
        pre=pre.data_ptr(),
        weights=_address(weights),
        hidden=result.data_ptr(),
        rows=pre.shape[0],
        inner=result.shape[1],
        bytes=pre.itemsize,
        threads=torch.get_num_threads(),
        formula=_formula(spec),
    )
    library.s2o_cpu_moe_hidden(ctypes.byref(rows))
    return result


def hidden_backward(
    grad: Tensor, pre: Tensor, spec: ExpertSpec, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a backward pass wants of the hidden rows, in one pass.

    Args:
        grad: (rows, I), contiguous, the gradient of hidden rows times weights.
        pre: (rows, columns) of the same dtype, contiguous.
        spec: the formula of an expert.
        weights: (rows, 1) float32, or None for ones.

    Returns:
        The gradient of pre, the hidden rows times weights, both in pre's dtype, and the gradient (rows) of the weights
        in float32.
    """
    if (library := _library_for(pre.dtype)) is None:
        return None
    grad_pre, rows = torch.empty_like(pre), torch.empty_like(grad)
    grad_weights = pre.new_empty(pre.shape[0], dtype=torch.float32)
    weights = None if weights is None else weights.contiguous()
    call = _HiddenGradients(
        pre=pre.data_ptr(),
        grad=grad.data_ptr(),
        weights=_address(weights),
        grad_pre=grad_pre.data_ptr(),
        hidden=rows.data_ptr(),
        grad_weights=grad_weights.data_ptr(),
        rows=grad.shape[0],
        inner=grad.shape[1],
        bytes=pre.itemsize,
        threads=torch.get_num_threads(),
        formula=_formula(spec),
    )
    library.s2o_cpu_moe_hidden_backward(ctypes.byref(call))
    return grad_pre, rows, grad_weights


def weighted_sum(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor | None:
    """The sums of each token's rows, in the order of its choices and in float32.

    Args:
        y: (T * K, l), contiguous.
        place: (T, K) int64, contiguous; which row of y a choice has.
        weights: (T * K, 1) float32, or None for ones.

    Returns:
        (T, l) in y's dtype.
    """
    if (library := _library_for(y.dtype)) is None:
        return None
    output = y.new_empty(place.shape[0], y.shape[1])
    weights = None if weights is None else weights.contiguous()
    sums = _Sums(
        y=y.data_ptr(),
        place=place.data_ptr(),
        weights=_address(weights),
        output=output.data_ptr(),
        tokens=place.shape[0],
        choices=place.shape[1],
        width=y.shape[1],
        bytes=y.itemsize,
        threads=torch.get_num_threads(),
    )
    library.s2o_cpu_moe_sum(ctypes.byref(sums))
    return output
