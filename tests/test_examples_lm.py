"""The example language model: its checkpoint, its text, its recall test, and the two scripts that use it."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))  # the examples are scripts that import each other, as when they are run

import tiny_lm  # noqa: E402


@pytest.fixture(scope="module")
def model() -> tiny_lm.TinyLM:
    return tiny_lm.load_checkpoint()[0]


@pytest.fixture(scope="module")
def held_out() -> bytes:
    return tiny_lm.load_text(held_out=True, limit=2**18)


def small_model() -> tiny_lm.TinyLM:
    torch.manual_seed(0)
    return tiny_lm.TinyLM(tiny_lm.Config(width=64, layers=2, query_heads=4, kv_heads=2, head_dim=16, hidden=96))


def test_checkpoint_is_small_and_says_where_it_comes_from() -> None:
    model, notes = tiny_lm.load_checkpoint()
    assert sum(file.stat().st_size for file in tiny_lm.CHECKPOINT.parent.iterdir()) <= 8_000_000
    assert model.config == tiny_lm.Config()
    assert notes["backend"] == "s2o"
    assert not model.training


def test_model_knows_text_it_has_never_seen(model: tiny_lm.TinyLM, held_out: bytes) -> None:
    tokens = tiny_lm.to_tokens([held_out[:4096]])
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).item()
    # 0.58 after training; uniform bytes cost 5.55, and gzip -9 needs 1.34 for a megabyte of such text.
    assert 0.3 < loss < 0.9


def test_model_recalls_planted_keys(model: tiny_lm.TinyLM, held_out: bytes) -> None:
    assert tiny_lm.recall(model, held_out, 2048, 8, "cpu", batch=2) >= 0.875


def test_int8_rows_lose_at_most_half_a_step(tmp_path: Path) -> None:
    model = small_model()
    tiny_lm.save_checkpoint(tmp_path / "model.pt", model, {"note": 1})
    loaded, notes = tiny_lm.load_checkpoint(tmp_path / "model.pt")
    assert notes == {"note": 1}
    for (name, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        step = before.abs().amax(dim=-1, keepdim=True) / 127 if before.dim() == 2 else torch.zeros(1)
        assert ((before - after).abs() <= 0.501 * step).all(), name
        assert before.dim() < 2 or not torch.equal(before, after)


def test_padding_changes_nothing_for_the_text_before_it(held_out: bytes) -> None:
    model = small_model()
    tokens = tiny_lm.to_tokens([held_out[:96], held_out[96:160].ljust(96, b"\0")])
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 64:] = 0
    padded = model(tokens, attention_mask)
    torch.testing.assert_close(padded[0], model(tokens[:1])[0])
    torch.testing.assert_close(padded[1, :64], model(tokens[1:, :64])[0])


def test_held_out_modules_stay_out_of_training() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    trained, kept = set(tiny_lm._modules(root, False)), set(tiny_lm._modules(root, True))
    assert trained and kept and not trained & kept
    assert not {file.name for file in kept if file.name != "__init__.py"} & {
        file.name for file in trained if tiny_lm.is_held_out((file.stem,))
    }
    # A vendored copy goes where the original goes.
    name = next(file.stem for file in sorted(kept) if tiny_lm.is_held_out((file.stem,)))
    assert tiny_lm.is_held_out(("somewhere", "_vendor", name))


def test_text_is_the_same_each_time_and_as_long_as_asked() -> None:
    assert tiny_lm.load_text(True, 50_000) == tiny_lm.load_text(True, 60_000)[:50_000]
    assert len(tiny_lm.load_text(False, 50_000)) == 50_000


def test_missing_text_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path), "purelib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="no Python source under"):
        tiny_lm.load_text(True, 100)


@pytest.mark.parametrize("seed", range(20))
def test_every_planted_recall_has_its_key_before_it(seed: int) -> None:
    row = bytearray(b"x" * 2048)
    tiny_lm.plant_keys(row, 8, random.Random(seed))
    defined = {m[1]: (m.start(), m[2]) for m in re.finditer(rb"\nkey_([0-9a-f]{4}) = (\d{6})\n", row)}
    recalls = list(re.finditer(rb"\nassert key_([0-9a-f]{4}) == (\d{6})\n", row))
    assert len(row) == 2048 and len(defined) == len(recalls) == 8
    for match in recalls:
        start, value = defined[match[1]]
        assert start < match.start() and value == match[2]


def oracle(tokens: torch.Tensor) -> torch.Tensor:
    """Logits that look the key up, as a perfect model would."""
    logits = torch.zeros(*tokens.shape, 256)
    for row, out in zip(tokens.tolist(), logits, strict=True):
        text = bytes(row)
        key = re.search(rb"\nassert (key_[0-9a-f]{4}) == \d{6}\n$", text)
        assert key is not None
        value = re.search(rb"\n" + key[1] + rb" = (\d{6}\n)", text)
        assert value is not None
        for place, byte in enumerate(value[1]):
            out[len(row) - 8 + place, byte] = 1.0
    return logits


def test_recall_counts_only_complete_answers(held_out: bytes) -> None:
    assert tiny_lm.recall(oracle, held_out, 1024, 12, "cpu", batch=3) == 1.0

    def one_digit_wrong(tokens: torch.Tensor) -> torch.Tensor:
        logits = oracle(tokens)
        logits[:, -4] = logits[:, -4].roll(1, dims=-1)
        return logits

    assert tiny_lm.recall(one_digit_wrong, held_out, 1024, 12, "cpu", batch=3) == 0.0


def test_training_through_s2o_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_tiny_lm

    import s2o_inductor

    torch._dynamo.reset()
    arguments = "--backend s2o --inner eager --device cpu --steps 3 --layers 1 --context 256 --tokens 1024 --text-mb 1"
    monkeypatch.setattr(
        sys, "argv", ["train_tiny_lm.py", *arguments.split(), "--log-every", "1", "--output", str(tmp_path / "lm.pt")]
    )
    train_tiny_lm.main()
    losses = [float(value) for value in re.findall(r"loss (\d\.\d+)  recall", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    sites = s2o_inductor.last_report().to_dict()["sites"]
    assert [site["status"] for site in sites] == ["rewritten"] and sites[0]["mask"] == ["causal"]
    assert tiny_lm.load_checkpoint(tmp_path / "lm.pt")[1]["backend"] == "s2o"


def test_training_refuses_sizes_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_tiny_lm

    monkeypatch.setattr(sys, "argv", ["train_tiny_lm.py", "--tokens", "512", "--context", "1024"])
    with pytest.raises(SystemExit):
        train_tiny_lm.main()
    assert "--tokens at least the longest --context" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_runs_and_agrees_with_eager() -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--tokens", "512", "--fast", "--device", "cpu"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "s2o: 6 of 6 candidate sites rewritten" in out
    eager, s2o = re.search(r"^eager .*$", out, re.M), re.search(r"^s2o, inner=.*$", out, re.M)
    assert eager and s2o
    assert float(s2o[0].split()[-1]) < 1e-3
    assert eager[0].split()[-2:] == s2o[0].split()[-3:-1]  # loss and recall, as printed
