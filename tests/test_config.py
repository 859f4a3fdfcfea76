"""Options: what is accepted, what is refused and how, and what reaches Inductor."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.custom_graph_pass import CustomGraphPass

from s2o_inductor.config import PASSES, S2OConfig, split_options
from s2o_inductor.errors import OptionError, S2OError


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def matmul(x: torch.Tensor) -> torch.Tensor:
    """Compiles without generated code: Inductor calls the library for it."""
    return x @ x


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("veriffy", "verify"),
        ("stric", "strict"),
        ("s2o.iner", "s2o.inner"),
        ("dumpdir", "dump_dir"),
        ("max_autotun", "max_autotune"),
        ("triton.cudagraph", "triton.cudagraphs"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(written: str, meant: str) -> None:
    with pytest.raises(OptionError) as caught:
        split_options({written: True}, None)
    assert repr(written) in str(caught.value)
    assert f"Did you mean {meant!r}?" in str(caught.value)


def test_an_option_like_nothing_else_is_refused_with_the_list_of_ours() -> None:
    with pytest.raises(OptionError) as caught:
        split_options({"zzzzqqqq": 1}, None)
    assert "Did you mean" not in str(caught.value)
    for field in dataclasses.fields(S2OConfig):
        assert field.name in str(caught.value)


def test_a_prefix_does_not_turn_an_option_of_inductor_into_ours() -> None:
    with pytest.raises(OptionError, match=r"unknown option 's2o\.max_autotune'"):
        split_options({"s2o.max_autotune": True}, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inner": "inductr"}, r"'inner' must be one of inductor, aot_eager, eager; got 'inductr'.*'inductor'"),
        ({"inner": None}, r"'inner' must be one of .*; got None"),
        ({"verify": "sometimes"}, r"'verify' must be one of first, always, off; got 'sometimes'"),
        ({"verify": True}, r"'verify' must be one of .*; got True"),
        ({"strict": 1}, r"'strict' must be True or False; got 1"),
        ({"experts": 1}, r"'experts' must be True or False, or None to decide; got 1"),
        ({"strict": "yes"}, r"'strict' must be True or False; got 'yes'"),
        ({"disable": "attention"}, r"'disable' must be a list of strings; got 'attention'"),
        ({"disable": ["atention"]}, r"'disable' must be one of .*; got 'atention'.*'attention'"),
        ({"disable": 3}, r"'disable' must be a list of strings; got 3"),
        ({"exclude": "layers.*"}, r"'exclude' must be a list of strings; got 'layers\.\*'"),
        ({"exclude": [1]}, r"'exclude' must be a list of strings; got \[1\]"),
        ({"exclude": None}, r"'exclude' must be a list of strings; got None"),
        ({"dump_dir": 1}, r"'dump_dir' must be a folder's path; got 1"),
        ({"budget": -0.1}, r"'budget' must be a number from 0 to 1; got -0\.1"),
        ({"budget": True}, r"'budget' must be a number from 0 to 1; got True"),
        ({"budget": float("nan")}, r"'budget' must be a number from 0 to 1; got nan"),
        ({"budgets": 0.5}, r"'budgets' must map patterns of module paths to budgets; got 0\.5"),
        ({"budgets": {1: 0.5}}, r"'budgets' must map patterns .*; got \{1: 0\.5\}"),
        ({"budgets": {"*": [0.5, 2]}}, r"'budgets' for '\*' must be a number from 0 to 1; got 2"),
        ({"budgets": {"*": []}}, r"'budgets' for '\*' must be a number from 0 to 1; got \[\]"),
        ({"max_density": 0}, r"'max_density' must be above 0, up to 1; got 0.*budget=0"),
        ({"max_density": 1.5}, r"'max_density' must be a number from 0 to 1; got 1\.5"),
        ({"min_seq": -1}, r"'min_seq' must be an integer from 0 on; got -1"),
        ({"min_seq": 1.5}, r"'min_seq' must be an integer from 0 on; got 1\.5"),
        ({"audit": None}, r"'audit' must be an integer from 0 on; got None"),
        ({"audit": True}, r"'audit' must be an integer from 0 on; got True"),
        ({"max_autotune": "yes"}, r"'max_autotune' takes a bool; got str 'yes'"),
        ({"max_autotune": 1}, r"'max_autotune' takes a bool; got int 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_given(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        split_options(options, None)


def test_option_errors_are_value_errors_and_errors_of_this_package() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, S2OError)


def test_through_torch_compile_the_user_reads_the_same_message() -> None:
    compiled = torch.compile(matmul, backend="s2o", options={"inner": "eager", "veriffy": "off"})
    with pytest.raises(BackendCompilerFailed, match=r"OptionError: unknown option 'veriffy'\. Did you mean 'verify'\?"):
        compiled(torch.ones(2, 2))


def test_every_option_may_be_prefixed() -> None:
    given = {
        "inner": "eager",
        "verify": "off",
        "strict": True,
        "disable": ["multi-head"],
        "experts": False,
        "exclude": ["layers.0.*"],
        "dump_dir": "graphs",
        "budget": 0.25,
        "budgets": {"layers.0.*": 0, "layers.1.*": [0.5, 0.1]},
        "max_density": 0.5,
        "min_seq": 4096,
        "audit": 16,
    }
    assert set(given) == {field.name for field in dataclasses.fields(S2OConfig)}
    plain, _ = split_options(given, None)
    prefixed, patches = split_options({f"s2o.{name}": value for name, value in given.items()}, None)
    assert plain == prefixed
    assert not patches
    assert prefixed.disable == ("multi-head",)


def test_one_option_given_twice_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'verify' is given twice"):
        split_options({"verify": "off", "s2o.verify": "always"}, None)


def test_no_options_give_the_defaults() -> None:
    assert split_options(None, None) == (S2OConfig(), {})
    assert split_options({}, "default") == (S2OConfig(), {})


@pytest.mark.parametrize("experts", [None, True, False])
def test_what_is_said_of_experts_survives(experts: bool | None) -> None:
    config = split_options({"experts": experts}, None)[0]
    assert config.experts is experts and split_options(config.options(), None)[0] == config


def test_a_config_is_immutable_and_hashable() -> None:
    config = S2OConfig(disable=["attention"])  # type: ignore[arg-type]  # what options= hands over
    assert hash(config) == hash(S2OConfig(disable=("attention",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = True  # type: ignore[misc]


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_can_be_disabled_by_name(name: str) -> None:
    assert split_options({"disable": [name]}, None)[0].disable == (name,)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_means_what_inductor_says_it_means(mode: str) -> None:
    config, patches = split_options(None, mode)
    assert config == S2OConfig()
    assert patches == list_mode_options()[mode]


def test_an_unknown_mode_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        OptionError, match=r"'mode' must be one of default, (?!default).*; got 'reduce_overhead'.*'reduce-overhead'"
    ):
        split_options(None, "reduce_overhead")
    compiled = torch.compile(matmul, backend="s2o", mode="fastest")
    with pytest.raises(BackendCompilerFailed, match="OptionError: option 'mode' must be one of"):
        compiled(torch.ones(2, 2))


def test_options_are_a_dictionary() -> None:
    with pytest.raises(OptionError, match=r"options must be a dictionary of names and values; got \[1\]"):
        split_options([1], None)  # type: ignore[arg-type]


def test_torch_itself_refuses_mode_and_options_together() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        torch.compile(matmul, backend="s2o", mode="reduce-overhead", options={"verify": "off"})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_options_of_inductor_are_refused_when_inductor_does_not_run(inner: str) -> None:
    with pytest.raises(OptionError, match=rf"\['max_autotune'\] belong to Inductor, .*inner={inner!r} does not run"):
        split_options({"inner": inner, "max_autotune": True}, None)
    with pytest.raises(OptionError, match="belong to Inductor"):
        split_options({"inner": inner}, "reduce-overhead")


def test_options_of_inductor_pass_through_as_written_with_dashes_or_underscores() -> None:
    _, patches = split_options({"max-autotune": True, "epilogue_fusion": False, "verify": "off"}, None)
    assert patches == {"max_autotune": True, "epilogue_fusion": False}


class Probe(CustomGraphPass):  # type: ignore[misc]
    """Reads Inductor's settings while Inductor works."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append((inductor_config.epilogue_fusion, inductor_config.max_autotune))

    def uuid(self) -> None:
        return None


