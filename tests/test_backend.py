"""The ways into the backend, and that it leaves everything else in the process as it was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import s2o_inductor
from s2o_inductor import backend, report
from s2o_inductor.errors import S2OError, UnsupportedTorchError
from s2o_inductor.passes import pipeline

ATTENTION = torch.ops.s2o.attention.default
HOOKS = ("pre_grad_custom_pass", "joint_custom_pre_pass")
B, H, S, D = 2, 2, 24, 8


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()  # with install, torch._dynamo.reset does not know of us
    before = {hook: getattr(inductor_config, hook) for hook in HOOKS}
    yield
    backend.uninstall()
    for hook, value in before.items():
        setattr(inductor_config, hook, value)
    torch._dynamo.reset()


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Attention with the mask that Hugging Face builds: causal and key padding."""
    at = torch.arange(q.shape[2])
    visible = (at[None, :] <= at[:, None])[None, None] & padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def operands(requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    padding = torch.ones(B, S, dtype=torch.bool)
    padding[1, -5:] = False
    return [*(torch.randn(B, H, S, D, requires_grad=requires_grad) for _ in range(3)), padding]


def statuses() -> list[str]:
    return [site["status"] for site in s2o_inductor.last_report().to_dict()["sites"]]


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def run(code: str, **environment: str) -> Any:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("version", ["1.13.1", "2.10.2", "2.9.0a0+git1234"])
def test_a_torch_that_is_too_old_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UnsupportedTorchError, match=rf"needs torch 2\.11 or newer; this is {version[:4]}.*install"):
        backend.s2o(fx.symbolic_trace(nn.Identity()), [torch.ones(1)])
    with pytest.raises(UnsupportedTorchError):
        backend.install()
    with pytest.raises(UnsupportedTorchError):
        s2o_inductor.explain(nn.Identity(), torch.ones(1))


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0a0+gitabc", "2.14.0.dev20260901", "3.0"])
def test_a_newer_torch_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    backend.require_torch()


def test_the_backend_is_found_by_name_without_an_import_and_registered_once() -> None:
    found = [entry for entry in metadata.entry_points(group="torch_dynamo_backends") if entry.name == "s2o"]
    assert found, "install the package: pip install -e ."
    code = """
import json, sys, torch
listed = torch._dynamo.list_backends()
imported = "s2o_inductor.backend" in sys.modules
from torch._dynamo.backends.registry import lookup_backend
import s2o_inductor.backend
import s2o_inductor
same = lookup_backend("s2o") is s2o_inductor.backend.s2o
print(json.dumps([listed.count("s2o"), imported, same, torch._dynamo.list_backends().count("s2o")]))
"""
    assert run(code) == [1, False, True, 1]


