"""The benchmark of single calls over many heads: errors, choices of budgets, and selections through the CUDA kernels.

What needs Triton runs in its interpreter, in a child process; see tests/interpreter.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path

import interpreter
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # scripts that import each other, as when they are run

import block_selections
import model_quality
from synthetic_heads import synthetic_head

if importlib.util.find_spec("triton") is not None:
    import head_calls


def made(kinds: tuple[str, ...], length: int, width: int = 16) -> tuple[torch.Tensor, ...]:
    heads = [synthetic_head(kind, length, width, seed) for seed, kind in enumerate(kinds)]
    q, k, v = (torch.stack(x)[None] for x in zip(*heads, strict=True))
    return q, k, v


# ---------------------------------------------------------------- in the interpreter


def check_selections() -> None:
    """A published selection read through the kernels' page table is the same attention."""
    from s2o_inductor.kernels import cuda_sparse

    q, k, v = made(("mix",), 640)
    for name in ("PBS-Attn", "block mean"):
        table = block_selections.select(name, q[0], k[0], 0.6)
        wanted, pairs = block_selections.attend(q, k, v, table)
        read = cuda_sparse.attend(q, k, v, table.places[None], table.listed[None], geometry=table.geometry)
        torch.testing.assert_close(read.output, wanted, rtol=1e-3, atol=1e-4)
        assert int(read.pairs.sum()) == pairs < int(read.visible.sum())


def check_without_tail() -> None:
    """Without a tail the same keys are read as with it, and nothing stands in for the rest."""
    from s2o_inductor.kernels import cuda_sparse

    whole_q, k, v = made(("semantic",), 1536)
    q = whole_q[:, :, -128:]
    output, pairs, visible = model_quality.ranked_by_groups(q, k, v, 0.95)
    whole = cuda_sparse.forward(q, k, v, budgets=(0.95,))
    assert (pairs, visible) == (int(whole.pairs.sum()), int(whole.visible.sum()))
    assert pairs < visible
    exact = model_quality.dense(whole_q, k, v)[0][:, :, -128:]
    assert (output - exact).norm() > 1.5 * (whole.output - exact).norm()


CHECKS = {"selections": check_selections, "without a tail": check_without_tail}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return interpreter.report_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_in_interpreter(name: str, results: dict[str, str]) -> None:
    assert not results[name], results[name]


# ---------------------------------------------------------------- on any machine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("tiles", [3, 99])
def test_error_is_of_the_sampled_rows_against_dense_attention(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_calls, "_SCORES", 640 * 200)  # several pieces
    q, k, v = made(("mix", "vertical"), 640)
    k, v = k[:, :1], v[:, :1]
    exact = head_calls.Exact(q, k, v, tiles)
    dense = model_quality.dense(q, k, v)[0]
    assert exact.error(dense).tolist() == pytest.approx([head_calls.FLOOR] * 2)
    assert exact.error(torch.zeros_like(dense)).tolist() == pytest.approx([1.0, 1.0])
    assert exact.at.numel() == 128 * min(tiles, 5)
    outside = torch.ones(640, dtype=torch.bool)
    outside[exact.at] = False
    dense[:, :, outside] = 7.0
    assert exact.error(dense).tolist() == pytest.approx([head_calls.FLOOR] * 2)


def test_budgets_by_head_are_the_cheapest_that_hold() -> None:
    density = torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.2, 0.4], [1.0, 1.0, 1.0]])
    error = torch.tensor([[0.4, 2e-3, 1e-2], [1e-2, 1e-3, 1e-3], [1e-6, 1e-6, 1e-6]])
    for arithmetic, geometric in ((0.2, 0.1), (5e-3, 1.0), (1.0, 2e-3), (5e-3, 2e-3)):
        choice = head_calls.cheapest(density, error, arithmetic, geometric)
        assert choice is not None
        cost, holding = [], []
        for tried in itertools.product(range(3), repeat=3):
            errors = error.gather(0, torch.tensor(tried)[None])[0]
            cost.append(float(density.gather(0, torch.tensor(tried)[None]).sum()))
            holding.append(bool(errors.mean() <= arithmetic and errors.log().mean().exp() <= geometric))
            if list(tried) == choice.tolist():
                assert holding[-1]
                found = cost[-1]
        best = min(c for c, holds in zip(cost, holding, strict=True) if holds)
        assert best - 1e-6 <= found <= best + 0.4  # prices reach the lower hull alone
    assert head_calls.cheapest(density, error, 1e-7, 1e-7) is None


def test_selections_are_named_with_thresholds() -> None:
    assert head_calls.selection_of("PBS-Attn=0.9,0.5") == ("PBS-Attn", (0.9, 0.5))
    assert head_calls.selection_of("FlashPrefill") == ("FlashPrefill", head_calls.ALPHAS)
    with pytest.raises(SystemExit, match="Unknown: PBS"):
        head_calls.selection_of("PBS=0.9")


def test_comparison_takes_the_fastest_with_no_more_error(capsys: pytest.CaptureFixture[str]) -> None:
    row = head_calls.Row("S2O", "close", 5.0, 0.3, [1e-3, 1e-3])
    rows = [
        head_calls.Row("cuDNN", "", 20.0, 1.0, [1e-6, 1e-6]),
        head_calls.Row("peer", "x", 8.0, 0.5, [1e-4, 1e-1], select=2.0),
        dataclasses.replace(row, knob="fast, worse by one mean", ms=1.0, error=[1e-1, 1e-1]),
        row,
    ]
    head_calls.compare(rows)
    assert "| peer x | 10.00 | close | 5.00 | 0.300 | 2.00x | 4.00x |" in capsys.readouterr().out


if __name__ == "__main__":
    interpreter.main(CHECKS)
