"""Compiled artifacts: reused when nothing changed, never when anything did, and reported either way."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import s2o_inductor
from s2o_inductor import backend, mask_spec, report
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import pipeline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    with fresh_cache():
        torch._dynamo.reset()
        report.clear()
        yield
        backend.uninstall()
        torch._dynamo.reset()


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    visible = (at[None, :] <= at[:, None])[None, None] & padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, -5:] = False
    return [*(torch.randn(2, 2, 24, 8, requires_grad=True) for _ in range(3)), padding]


def compile_and_run(
    options: dict[str, Any] | None = None, name: str = "s2o", attend: Callable[..., Tensor] = attend
) -> Counter[str]:
    """What the cache of AOTAutograd did, after everything in memory was forgotten; checks the numbers."""
    torch._dynamo.reset()
    report.clear()
    counters.clear()
    args = operands()
    out = torch.compile(attend, backend=name, options=options)(*args)
    torch.testing.assert_close(out, attend(*args))
    grads = torch.autograd.grad(out.square().sum(), args[:3])
    for ours, theirs in zip(grads, torch.autograd.grad(attend(*args).square().sum(), args[:3]), strict=True):
        torch.testing.assert_close(ours, theirs)
    events = counters["aot_autograd"]
    return Counter({event: events[f"autograd_cache_{event}"] for event in ("hit", "miss", "bypass", "saved")})


def sites() -> list[dict[str, Any]]:
    return [{**site, "verified": ""} for site in s2o_inductor.last_report().to_dict()["sites"]]


MISS = Counter(miss=1, saved=1)
HIT = Counter(hit=1)


def test_a_hit_gives_the_same_numbers_gradients_and_report() -> None:
    assert compile_and_run() == MISS
    cold = sites()
    assert [site["status"] for site in cold] == ["rewritten"]
    assert "causal" in cold[0]["mask"] and cold[0]["reason"] is None and cold[0]["route"]
    assert compile_and_run() == HIT
    assert sites() == cold, "on a hit no pass runs: what the report says must not depend on that"


@pytest.mark.parametrize(
    "options",
    [{"disable": ["multi-head"]}, {"verify": "off"}, {"exclude": ["nothing.*"]}],
    ids=lambda options: next(iter(options)),
)
def test_a_changed_option_misses(options: dict[str, Any]) -> None:
    assert compile_and_run() == MISS
    assert compile_and_run(options) == MISS
    assert compile_and_run(options) == HIT
    assert compile_and_run() == HIT


def test_a_changed_option_of_inductor_misses() -> None:
    assert compile_and_run() == MISS
    assert compile_and_run({"epilogue_fusion": False}) == MISS


def test_options_that_do_not_touch_the_artifact_hit(tmp_path: Path) -> None:
    assert compile_and_run() == MISS
    assert compile_and_run({"strict": True}) == HIT
    assert compile_and_run({"dump_dir": str(tmp_path)}) == HIT
    assert len(list(tmp_path.glob("*.txt"))) == 2


def test_a_changed_source_file_version_or_device_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_and_run() == MISS
    monkeypatch.setattr(pipeline, "fingerprint", lambda: "another build")
    assert compile_and_run() == MISS


def test_the_fingerprint_covers_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("s2o_inductor", "passes", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "passes" / "pipeline.py"))
    monkeypatch.setattr(mask_spec, "__file__", str(tmp_path / "s2o_inductor" / "mask_spec.py"))
    seen = {uncached_fingerprint()}
    assert seen == {uncached_fingerprint()}
    files = [path for folder in ("s2o_inductor", "passes", "kernels") for path in (tmp_path / folder).rglob("*.py")]
    for path in {path.resolve() for path in files}:
        path.write_text(path.read_text() + "\n# changed\n")
        now = uncached_fingerprint()
        assert now not in seen, path
        seen.add(now)


def uncached_fingerprint() -> str:
    return pipeline.fingerprint.__wrapped__()


def test_the_fingerprint_covers_versions_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = uncached_fingerprint()
    for name in ("_triton_version", "_device"):
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, name, lambda: "another")
            assert uncached_fingerprint() != before
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert uncached_fingerprint() != before


def test_a_pass_pickles_to_what_its_uuid_says() -> None:
    # Some versions of torch put the pickled pass into the key: the report must not be part of it.
    ours = [pipeline.LiftMasks(S2OConfig(), lambda: None), pipeline.RewriteSites(S2OConfig(), report.new_graph_report)]
    again = [pipeline.LiftMasks(S2OConfig(), report.latest), pipeline.RewriteSites(S2OConfig(), lambda: None)]  # type: ignore[arg-type,return-value]
    for one, other in zip(ours, again, strict=True):
        assert one.uuid() == other.uuid()
        assert pickle.dumps(one) == pickle.dumps(other)
    assert ours[0].uuid() != ours[1].uuid()
    assert pipeline.LiftMasks(S2OConfig(verify="off"), lambda: None).uuid() != ours[0].uuid()


class Counted(CustomGraphPass):  # type: ignore[misc]
    """A pass of the user."""

    def __init__(self, name: str | None) -> None:
        self.name, self.calls = name, 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str | None:
        return self.name


@pytest.mark.parametrize("hook", ["joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass"])
def test_a_pass_of_the_user_without_uuid_bypasses_the_cache(hook: str) -> None:
    theirs = Counted(None)
    for run in (1, 2):
        done = compile_and_run({hook: theirs})
        assert done["hit"] == 0 and done["bypass"] >= 1
        # Run every time, in each of the two graphs that a post-grad pass sees.
        assert theirs.calls == run * (2 if hook.startswith("post_grad") else 1)


def test_a_pass_of_the_user_with_uuid_is_part_of_the_key() -> None:
    hook = "joint_custom_pre_pass"
    assert compile_and_run({hook: Counted("one")}) == MISS
    again, other = Counted("one"), Counted("two")
    assert compile_and_run({hook: again}) == HIT
    assert again.calls == 0
    assert compile_and_run({hook: other}) == MISS
    assert other.calls == 1
    assert compile_and_run() == MISS, "without the user's pass it is another compilation"


def test_under_install_a_hit_is_reported_too() -> None:
    s2o_inductor.install()
    assert compile_and_run(name="inductor") == MISS
    cold = sites()
    assert [site["status"] for site in cold] == ["rewritten"] and "causal" in cold[0]["mask"]
    assert compile_and_run(name="inductor") == HIT
    assert sites() == cold


@pytest.mark.slow
def test_install_never_serves_what_inductor_compiled_without_it_or_with_other_options() -> None:
    def compile_with_inductor() -> Counter[str]:
        return compile_and_run(name="inductor", attend=attend_causally)

    assert compile_with_inductor() == MISS
    assert sites() == []
    s2o_inductor.install()
    assert compile_with_inductor() == MISS
    s2o_inductor.uninstall()
    s2o_inductor.install({"disable": ["lift-masks"]})
    assert compile_with_inductor() == MISS
    s2o_inductor.uninstall()
    assert compile_with_inductor() == HIT
    assert sites() == []


def test_under_install_a_pass_of_the_user_without_uuid_does_not_give_a_wrong_hit() -> None:
    theirs = Counted(None)
    with inductor_config.patch(pre_grad_custom_pass=theirs):
        s2o_inductor.install()
        for run in (1, 2):
            compile_and_run(name="inductor")
            assert theirs.calls == run
            assert [site["status"] for site in sites()] == ["rewritten"]
        s2o_inductor.uninstall()


SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
import s2o_inductor
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import pipeline
sys.path.insert(0, sys.argv[1])
from test_cache import attend, operands
args = operands()
out = torch.compile(attend, backend="s2o")(*args)
out.square().sum().backward()
report = s2o_inductor.last_report().to_dict()
print(json.dumps({
    "aot": dict(counters["aot_autograd"]),
    "fx": dict(counters["inductor"]),
    "uuids": [pipeline.LiftMasks(S2OConfig(disable=("multi-head",)), lambda: None).uuid()],
    "sites": [{**site, "verified": ""} for site in report["sites"]],
    "stages": sorted(report["seconds"]),
    "out": out.tolist(),
    "grad": args[0].grad.tolist(),
}))
"""


@pytest.mark.slow
def test_a_second_process_hits_with_another_hash_seed_and_reports_the_same(tmp_path: Path) -> None:
    def process(seed: str) -> Any:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm = process("1"), process("2")
    assert cold["aot"].get("autograd_cache_hit", 0) == 0
    assert cold["aot"]["autograd_cache_saved"] == 1
    assert warm["aot"]["autograd_cache_hit"] == 1
    assert warm["aot"].get("autograd_cache_miss", 0) == 0
    assert warm["fx"]["fxgraph_cache_hit"] == 2
    assert "stage 2" in cold["stages"] and "stage 2" not in warm["stages"], "no pass runs on the joint graph"
    for same in ("uuids", "sites", "out", "grad"):
        assert cold[same] == warm[same], same
    assert cold["sites"][0]["status"] == "rewritten" and "causal" in cold["sites"][0]["mask"]
