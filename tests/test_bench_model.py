"""The language-model benchmark: planted keys, and that only the selection differs between its methods."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # scripts that import each other, as when they are run

import bench
import model_quality
import tiny_lm
from model_quality import Language, attention_of, load_language, plant, selected
from sparse_baselines import METHODS
from sparse_quality import evaluate, make_tile
from synthetic_heads import synthetic_head

from s2o_inductor.kernels import cpu_sparse
from s2o_inductor.kernels.reference_sparse import sparse_attention
from s2o_inductor.sparse_policy import Geometry


def bytes_language(length: int) -> Language:
    torch.manual_seed(0)
    config = tiny_lm.Config(width=32, layers=2, query_heads=2, kv_heads=1, head_dim=16, hidden=32)
    text = torch.randint(256, (length,))
    return Language(tiny_lm.TinyLM(config).eval(), text, lambda line: (list(line.encode()), [*range(len(line))]))


def heads(kind: str, length: int, count: int = 2, width: int = 32) -> tuple[torch.Tensor, ...]:
    made = [synthetic_head(kind, length, width, seed) for seed in range(count)]
    return torch.stack([q for q, _, _ in made])[None], made[0][1][None, None], made[0][2][None, None]


@settings(max_examples=10, deadline=None)
@given(length=st.sampled_from([1024, 1536]), keys=st.integers(0, 6), sequence=st.integers(0, 1))
def test_every_planted_key_can_be_answered(length: int, keys: int, sequence: int) -> None:
    language = bytes_language(2 * length)
    planted = plant(language, sequence, length, keys)
    written = bytes(planted.tokens.tolist())
    assert len(planted.answers) == keys
    for answer in planted.answers:
        assert bytes(planted.tokens[answer].tolist()).endswith(b"\n") and len(answer) == 8
        name = written[int(answer[0]) - 11 : int(answer[0]) - 3]  # "key_1a2b" of "key_1a2b == 123456\n"
        before = written[: int(answer[0]) - 20]
        assert name + b" =" + bytes(planted.tokens[answer].tolist()) in before
    own = language.text[sequence * length : (sequence + 1) * length]
    assert torch.equal(planted.tokens[planted.text], own[planted.text])
    assert int((~planted.text).sum()) == keys * (len("\nkey_0000 = 000000\n") + len("\nassert key_0000 == 000000\n"))


def test_too_many_keys_and_too_little_text_are_refused() -> None:
    language = bytes_language(1024)
    with pytest.raises(ValueError, match="no room for 64 keys"):
        plant(language, 0, 1024, 64)
    with pytest.raises(ValueError, match="sequence 1 of 1024 tokens lies past the end"):
        plant(language, 1, 1024, 2)


@pytest.mark.parametrize("name", ["PBS-Attn", "XAttention", "block mean"])
def test_reading_everything_is_dense_attention(name: str) -> None:
    q, k, v = heads("mix", 768)
    output, pairs, visible = selected(q, k, v, name, 2.0)  # no share reaches 2
    torch.testing.assert_close(
        output, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), rtol=1e-4, atol=1e-4
    )
    assert pairs == visible == 2 * 768 * 769 // 2


@pytest.mark.parametrize(
    ("name", "knob"),
    [("PBS-Attn", 0.7), ("PBS-Attn, shares of the prefix alone", 0.7), ("block mean", 0.7), ("XAttention", 0.4),
     ("FlashPrefill", 0.95)],
)  # fmt: skip
@pytest.mark.parametrize("start", [640, 768])  # the prefix ends inside a segment, and with one
def test_model_reads_what_the_tile_benchmark_reads(name: str, knob: float, start: int) -> None:
    q, k, v = heads("mix", 896)
    q[:, :, -128:] = q[:, :, -1:]  # one importance for all of PBS-Attn's queries: its order is then that of any prefix
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    output, _, _ = selected(q, k, v, name, knob)
    rows = slice(start, start + 128)
    tile = make_tile(q[0], k[0, 0], v[0, 0], start)
    wanted = evaluate(tile, METHODS[name].select(tile, [knob]))[:, 0]
    error = (output - dense)[0, :, rows].square().sum(dim=(1, 2)) / dense[0, :, rows].square().sum(dim=(1, 2))
    assert wanted.min() > 1e-5  # something was left out
    torch.testing.assert_close(error, wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("method", "clusters"), [("S2O", Geometry().clusters), ("S2O, tail dropped", 0)])
def test_ours_is_the_reference(method: str, clusters: int) -> None:
    q, k, v = heads("semantic", 3072)
    output, pairs, visible = attention_of(method, 0.9)(q, k, v)
    reference = sparse_attention(q, k, v, budgets=(0.9,), full=cpu_sparse.FULL, geometry=Geometry(clusters=clusters))
    torch.testing.assert_close(output, reference.output, rtol=1e-3, atol=1e-4)
    assert (pairs, visible) == (int(reference.pairs.sum()), int(reference.visible.sum()))
    assert pairs < visible


def test_loss_is_of_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    language = bytes_language(1024)
    planted = plant(language, 0, 1024, 3)
    monkeypatch.setattr(model_quality, "_CHUNK", 100)  # chunks of logits leave nothing out
    density, loss, _ = model_quality.run(language, planted, attention_of("dense", 0.0), "cpu")
    with torch.no_grad():
        losses = F.cross_entropy(language.model(planted.tokens[None])[0, :-1], planted.tokens[1:], reduction="none")
    assert loss == pytest.approx(losses[planted.text[1:]].mean().item(), rel=1e-4)
    assert density == 1.0


def test_command_runs_a_model_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models

    language = bytes_language(2048)
    save_file({n: w.clone() for n, w in language.model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(language.model.config)))
    np.save(tmp_path / "heldout.npy", language.text.numpy().astype(np.uint16))
    with pytest.raises(SystemExit, match=r"tokenizer\.json is not in"):
        bench.main(["model", "--model", str(tmp_path)])
    characters = {chr(i): i for i in range(128)}
    Tokenizer(models.BPE(vocab=characters, merges=[])).save(str(tmp_path / "tokenizer.json"))
    loaded = load_language(tmp_path, 0)
    assert loaded.encode("\nkey") == ([10, 107, 101, 121], [0, 1, 2, 3])
    bench.main(
        ["model", "--model", str(tmp_path), "--lengths", "1024", "--sequences", "2", "--keys", "2", "--methods",
         "dense", "S2O=0.9", "block mean=0.5", "--json", str(tmp_path / "out.json")]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "| S2O | 0.9 |" in printed and "| block mean | 0.5 |" in printed
    rows = json.loads((tmp_path / "out.json").read_text())["1024"]
    assert [row["method"] for row in rows] == ["dense", "S2O", "block mean"]
    assert rows[0]["density"] == [1.0, 1.0] and rows[2]["density"][0] < 1.0 and rows[1]["asked"] == 4
    with pytest.raises(SystemExit, match="Unknown: S3O"):
        bench.main(["model", "--methods", "S3O"])
