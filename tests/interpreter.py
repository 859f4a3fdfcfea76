"""Running kernel checks in Triton's interpreter: Triton decides at import whether it interprets, so in a child process.

A test file names its checks and calls `main` when it is run as a script; its tests read what `report_of` says of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def report_of(path: str) -> dict[str, str]:
    """What each check of the file said: "" or the error."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    results: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return results


def main(checks: dict[str, Callable[[], None]]) -> None:
    """Runs the checks, or those whose name has a part named on the command line, and prints the report."""
    from s2o_inductor.testing import poisoned_memory

    results = {}
    torch.set_num_threads(1)
    for name, run in checks.items():
        if len(sys.argv) > 1 and not any(part in name for part in sys.argv[1:]):
            continue
        try:
            with poisoned_memory():
                run()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc(limit=-6)
    print(json.dumps(results))
