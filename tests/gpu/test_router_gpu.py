"""What routers compute on a GPU: scores beside float64, choices beside a stable sort, both in a compiled layer."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_triton_router import DTYPES, LAYOUTS, check, numbers
from torch import Tensor, nn

import s2o_inductor
from s2o_inductor import router_ops
from s2o_inductor.router_ops import mm_float32
from s2o_inductor.testing import assert_close_to_gold

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = [(512, 22), (128, 8), (8, 2), (256, 8), (1024, 64), (60, 1), (1, 1)]


@pytest.mark.parametrize("rows", [1, 300, 5000])
@pytest.mark.parametrize(("columns", "k"), SIZES)
def test_choices(columns: int, k: int, rows: int) -> None:
    for seed, layout in enumerate(LAYOUTS):
        for dtype in DTYPES:
            check(numbers(random.Random(seed), min(rows, 40), columns, dtype, layout, "cuda"), k)
    x = torch.randn(rows, columns, device="cuda")
    assert torch.equal(router_ops.top_k(x, k)[0], torch.topk(x, k)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 4096, 512), (7, 2048, 128), (512, 4096, 512), (8192, 4096, 512), (3000, 100, 60)]
)
def test_scores_are_as_exact_as_in_float32(rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(rows, depth, generator=generator, device="cuda").to(dtype)
    b = torch.randn(columns, depth, generator=generator, device="cuda").mul_(depth**-0.5).to(dtype).T
    found = mm_float32(a, b)
    assert_close_to_gold(found, a.float() @ b.float(), a.double() @ b.double(), what=f"{rows} x {depth} x {columns}")
    assert torch.equal(found, mm_float32(a, b))


class Layer(nn.Module):
    """A router in float32 and experts in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(64, 256) / 16)
        self.first, self.second = (nn.Parameter(torch.randn(64, *shape) / 16) for shape in ((128, 256), (256, 128)))

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.gate.float())
        p, ids = torch.topk(logits.softmax(-1), 6, dim=-1, sorted=False)
        h = torch.einsum("td,tkhd->tkh", x, self.first[ids]).relu().square()
        y = torch.einsum("tkh,tkdh->tkd", h, self.second[ids])
        return (y * p.to(x.dtype)[..., None]).sum(1)


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_layer(training: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer: Any = Layer().cuda().bfloat16()
    x = torch.randn(50, 256, device="cuda", dtype=torch.bfloat16)
    call, results = torch.compile(layer, backend="s2o", options={"experts": True}), []
    gold = copy.deepcopy(layer).double()
    for model, run, given in ((layer, call, x), (layer, layer, x), (gold, gold, x.double())):
        with torch.set_grad_enabled(training):
            y = run(given)
        leaves = list(model.parameters())
        results.append([y, *(torch.autograd.grad(y.float().square().sum(), leaves) if training else ())])
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["status"] == "rewritten" and len(site["router"]) == 2, site
    for found, low, truth in zip(*results, strict=True):
        assert_close_to_gold(found, low, truth, what="layer", condition=8.0)
