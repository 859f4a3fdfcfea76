"""The shape of the package: which way imports point, what importing costs, and what a wheel holds."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import s2o_inductor

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "s2o_inductor"
# From the top down: a module may import its own layer and those after it.
LAYERS = ("backend", "passes", "ops", "kernels", "mask_spec")
LAYER_OF = {
    "s2o_inductor.backend": "backend",
    "s2o_inductor.config": "backend",
    "s2o_inductor.report": "backend",
    "s2o_inductor.calibration": "backend",
    "s2o_inductor.loops.preparation": "backend",
    "s2o_inductor.loops.comparison": "backend",
    "s2o_inductor.loops.probe": "backend",
    "s2o_inductor.loops.source": "backend",
    "s2o_inductor.loops.breaks": "backend",
    "s2o_inductor.loops.weights": "backend",
    "s2o_inductor.viz": "backend",
    "s2o_inductor.dispatch": "ops",
    "s2o_inductor.ops": "ops",
    "s2o_inductor.moe_ops": "ops",
    "s2o_inductor.moe_list_ops": "ops",
    "s2o_inductor.router_ops": "ops",
    "s2o_inductor.mask_spec": "mask_spec",
    "s2o_inductor.moe_spec": "mask_spec",
    "s2o_inductor.sparse_policy": "mask_spec",
    "s2o_inductor.errors": "mask_spec",  # error classes: importable from everywhere
}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).glob("*.py"))
    assert found, f"{ROOT / folder} holds no module"
    return found


def native_sources() -> list[Path]:
    found = sorted(path for path in (ROOT / "kernels").iterdir() if path.suffix in (".cpp", ".h"))
    assert found
    return found


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that a file names in an import, wherever in the file, with the statement."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            assert node.module is not None
            # "from s2o_inductor import ops" names s2o_inductor.ops.
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def layer(module: str) -> str | None:
    """The layer of a module of ours; None for anything else."""
    if module.startswith(("s2o_inductor.passes", "passes")):
        return "passes"
    if module.startswith(("s2o_inductor.kernels", "kernels")):
        return "kernels"
    return next((name for prefix, name in LAYER_OF.items() if f"{module}.".startswith(f"{prefix}.")), None)


def layer_imports(path: Path) -> set[str]:
    return {name for name in (layer(module) for module, _ in imports(path)) if name is not None}


def test_passes_see_ops_but_no_kernel_and_no_backend() -> None:
    for path in sources("passes"):
        # The options and the report are handed in; only their types may be named.
        named = {module for module, _ in imports(path) if layer(module) == "backend"}
        assert all(module.startswith("s2o_inductor.config") for module in named), (path.name, named)
        assert "kernels" not in layer_imports(path), path.name


def test_kernels_see_neither_graphs_nor_passes_nor_ops() -> None:
    for path in sources("kernels"):
        assert layer_imports(path) <= {"kernels", "mask_spec"}, path.name
        modules = [module for module, _ in imports(path)]
        assert not [module for module in modules if re.match(r"torch\.(fx|_dynamo|_inductor|_functorch)\b", module)], (
            path.name
        )


def test_ops_see_kernels_only_inside_functions() -> None:
    tree = ast.parse((PACKAGE / "ops.py").read_text())
    assert layer_imports(PACKAGE / "ops.py") == {"ops", "kernels", "mask_spec"}
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in top if "kernels" in ast.unparse(node)]


def test_the_contract_between_the_layers_imports_none_of_them() -> None:
    for name in ("mask_spec.py", "moe_spec.py", "sparse_policy.py", "errors.py"):
        assert layer_imports(PACKAGE / name) <= {"mask_spec"}, name
        assert not [module for module, _ in imports(PACKAGE / name) if module.split(".")[0] == "torch"], name


def test_the_references_depend_on_torch_and_the_contracts_alone() -> None:
    allowed = {"__future__", "torch", "dataclasses", "itertools", "math", "collections", "typing"}
    for module, _ in itertools.chain(*(imports(path) for path in (ROOT / "kernels").glob("reference*.py"))):
        contracts = ("s2o_inductor.mask_spec", "s2o_inductor.moe_spec", "s2o_inductor.sparse_policy")
        ours = (*contracts, "s2o_inductor.kernels.tail_groups", "s2o_inductor.kernels.stop_rule")
        assert module.split(".")[0] in allowed or module.startswith(ours), module


def test_only_kernels_import_triton() -> None:
    for folder in ("s2o_inductor", "s2o_inductor/loops", "passes"):
        for path in sources(folder):
            assert not [module for module, _ in imports(path) if module.split(".")[0] == "triton"], path.name


def test_our_modules_are_imported_by_their_full_name() -> None:
    for folder in ("s2o_inductor", "passes", "kernels", "tests"):
        for path in sources(folder):
            bare = [module for module, _ in imports(path) if module.split(".")[0] in ("passes", "kernels")]
            assert not bare, (path.name, bare)


def test_files_stay_readable() -> None:
    files = [
        path for folder in ("s2o_inductor", "s2o_inductor/loops", "passes", "kernels") for path in sources(folder)
    ] + native_sources()
    long = {path.name: count for path in files if (count := len(path.read_text().splitlines())) > 400}
    assert not long, f"longer than 400 lines: {long}"


def test_the_two_folders_are_links_without_an_init() -> None:
    for folder in ("passes", "kernels"):
        link = PACKAGE / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"
        assert not (ROOT / folder / "__init__.py").exists(), "it would make a package that shadows another project's"
    assert not (ROOT / "tests" / "__init__.py").exists()


def run(code: str, *, cwd: Path | None = None, **environment: str) -> tuple[Any, str]:
    """Runs code in a fresh interpreter: what its last line prints as JSON, and its standard error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_from_the_root_kernels_is_no_regular_package_of_ours() -> None:
    code = """
import importlib.util, json, sys
sys.path.insert(0, "")
spec = importlib.util.find_spec("kernels")
print(json.dumps(None if spec is None else spec.origin))
"""
    # None: absent, or a namespace that gives way to any regular package further down the path.
    origin, _ = run(code, cwd=ROOT)
    assert origin is None or not Path(origin).resolve().is_relative_to(ROOT)


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    code = """
import json, sys
import s2o_inductor
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "triton", "sympy", "transformers"})))
"""
    # TORCH_LOGS imports this package while torch is still being imported.
    assert run(code)[0] == []


