"""The report: what it says, that it is true, and that asking for it disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import s2o_inductor
from s2o_inductor import report
from s2o_inductor.errors import DeclinedError, OptionError

AOT = {"inner": "aot_eager"}
SITE = {"kind", "where", "status", "reason", "exact", "mask", "shape", "route", "verified"}
SITE |= {"sparse", "sparse_reason", "router"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self, groups: int = 1, breaks: bool = False) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64 // groups)
        self.groups, self.breaks = groups, breaks

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 4 // self.groups, 8)).permute(2, 0, 3, 1, 4)
        if self.breaks:
            torch._dynamo.graph_break()
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.groups > 1)
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"attn": Attention(groups, breaks)}) for groups in (1, 1 if breaks else 2)]
        )

    def forward(self, x: Tensor, scale: float = 1.0, *, padding: Tensor | None = None) -> Tensor:
        mask = None
        if padding is not None:
            at = torch.arange(x.shape[1])
            mask = (at[None] <= at[:, None])[None, None] & padding[:, None, None, :]
        for layer in self.layers:
            x = x + layer["attn"](x, mask) * scale
        return x


class Bare(nn.Module):
    """Attention and nothing else: Inductor has no code to generate."""

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask, is_causal=mask is None)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Bare()

    def forward(self, q: Tensor) -> Tensor:
        return self.attn(q)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Bare()

    def forward(self, q: Tensor, padding: Tensor) -> Tensor:
        return self.attn(q, padding[:, None, None, :])


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tanh() * 5.0).softmax(-1) @ v


def inputs() -> tuple[Tensor, Tensor]:
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, 9:] = False
    return torch.randn(2, 12, 32), padding


def test_the_dictionary_has_the_documented_keys_and_types() -> None:
    x, padding = inputs()
    found = s2o_inductor.explain(Model(), x, padding=padding).to_dict()
    assert set(found) == {"sites", "graph_breaks", "hints", "graphs", "seconds"}
    assert found["graph_breaks"] == [] and found["graphs"] == 1
    first, second = found["sites"]
    for site in (first, second):
        assert set(site) == SITE
        assert (site["kind"], site["status"], site["reason"], site["exact"]) == ("attention", "rewritten", None, True)
        assert site["mask"][0] == "causal" and site["mask"][1].startswith("keys(")
        assert site["route"] and site["verified"].startswith("verified")
    assert (first["where"], second["where"]) == ("layers.0.attn", "layers.1.attn")
    sizes = {"batch": 2, "query_heads": 4, "queries": 12, "keys": 12, "width": 8, "value_width": 8}
    kind = {"dtype": "float32", "device": "cpu"}
    assert first["shape"] == {**sizes, "kv_heads": 4, **kind}
    assert second["shape"] == {**sizes, "kv_heads": 2, **kind}
    assert json.loads(json.dumps(found)) == found


def test_the_last_report_says_what_explain_says() -> None:
    model, (x, padding) = Model(), inputs()
    explained = s2o_inductor.explain(model, x, padding=padding).to_dict()
    torch.compile(model, backend="s2o", options=AOT)(x, padding=padding)
    compiled = s2o_inductor.last_report().to_dict()
    for found in (explained, compiled):
        found.pop("seconds")
        for site in found["sites"]:
            site.pop("verified")  # the numbers of a check repeat only within a process
    assert compiled == explained


def test_it_prints_as_a_table() -> None:
    x, padding = inputs()
    text = str(s2o_inductor.explain(Model(), x, padding=padding))
    title, header, *rows = text.splitlines()
    assert title == "s2o: 2 of 2 candidate sites rewritten in 1 graph(s), 0 graph break(s)"
    assert header.split() == ["where", "kind", "status", "exact", "shape", "mask", "route"]
    assert len(rows) == 2
    for row, where, heads in zip(rows, ("layers.0.attn", "layers.1.attn"), ("4/4", "4/2"), strict=True):
        assert row.split()[:5] == [where, "attention", "rewritten", "exact", f"2x{heads}x12x12x8"]
        assert "causal & keys(" in row
        assert row.index("attention") == header.index("kind"), "columns line up"


def test_a_declined_site_says_why() -> None:
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    explained = s2o_inductor.explain(soft_capped, q, k, v)
    (site,) = explained.to_dict()["sites"]
    assert (site["status"], site["shape"], site["route"]) == ("declined", {}, "")
    assert site["reason"] == "the scores are soft-capped"
    line = soft_capped.__code__.co_firstlineno + 1
    assert site["where"] == f"{Path(__file__).name}:{line}"
    assert "0 of 1 candidate sites rewritten" in str(explained)
    assert f"{site['where']}: the scores are soft-capped" in str(explained)


def test_a_report_of_nothing() -> None:
    explained = s2o_inductor.explain(lambda x: x + 1, torch.ones(2))
    assert explained.to_dict()["sites"] == [] and explained.to_dict()["graphs"] == 1
    assert str(explained).startswith("s2o: 0 of 0 candidate sites rewritten in 1 graph(s)")


def test_excluded_sites_are_declined_by_that_option() -> None:
    x, _ = inputs()
    found = s2o_inductor.explain(Model(), x, options={"exclude": ["layers.0.*"]}).to_dict()["sites"]
    assert [(site["where"], site["status"]) for site in found] == [
        ("layers.1.attn", "rewritten"), ("layers.0.attn", "declined"),
    ]  # fmt: skip
    assert found[1]["reason"] == "excluded by option 'exclude'"


def test_strict_accepts_what_the_user_excluded() -> None:
    q, k, v = torch.randn(3, 2, 4, 12, 8)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    found = s2o_inductor.explain(attend, q, k, v, options={"strict": True, "exclude": ["test_report.py:*"]})
    assert [site.status for site in found.sites] == ["declined"]


def test_strict_raises_where_a_site_is_declined() -> None:
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    with pytest.raises(BackendCompilerFailed, match=r"DeclinedError: .*the scores are soft-capped") as caught:
        s2o_inductor.explain(soft_capped, q, k, v, options={"strict": True})
    assert isinstance(caught.value.inner_exception, DeclinedError)


def test_explain_refuses_what_the_backend_refuses() -> None:
    with pytest.raises(OptionError, match="unknown option 'veriffy'"):
        s2o_inductor.explain(soft_capped, torch.ones(1), options={"veriffy": "off"})


# ---------------------------------------------------------------- explain as a guest


def test_explain_takes_positional_and_keyword_inputs() -> None:
    x, padding = inputs()
    for sites in (
        s2o_inductor.explain(Model(), x, 0.5, padding=padding).to_dict()["sites"],
        s2o_inductor.explain(Model(), x=x, scale=0.5, padding=padding).to_dict()["sites"],
    ):
        assert [len(site["mask"]) for site in sites] == [2, 2]


def test_explain_of_functions_methods_and_nested_functions() -> None:
    model, (x, _) = Model(), inputs()

    def outer(x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return model(x) * 2

        return inner(x)

    for target in (outer, model.forward, lambda x: outer(x)):
        found = s2o_inductor.explain(target, x).to_dict()
        assert [site["where"] for site in found["sites"]] == ["layers.0.attn", "layers.1.attn"]


def test_explain_disturbs_neither_what_is_compiled_nor_the_last_report() -> None:
    model, (x, padding) = Model(), inputs()
    compiled = torch.compile(model, backend="s2o", options=AOT)
    expected = compiled(x, padding=padding)
    before = s2o_inductor.last_report().to_dict()
    s2o_inductor.explain(model, x)
    s2o_inductor.explain(compiled, x[:1, :7])
    graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(compiled(x, padding=padding), expected)
    assert counters["stats"]["unique_graphs"] == graphs, "nothing was compiled again"
    assert s2o_inductor.last_report().to_dict() == before


def test_explain_can_be_repeated_past_the_recompile_limit() -> None:
    model, (x, _) = Attention(breaks=True), inputs()
    compiled = torch.compile(model, backend="s2o", options=AOT)
    expected = compiled(x)
    compiled_graphs = s2o_inductor.last_report().to_dict()["graphs"]
    with torch._dynamo.config.patch(recompile_limit=2):
        found = [s2o_inductor.explain(model, x).to_dict() for _ in range(4)]
    for one in found:
        assert [site["status"] for site in one["sites"]] == ["rewritten"]
        assert one["graphs"] == found[0]["graphs"]
    graphs = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(compiled(x), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert s2o_inductor.last_report().to_dict()["graphs"] == compiled_graphs


def test_explain_reports_graph_breaks_with_their_reason() -> None:
    x, _ = inputs()
    explained = s2o_inductor.explain(Model(breaks=True), x)
    breaks = explained.to_dict()["graph_breaks"]
    assert len(breaks) == 2
    assert all("graph_break()" in reason for reason in breaks)
    assert "2 graph break(s)" in str(explained)
    assert str(explained).count("  graph break: ") == 2


def test_explain_follows_the_gradient_mode_of_its_caller() -> None:
    model, (x, _) = Model(), inputs()
    with torch.no_grad():
        inference = s2o_inductor.explain(model, x).to_dict()["sites"]
    training = s2o_inductor.explain(model, x).to_dict()["sites"]
    assert [site["status"] for site in inference + training] == ["rewritten"] * 4
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- truth


def test_equal_names_in_one_process_do_not_mix() -> None:
    """Two models whose sites have the same place, the second one out of a cache."""
    q, padding = torch.randn(2, 4, 12, 8), inputs()[1]
    with fresh_cache():
        torch.compile(Padded(), backend="s2o")(q, padding)
        torch._dynamo.reset()
        torch.compile(Causal(), backend="s2o")(q)
        counters.clear()
        torch.compile(Padded(), backend="s2o")(q, padding)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    found = s2o_inductor.last_report().to_dict()["sites"]
    assert [(site["where"], site["mask"]) for site in found] == [("attn", ["causal"]), ("attn", ["keys(L0[b, k])"])]


def test_one_place_called_twice_is_two_sites() -> None:
    layer, (x, _) = Attention(), inputs()
    found = s2o_inductor.explain(lambda x: layer(layer(x)), x)
    assert len(found.sites) == 2
    assert len({site.name for site in found.sites}) == 2
    assert all(site.route for site in found.sites)


def test_a_mask_that_stays_is_reported_with_the_reason() -> None:
    q = torch.randn(2, 4, 12, 8)

    def attend(visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=visible)

    (site,) = s2o_inductor.explain(attend, torch.rand(2, 1, 12, 12) > 0.5).to_dict()["sites"]
    assert site["status"] == "rewritten" and site["mask"] == ["dense"]
    assert "input" in site["reason"]
    torch.compile(attend, backend="s2o", options={"inner": "eager"})(torch.rand(2, 1, 12, 12) > 0.5)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["mask"] == ["dense"] and "did not run" in site["reason"]


def test_symbolic_sizes_are_shown_as_text() -> None:
    x, _ = inputs()
    torch.compile(Model(), backend="s2o", options=AOT, dynamic=True)(x)
    shape = s2o_inductor.last_report().to_dict()["sites"][0]["shape"]
    assert isinstance(shape["queries"], str) and shape["width"] == 8
    assert "rewritten" in str(s2o_inductor.last_report())


def test_time_is_reported_by_stage() -> None:
    x, padding = inputs()
    explained = s2o_inductor.explain(Model(), x, padding=padding, options={"verify": "always"})
    seconds = explained.to_dict()["seconds"]
    assert set(seconds) == {"stage 1", "stage 2", "of which verification"}
    assert 0 < seconds["of which verification"] < seconds["stage 1"] + seconds["stage 2"]


def test_graphs_are_dumped_before_and_after_stage_1(tmp_path: Path) -> None:
    x, padding = inputs()
    s2o_inductor.explain(Model(), x, padding=padding, options={"dump_dir": str(tmp_path / "new")})
    files = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"graph0-0-captured.txt", "graph0-1-rewritten.txt"}
    assert files["graph0-0-captured.txt"].count("= torch._C._nn.scaled_dot_product_attention(") == 2
    assert files["graph0-1-rewritten.txt"].count("= torch.ops.s2o.attention.default(") == 2


def test_the_report_is_kept_per_graph_and_cleared_by_reset() -> None:
    x, _ = inputs()
    compiled = torch.compile(Model(), backend="s2o", options=AOT)
    compiled(x)
    with torch.no_grad():
        compiled(x)
    assert s2o_inductor.last_report().to_dict()["graphs"] == 2
    assert len(s2o_inductor.last_report().sites) == 4
    report.clear()
    assert s2o_inductor.last_report().to_dict()["sites"] == []