def test_options_of_inductor_take_effect_and_end_with_the_compilation() -> None:
    before = inductor_config.epilogue_fusion, inductor_config.max_autotune
    probe = Probe()
    options = {"epilogue_fusion": not before[0], "max_autotune": not before[1], "post_grad_custom_pre_pass": probe}
    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(matmul, backend="s2o", options=options)(x), x @ x)
    assert probe.seen == [(not before[0], not before[1])]
    assert (inductor_config.epilogue_fusion, inductor_config.max_autotune) == before


def test_a_mode_takes_effect() -> None:
    probe = Probe()
    with inductor_config.patch(post_grad_custom_pre_pass=probe):
        torch.compile(matmul, backend="s2o", mode="max-autotune-no-cudagraphs")(torch.randn(4, 4))
    assert [autotune for _, autotune in probe.seen] == [True]


def test_the_cache_key_holds_every_option_that_changes_the_result() -> None:
    key = S2OConfig().key()
    changes: dict[str, Any] = {
        "inner": "aot_eager",
        "verify": "off",
        "disable": ("lift-masks",),
        "experts": False,
        "exclude": ("layers.*",),
        "budget": 0.25,
        "budgets": {"layers.*": 0.0},
        "max_density": 0.5,
        "min_seq": 1,
        "audit": 1,
    }
    for name, value in changes.items():
        assert S2OConfig(**{name: value}).key() != key, name
    for name, value in {"strict": True, "dump_dir": "graphs"}.items():
        assert S2OConfig(**{name: value}).key() == key, name
    assert {*changes, "strict", "dump_dir"} == {field.name for field in dataclasses.fields(S2OConfig)}


