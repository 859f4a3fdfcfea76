"""A device that is none, for tests of code that moves tensors between a GPU and the CPU.

Its tensors lie on the CPU, and say that they are on `DEVICE`. They meet tensors of the CPU only where those of a GPU
would. What fails there is noted: on CUDA an index out of bounds ends the work of the process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
aten = torch.ops.aten


class Failed(RuntimeError):
    """An operator failed on the device."""


class There(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        x: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        x.held = held
        return x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on what the tensors hold, and its results on the device where it put them."""
    flat = pytree.tree_leaves((args, kwargs))
    there = any(isinstance(x, There) for x in flat)
    target = kwargs.get("device")
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if there and not moves and any(isinstance(x, Tensor) and not isinstance(x, There) and x.dim() for x in flat):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    if there and "s2o" in str(func) and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in flat):
        raise NotImplementedError(f"{func} has no float64 there")
    goes = there if target is None else torch.device(target) == DEVICE
    held, named = pytree.tree_map_only(There, lambda x: x.held, (args, kwargs))
    if target is not None:
        named["device"] = torch.device("cpu")
    try:
        result = func(*held, **named)
    except Exception as error:
        if there:
            broken.append(f"{func}: {error}")
            raise Failed(f"{func}: {error}") from error
        raise
    if not goes:
        return result
    result = pytree.tree_map_only(Tensor, There, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result


# What failed there.
broken: list[str] = []


class Installed(TorchDispatchMode):
    """While open, the device exists: tensors are made there on request."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def put_there(model: nn.Module) -> nn.Module:
    """Moves the parameters and buffers of a model to the device, in place."""
    return model._apply(lambda x: There(x.detach()))
