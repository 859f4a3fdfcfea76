"""Which CUDA kernel is chosen for which call: a function of facts, so it is tested without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2o_inductor.kernels import cuda, dense


def facts(**fields: Any) -> dense.Facts:
    """A Llama-sized causal call of 32,768 tokens on Hopper, changed by `fields`."""
    defaults: dict[str, Any] = {
        "device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "batch": 1,
        "queries": 32768, "keys": 32768, "query_heads": 32, "kv_heads": 8, "lower": None, "upper": 0, "terms": False,
        "dense": "", "dropout": False,
    }  # fmt: skip
    return dense.Facts(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("fields", "route"),
    [
        ({}, "cudnn"),
        ({"upper": None}, "cudnn"),
        ({"dtype": torch.float16}, "cudnn"),
        # A plan for a new shape would cost more than it saves.
        ({"queries": 2048, "keys": 2048}, "triton"),
        ({"queries": 1000, "keys": 1000, "batch": 2}, "triton"),
        # The host would take longer to launch ours than the device to run it.
        ({"queries": 128, "keys": 128}, "flash"),
        # cuDNN compiles kernels for wider heads at run time.
        ({"head_dim": 256, "value_dim": 256}, "triton"),
        ({"value_dim": 64}, "triton"),
        ({"head_dim": 100, "value_dim": 100}, "triton"),
        # Anything but the whole square or its lower triangle.
        ({"upper": 5}, "triton"),
        ({"lower": -4095}, "triton"),
        ({"queries": 1024}, "triton"),
        ({"terms": True}, "triton"),
        ({"dense": "bool"}, "triton"),
        ({"dense": "additive"}, "triton"),
        ({"dropout": True}, "triton"),
        ({"dtype": torch.float32}, "efficient"),
        ({"dtype": torch.float32, "terms": True}, "triton"),
        # Few queries.
        ({"queries": 1, "upper": None, "keys": 8192}, "flash"),
        ({"queries": 1, "upper": None}, "decode"),
        ({"queries": 2, "upper": None}, "decode"),
        ({"queries": 1, "upper": None, "terms": True}, "decode"),
        ({"queries": 16, "upper": 32752}, "decode"),
        ({"queries": 16, "upper": 32752, "query_heads": 64}, "triton"),
        ({"queries": 1, "upper": None, "dtype": torch.float32}, "decode"),
        ({"queries": 1, "upper": None, "dropout": True}, "triton"),
        # What no kernel takes.
        ({"dtype": torch.float64}, "math"),
        ({"head_dim": 576}, "math"),
        ({"capability": (7, 5)}, "math"),
        # Before Hopper FlashAttention-2 is the best there is.
        ({"capability": (8, 0)}, "flash"),
        ({"capability": (8, 0), "terms": True}, "triton"),
    ],
)
def test_route(fields: dict[str, Any], route: str) -> None:
    assert cuda.choose_route(facts(**fields)) == route


def test_a_disabled_kernel_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert cuda.choose_route(facts()) == "triton"


@pytest.mark.parametrize("block", [16, 32, 64, 128, 512])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_few_keys_of_narrow_heads_are_not_shared_by_eight_warps(block: int, width: int) -> None:
    """Triton 3.6 compiles that into reads beyond the shared memory where 64 keys have 64 float8 channels."""
    pytest.importorskip("triton")
    from s2o_inductor.kernels import triton_sparse_order as order

    for run in (1, 8, 16):
        found = order._for_block(run, block, order.scores_configs(torch.bfloat16, width, 32))
        assert found and all(run <= config.keys <= block and block % config.keys == 0 for config in found)
        if width <= 128:
            assert all(config.warps <= 4 for config in found if config.keys <= 64)
