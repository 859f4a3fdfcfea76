"""Ways in which the backend meets other machinery: distributed wrappers, autograd, export, transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import s2o_inductor
from s2o_inductor import backend, ops, report
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import pipeline

AOT = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()
    torch.manual_seed(0)
    yield
    backend.uninstall()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A group of this process alone."""
    store: Path = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def heads() -> list[Tensor]:
    return [torch.randn(2, 2, 12, 8) for _ in range(3)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sites() -> list[dict[str, Any]]:
    return s2o_inductor.last_report().to_dict()["sites"]


def statuses() -> list[str]:
    return [site["status"] for site in sites()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Two blocks and, as in Hugging Face models, one mask that the model builds for both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(16, 16), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        mask = (at[None] <= at[:, None])[None, None] & padding[:, None, None, :]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


def inputs() -> tuple[Tensor, Tensor]:
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, 9:] = False
    return torch.randn(2, 12, 16), padding


def gradients(run: Callable[..., Tensor], model: nn.Module, *args: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(*args).square().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [getattr(grad, "full_tensor", lambda grad=grad: grad)().clone() for grad in found]


# ---------------------------------------------------------------- distributed wrappers


def test_ddp_splits_the_graph_and_hands_the_mask_across(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
    model, args = Layers(), inputs()
    expected = model(*args)
    wanted = gradients(model, model, *args)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    with torch._dynamo.config.patch(optimize_ddp="ddp_optimizer"):
        compiled = torch.compile(wrapped, backend="s2o", options=AOT)
        torch.testing.assert_close(compiled(*args), expected)
        torch.testing.assert_close(gradients(compiled, model, *args), wanted)
    result = s2o_inductor.last_report().to_dict()
    assert result["graphs"] > 2, "the buckets are small enough to split the graph"
    assert statuses() == ["rewritten"] * 2
    for site in result["sites"]:
        assert site["route"]
        assert site["mask"] == ["dense"] and "input" in site["reason"], "only the first graph sees how it was built"


def test_fsdp2_compiles_layer_by_layer_with_the_mask_as_an_input(mesh: DeviceMesh) -> None:
    model, args = Layers(), inputs()
    expected = model(*args)
    wanted = gradients(model, model, *args)
    for block in model.blocks:
        block.compile(backend="s2o", options=AOT)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(*args), expected)
    torch.testing.assert_close(gradients(model, model, *args), wanted)
    assert statuses() == ["rewritten"], "both layers run one compiled graph"
    assert sites()[0]["mask"] == ["dense"]


def test_fsdp2_wrapped_whole(mesh: DeviceMesh) -> None:
    model, args = Layers(), inputs()
    expected = model(*args)
    wanted = gradients(model, model, *args)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = torch.compile(model, backend="s2o", options=AOT)
    torch.testing.assert_close(compiled(*args), expected)
    torch.testing.assert_close(gradients(compiled, model, *args), wanted)
    assert set(statuses()) == {"rewritten"}


def test_distributed_tensors_are_left_alone(mesh: DeviceMesh) -> None:
    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v

    # Torch has no sharding rule for scaled_dot_product_attention on CPU, and neither has the op.
    plain = heads()
    q, k, v = (distribute_tensor(one, mesh, [Shard(1)]) for one in plain)
    out = torch.compile(written_out, backend="s2o", options=AOT)(q, k, v)
    torch.testing.assert_close(out.full_tensor(), written_out(*plain))
    (site,) = sites()
    assert site["status"] == "declined" and "DTensor" in site["reason"]

    def projected(x: Any, weight: Any) -> Any:
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).to_local()
        return causal(q, k, v)

    x, weight = torch.randn(2, 12, 16), torch.randn(16, 48)
    expected = projected(*(distribute_tensor(one, mesh, [Replicate()]) for one in (x, weight)))
    out = torch.compile(projected, backend="s2o", options=AOT)(
        *(distribute_tensor(one, mesh, [Replicate()]) for one in (x, weight))
    )
    torch.testing.assert_close(out, expected)
    assert statuses()[-1] == "rewritten", "local tensors are as good as any"


# ---------------------------------------------------------------- autograd, export, transforms


def test_the_log_sum_exp_asks_for_no_gradient() -> None:
    output, lse = ops.attention(*(one.requires_grad_() for one in heads()))
    assert output.requires_grad and not lse.requires_grad


def test_compiled_autograd_calls_the_backend_on_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(2, 12, 16)
    model(x).square().sum().backward()
    expected = model.project.weight.grad.clone()
    model.zero_grad()
    for name in ("empty", "empty_like", "empty_strided"):
        # Compiled autograd traces torch's own calls of these, which the test session has wrapped.
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: model(x).square().sum().backward(), backend="s2o", options=AOT)()
    torch.testing.assert_close(model.project.weight.grad, expected)
    assert statuses() == ["rewritten"]


def test_mode_reduce_overhead_on_cpu() -> None:
    torch.testing.assert_close(
        torch.compile(causal, backend="s2o", mode="reduce-overhead")(*(args := heads())), causal(*args)
    )
    assert statuses() == ["rewritten"]


def test_export_is_not_involved() -> None:
    s2o_inductor.install()
    model, x = Block().eval(), torch.randn(2, 12, 16)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if "s2o" in str(node.target)]
    # Inductor's ahead-of-time path runs the installed passes on exported graphs, which are another kind.
    before = str(program.graph)
    pipeline.RewriteSites(S2OConfig(), report.new_graph_report)(program.graph_module.graph)
    assert str(program.graph) == before
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("inside", [True, False], ids=["compile(transform)", "transform(compile)"])
def test_function_transforms(inside: bool) -> None:
    def through(transform: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
        if inside:
            return torch.compile(transform(function), backend="s2o", options=AOT)
        return transform(torch.compile(function, backend="s2o", options=AOT))

    q, k, v = heads()
    torch.testing.assert_close(through(torch.func.vmap, causal)(q, k, v), causal(q, k, v))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v).square().sum()

    torch.testing.assert_close(through(torch.func.grad, loss)(q, k, v), torch.func.grad(loss)(q, k, v))
