"""Autograd for the operators, at little cost to the host where no gradient is needed.

A kernel that `torch.library.register_autograd` makes calls the dispatcher again, which calls the implementation: three
Python functions for one, in time for which a router and its experts could launch all their kernels. Where nothing
stands between autograd and the device, no mode, subclass or transform, the implementation is called at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch._library.autograd import Info, make_autograd_impl

NAMESPACE = "s2o"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # what it registers would go with it
_DEVICES = frozenset((_C.DispatchKey.CPU, _C.DispatchKey.CUDA))


def register_autograd(
    name: str, implementation: Callable[..., Any], backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:  # fmt: skip
    """`torch.library.register_autograd`, but that calls without gradients take a shorter way.

    Args:
        name: of an operator in `NAMESPACE` that is defined and has no arguments by keyword alone.
        implementation: what is registered for its devices.
        backward: see `torch.library.register_autograd`.
        setup_context: see there.
    """
    recorded = make_autograd_impl(getattr(getattr(torch.ops, NAMESPACE), name).default, Info(backward, setup_context))

    def kernel(keys: _C.DispatchKeySet, *args: Any) -> Any:
        next_key = (keys & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId()
        if next_key not in _DEVICES or (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return recorded(keys, *args)
        return implementation(*args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