def test_the_first_pattern_that_fits_sets_the_budget_of_a_site() -> None:
    config = S2OConfig(budget=0.5, budgets={"layers.0.*": 0.0, "layers.[12].*": [0.1, 0.0], "layers.*": 0.3})
    budgets = {}
    for where in ("layers.0.attn", "layers.1.attn", "layers.3.attn", "head"):
        policy = config.policy(where, 2, "cpu")
        budgets[where] = policy and policy.budgets
    assert budgets == {
        "layers.0.attn": None,
        "layers.1.attn": (0.1, 0.0),
        "layers.3.attn": (0.3,),
        "head": (0.5,),
    }


def test_a_policy_is_for_devices_that_were_measured_or_asked_for() -> None:
    assert S2OConfig().policy("attn", 2, "cpu") is not None
    assert S2OConfig().policy("attn", 2, "xpu") is None
    asked = S2OConfig(min_seq=512, max_density=0.5, audit=3).policy("attn", 2, "xpu")
    assert asked is not None and (asked.min_seq, asked.max_density, asked.audit) == (512, 0.5, 3)
    assert S2OConfig(budget=0).policy("attn", 2, "cpu") is None
    assert S2OConfig(disable=("sparse",)).policy("attn", 2, "cpu") is None


def test_budgets_must_be_as_many_as_heads() -> None:
    with pytest.raises(OptionError, match=r"'budgets' gives 'attn' 3 numbers; it has 4 query heads"):
        S2OConfig(budgets={"*": [0.1, 0.2, 0.3]}).policy("attn", 4, "cpu")


def test_a_config_survives_json_and_options() -> None:
    config = S2OConfig(budget=0.25, budgets={"a.*": [0.5, 0.0], "b": 1}, exclude=("c",), min_seq=17)
    assert S2OConfig.from_json(config.to_json()) == config
    assert split_options(config.options(), None)[0] == config
    assert S2OConfig().options() == {}
    for text in ("", "[]", '{"budgett": 1}'):
        with pytest.raises(OptionError, match="config"):
            S2OConfig.from_json(text)
    with pytest.raises(OptionError, match="'budget' must be a number from 0 to 1; got 7"):
        S2OConfig.from_json('{"budget": 7}')