@pytest.mark.slow
def test_an_environment_variable_selects_the_backend_for_an_untouched_script(tmp_path: Path) -> None:
    code = """
import json, torch
import torch.nn.functional as F
model = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
q, k, v = torch.randn(3, 1, 2, 8, 4)
torch.testing.assert_close(model(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
import s2o_inductor
print(json.dumps([(site["status"], site["mask"]) for site in s2o_inductor.last_report().to_dict()["sites"]]))
"""
    settings = {"TORCH_COMPILE_OVERRIDE_BACKENDS": ">=0:s2o", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert run(code, **settings) == [["rewritten", ["causal"]]]


# ---------------------------------------------------------------- no global setting changes


def process_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "inductor": inductor_config.get_config_copy(),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "functorch": functorch_config.get_config_copy(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "precision": torch.get_float32_matmul_precision(),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "mkldnn": torch.backends.mkldnn.enabled,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "autocast": [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in ("cpu", "cuda")],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
    }
    return state


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_compiling_and_running_changes_no_setting_of_the_process(inner: str) -> None:
    args = operands(requires_grad=True)
    attend(*args).sum().backward()  # whatever torch sets up lazily is set up
    before = process_state()
    out = torch.compile(attend, backend="s2o", options={"inner": inner, "verify": "always"})(*args)
    out.sum().backward()
    after = process_state()
    assert statuses() == ["rewritten"]
    assert {name for name in before if before[name] != after[name]} == set()


def test_explain_changes_no_setting_of_the_process() -> None:
    args = operands()
    attend(*args)
    before = process_state()
    s2o_inductor.explain(attend, *args)
    after = process_state()
    assert {name for name in before if before[name] != after[name]} == set()


# ---------------------------------------------------------------- the user's own passes


class Watch(CustomGraphPass):  # type: ignore[misc]
    """A pass of the user: notes what it is shown."""

    def __init__(self, log: list[tuple[str, list[Any]]], name: str) -> None:
        self.log, self.name = log, name

    def __call__(self, graph: fx.Graph) -> None:
        self.log.append((self.name, targets(graph)))

    def uuid(self) -> bytes:
        return self.name.encode()


def masks_of(seen: list[Any]) -> bool:
    return torch.ops.s2o.attention_mask.default in seen


def test_passes_given_through_options_run_before_ours() -> None:
    log: list[tuple[str, list[Any]]] = []
    options = {
        "pre_grad_custom_pass": Watch(log, "pre"),
        "joint_custom_pre_pass": Watch(log, "joint"),
        "joint_custom_post_pass": Watch(log, "joint post"),
    }
    args = operands()
    out = torch.compile(attend, backend="s2o", options=options)(*args)
    torch.testing.assert_close(out, attend(*args))
    assert [name for name, _ in log] == ["pre", "joint", "joint post"]
    pre, joint, post = (seen for _, seen in log)
    # Stage 1 is the backend's, in front of everything of Inductor's.
    assert ATTENTION in pre and F.scaled_dot_product_attention not in pre
    assert ATTENTION in joint and not masks_of(joint)
    assert masks_of(post), "the mask is lifted behind the user's pass"


def test_passes_that_the_user_has_set_are_kept() -> None:
    log: list[tuple[str, list[Any]]] = []
    post = Watch(log, "joint post")
    with inductor_config.patch(joint_custom_pre_pass=Watch(log, "joint")):
        torch.compile(attend, backend="s2o", options={"joint_custom_post_pass": post})(*operands())
        assert isinstance(inductor_config.joint_custom_pre_pass, Watch)
    assert [name for name, _ in log] == ["joint", "joint post"]
    assert masks_of(log[1][1])


# ---------------------------------------------------------------- the whole process


@pytest.mark.parametrize("plain_function", [False, True])
def test_install_works_behind_the_passes_of_the_user(plain_function: bool) -> None:
    log: list[tuple[str, list[Any]]] = []
    watches = [Watch(log, "pre"), Watch(log, "joint")]
    theirs = [one.__call__ if plain_function else one for one in watches]
    settings = {**dict(zip(HOOKS, theirs, strict=True)), "joint_custom_post_pass": Watch(log, "joint post")}
    args = operands(requires_grad=True)
    with inductor_config.patch(settings):
        s2o_inductor.install()
        out = torch.compile(attend, backend="inductor")(*args)
        s2o_inductor.uninstall()
        assert [getattr(inductor_config, hook) for hook in HOOKS] == theirs
    torch.testing.assert_close(out, attend(*args))
    assert [name for name, _ in log] == ["pre", "joint", "joint post"]
    pre, joint, post = (seen for _, seen in log)
    assert F.scaled_dot_product_attention in pre and ATTENTION not in pre
    assert ATTENTION in joint and not masks_of(joint)
    assert masks_of(post)
    assert statuses() == ["rewritten"]


def test_install_and_uninstall_leave_the_settings_as_they_were() -> None:
    before = inductor_config.get_config_copy()
    s2o_inductor.install({"verify": "off"})
    assert inductor_config.get_config_copy() != before
    s2o_inductor.uninstall()
    assert inductor_config.get_config_copy() == before
    s2o_inductor.uninstall()  # nothing is installed: nothing to do
    assert inductor_config.get_config_copy() == before
    torch.compile(attend, backend="inductor")(*operands())
    assert statuses() == []


def test_uninstall_keeps_what_the_user_set_meanwhile() -> None:
    log: list[tuple[str, list[Any]]] = []
    s2o_inductor.install()
    later = Watch(log, "later")
    inductor_config.joint_custom_pre_pass = later
    s2o_inductor.uninstall()
    assert inductor_config.joint_custom_pre_pass is later
    assert inductor_config.pre_grad_custom_pass is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = {"inner": "eager", "dump_dir": str(tmp_path / "file")}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="'dump_dir' must be a folder that can be"):
        torch.compile(attend, backend="s2o", options=options)(*operands())


