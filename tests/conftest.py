"""Hypothesis profiles, caches of each run by itself, and NaN in all memory that is allocated without being written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from s2o_inductor.testing import poisoned_memory

# "ci" draws the same examples every time; "explore" draws new ones, and many: HYPOTHESIS_PROFILE=explore pytest.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", derandomize=True, database=None, max_examples=100, print_blob=True, **_common)
settings.register_profile("explore", max_examples=2000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def _own_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier run compiled: on a hit of Inductor's cache no pass runs, and tests watch passes run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield
