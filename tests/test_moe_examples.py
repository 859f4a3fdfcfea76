"""The examples about experts run, and say what they found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # scripts that import each other, as when they are run

pytest.importorskip("transformers")
import coverage_moe
import latent_moe
import train_moe_lm


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_the_language_model_trains_as_in_eager_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--steps 6 --width 32 --experts 4 --choices 2 --batch 2 --length 32 --inner aot_eager --device cpu"
    monkeypatch.setattr(sys, "argv", ["train_moe_lm.py", *arguments.split()])
    assert train_moe_lm.main() == 0
    said = capsys.readouterr().out
    assert "2 of 2 modules with loops over experts prepared" in said and "the losses agree" in said


@pytest.mark.parametrize(("name", "form"), [("nemotron_h, latent", "batched_mm"), ("llama4", "grouped_mm")])
def test_a_hugging_face_model_passes(name: str, form: str) -> None:
    row = coverage_moe.measure(name, form, "aot_eager")
    assert row.passed, row
    assert coverage_moe.table([row]).count("\n") == 2


def test_the_layer_of_nemotron_scales_down() -> None:
    layer, x = latent_moe.build(32), torch.randn(1, 3, 128)
    assert layer.experts.up_proj.shape == (32, 84, 32)
    assert latent_moe.run(layer, x, False).shape == latent_moe.run(layer, x, True).shape == x.shape