def test_install_refuses_what_it_cannot_do() -> None:
    for options in ({"max_autotune": True}, {"inner": "eager"}):
        with pytest.raises(S2OError, match="install takes options of s2o alone"):
            s2o_inductor.install(options)
    with pytest.raises(S2OError, match="unknown option 'veriffy'"):
        s2o_inductor.install({"veriffy": "off"})
    assert [getattr(inductor_config, hook) for hook in HOOKS] == [None, None]
    s2o_inductor.install()
    with pytest.raises(S2OError, match=r"installed already; call s2o_inductor\.uninstall"):
        s2o_inductor.install()


def test_the_backend_by_name_works_while_installed_and_reports_once() -> None:
    s2o_inductor.install({"disable": ["lift-masks"]})
    log: list[tuple[str, list[Any]]] = []
    options = {"joint_custom_post_pass": Watch(log, "joint post")}
    args = operands()
    torch.testing.assert_close(torch.compile(attend, backend="s2o", options=options)(*args), attend(*args))
    report = s2o_inductor.last_report().to_dict()
    assert [site["status"] for site in report["sites"]] == ["rewritten"]
    assert report["graphs"] == 1
    assert masks_of(log[0][1]), "the options of this compilation hold, not those of install"
    assert isinstance(inductor_config.joint_custom_pre_pass, pipeline.LiftMasks)


def test_dynamo_reset_forgets_the_report() -> None:
    torch.compile(attend, backend="s2o", options={"inner": "eager"})(*operands())
    assert statuses() == ["rewritten"]
    torch._dynamo.reset()
    assert statuses() == []


# ---------------------------------------------------------------- Hugging Face


def tiny_llama(layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train_with_hugging_face(model: Any, folder: Path, **arguments: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in torch.randint(1, 64, (6, 16))
    ]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, report_to=[], logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=0, learning_rate=1e-2, **arguments,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_hugging_face_trainer_trains_the_same_either_way(tmp_path: Path) -> None:
    expected = train_with_hugging_face(tiny_llama(1), tmp_path)
    assert len(expected) == 3
    s2o_inductor.install()
    by_hooks = train_with_hugging_face(
        tiny_llama(1), tmp_path, torch_compile=True, torch_compile_backend="inductor"
    )  # fmt: skip
    assert statuses() == ["rewritten"]
    s2o_inductor.uninstall()
    torch._dynamo.reset()
    report.clear()
    compiled = torch.compile(tiny_llama(1), backend="s2o", options={"inner": "aot_eager"})
    by_name = train_with_hugging_face(compiled, tmp_path)
    assert statuses() == ["rewritten"]
    assert by_hooks == pytest.approx(expected, abs=2e-4)
    assert by_name == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_generate_uses_the_backend_when_the_forward_is_compiled() -> None:
    model = tiny_llama().eval()
    prompt = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **settings)
    # Known to torch's users: generate() of a compiled module runs the module inside, uncompiled.
    counters.clear()
    torch.testing.assert_close(torch.compile(model, backend="s2o").generate(prompt, **settings), expected)
    assert counters["stats"].get("unique_graphs", 0) == 0
    model.compile(backend="s2o", options={"inner": "aot_eager"})
    torch.testing.assert_close(model.generate(prompt, **settings), expected)
    assert counters["stats"]["unique_graphs"] >= 2
    assert set(statuses()) == {"rewritten"}
