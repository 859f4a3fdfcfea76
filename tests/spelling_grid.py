"""The grid of 96 spellings of attention: how many s2o rewrites and how many torch's fuse_attention recognises.

python tests/spelling_grid.py            # both, about ten minutes on two cores
python tests/spelling_grid.py --ours     # s2o alone, about half a minute
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from spellings import Cell, grid
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import s2o_inductor


def rewritten_by_s2o(cell: Cell) -> bool:
    """Whether the backend found the cell's attention, verified its rewrite and kept it."""
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(cell.function(), backend="s2o", options={"inner": "eager"}, dynamic=False)(*cell.inputs())
    sites = s2o_inductor.last_report().to_dict()["sites"]
    return [site["status"] for site in sites] == ["rewritten"]


def fused_by_torch(cell: Cell) -> bool:
    """Whether one of Inductor's own attention patterns fires, by its counter, with every cache off."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        torch.compile(cell.function(), backend="inductor", dynamic=False)(*cell.inputs())
    return counters["inductor"]["fuse_attention"] > 0


def main() -> None:
    """Prints both counts, in all and by property of the spelling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="store_true", help="leave torch's own pass out")
    ours_only = parser.parse_args().ours
    totals: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    for cell in grid():
        heads = "grouped heads" if cell.grouped else "plain heads"
        properties = ("all", f"scale {cell.scale}", f"mask {cell.mask}", heads, str(cell).rsplit("-", 1)[-1])
        totals.update(properties)
        if rewritten_by_s2o(cell):
            ours.update(properties)
        if not ours_only and fused_by_torch(cell):
            theirs.update(properties)
    print(f"torch {torch.__version__}, cpu, inference, B H S D = 2 8 64 32")
    print(f"{'':16}{'cells':>6}{'s2o':>6}{'torch':>7}")
    for name, count in sorted(totals.items()):
        print(f"{name:16}{count:6}{ours[name]:6}{'-' if ours_only else theirs[name]:>7}")


if __name__ == "__main__":
    main()