ATTEND = """
import json, torch
import torch.nn.functional as F
def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
q, k, v = torch.randn(3, 1, 2, 8, 4)
out = torch.compile(attend, backend="s2o", options={"inner": "eager"})(q, k, v)
torch.testing.assert_close(out, attend(q, k, v))
import s2o_inductor
print(json.dumps(s2o_inductor.last_report().to_dict()["sites"]))
"""


def test_the_backend_works_without_triton_and_without_a_gpu() -> None:
    blocked = 'import sys; sys.modules["triton"] = None  # any import of it raises ImportError'
    sites, said = run(blocked + ATTEND, CUDA_VISIBLE_DEVICES="")
    assert [site["status"] for site in sites] == ["rewritten"]
    assert "rewrote attention" not in said, "decisions are logged only when asked for"


def test_torch_logs_and_the_structured_trace_show_the_decisions(tmp_path: Path) -> None:
    reported, said = run(ATTEND, TORCH_LOGS="+s2o_inductor", TORCH_TRACE=str(tmp_path))
    assert f"rewrote attention at {reported[0]['where']}" in said
    (log,) = tmp_path.glob("*.log")
    lines = log.read_text().splitlines()
    (at,) = [index for index, line in enumerate(lines) if '"name": "s2o_report"' in line]
    payload = itertools.takewhile(lambda line: line.startswith("\t"), lines[at + 1 :])
    (site,) = json.loads("\n".join(payload))
    for field in ("kind", "where", "status", "exact", "mask", "shape"):
        assert site[field] == reported[0][field]


def test_public_names_resolve_and_an_unknown_one_says_what_there_is() -> None:
    for name in s2o_inductor.__all__:
        assert getattr(s2o_inductor, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'explan'; it has .*explain"):
        s2o_inductor.explan  # noqa: B018


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def has_build_backend() -> bool:
    """Whether this environment can build the wheel itself; otherwise pip fetches what it needs."""
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
def test_a_wheel_holds_plain_files_and_the_entry_point(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), "."]
    if has_build_backend():
        command.append("--no-build-isolation")
    source = tmp_path / "source"
    source.mkdir()
    for path in [*ROOT.glob("*.*"), ROOT / "LICENSE"]:
        if path.is_file():
            shutil.copy(path, source)
    for folder in ("s2o_inductor", "passes", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
        (entry,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert not links
    for folder, at in (("passes", "passes"), ("kernels", "kernels"), ("s2o_inductor/loops", "loops")):
        assert {f"s2o_inductor/{at}/{path.name}" for path in sources(folder)} <= names
    assert {f"s2o_inductor/kernels/{path.name}" for path in native_sources()} <= names
    assert "s2o_inductor/py.typed" in names
    assert not [name for name in names if name.split("/")[0] in ("passes", "kernels", "tests", "examples")]
    assert "[torch_dynamo_backends]\ns2o = s2o_inductor.backend:s2o" in entry
