"""Options of the backend: one frozen dataclass, read from ``torch.compile(options=...)``."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from s2o_inductor.errors import OptionError, nearest
from s2o_inductor.sparse_policy import MIN_SEQ, SparsePolicy

Inner = Literal["inductor", "aot_eager", "eager"]
Verify = Literal["first", "always", "off"]
PASSES = ("attention", "multi-head", "lift-masks", "sparse", "router")
_PREFIX = "s2o."
# Changes the loss of a trained model by less than 0.2 % (BENCHMARKS.md, "What sparse selections lose").
DEFAULT_BUDGET = 0.5


@dataclasses.dataclass(frozen=True)
class S2OConfig:
    """What the backend does. Every option may also be written with the prefix ``s2o.``.

    Attributes:
        inner: compiler of the rewritten graph. "aot_eager" and "eager" generate no code: they are
            for debugging and tests. "eager" does not lift masks, having no joint graph.
        verify: compare every distinct rewritten region with the code it replaces before keeping it:
            "first" once per structure and process, "always" each time, "off" never.
        strict: raise instead of declining a site, and on a failed verification.
        disable: names of passes not to run; see `PASSES`. "router" is the part of `experts` that computes scores
            and choices of rewritten layers on CUDA in fewer steps.
        experts: rewrite mixtures of experts, too, and on CUDA their routers: True all that are found, False none, None
            those that then take no longer, by measurement (BENCHMARKS.md): all but a few forms on CPU.
        exclude: shell-style patterns of module paths whose sites stay as they are.
        dump_dir: folder for the graphs before and after each stage; None writes nothing.
        budget: how far long attention may be approximated where no gradients are needed: the estimated share
            of its softmax mass that the worst query of a tile may leave unread, from 0 to 1. 0 is exact. A dial,
            not a bound: BENCHMARKS.md says what it does on real heads, and the report says what it did on yours.
        budgets: budgets of single sites: shell-style patterns of module paths to one number, or to one
            number per query head. The first pattern that fits decides; `calibrate` writes these.
        max_density: largest share of its prefix that a tile of queries reads, above 0 and up to 1.
        min_seq: fewest keys from which attention is approximated; None is what was measured for the device.
        audit: rows per head whose exact result is computed as well, for the error in the report.
    """

    inner: Inner = "inductor"
    verify: Verify = "first"
    strict: bool = False
    disable: tuple[str, ...] = ()
    experts: bool | None = None
    exclude: tuple[str, ...] = ()
    dump_dir: str | None = None
    budget: float = DEFAULT_BUDGET
    budgets: Mapping[str, float | tuple[float, ...]] = dataclasses.field(default_factory=dict, hash=False)
    max_density: float = 1.0
    min_seq: int | None = None
    audit: int = 0

    def __post_init__(self) -> None:
        _one_of("inner", self.inner, get_args(Inner))
        _one_of("verify", self.verify, get_args(Verify))
        if not isinstance(self.strict, bool):
            raise OptionError(f"option 'strict' must be True or False; got {self.strict!r}")
        if self.experts is not None and not isinstance(self.experts, bool):
            raise OptionError(f"option 'experts' must be True or False, or None to decide; got {self.experts!r}")
        for name in ("disable", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise OptionError(f"option {name!r} must be a list of strings; got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in self.disable:
            _one_of("disable", name, PASSES)
        if self.dump_dir is not None and not isinstance(self.dump_dir, str):
            raise OptionError(f"option 'dump_dir' must be a folder's path; got {self.dump_dir!r}")
        object.__setattr__(self, "budget", _number("budget", self.budget))
        object.__setattr__(self, "budgets", _budgets(self.budgets))
        object.__setattr__(self, "max_density", _number("max_density", self.max_density))
        if self.max_density == 0.0:
            raise OptionError("option 'max_density' must be above 0, up to 1; got 0. For exact results set budget=0.")
        for name in ("min_seq", "audit"):
            value = getattr(self, name)
            if value is None and name == "min_seq":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"option {name!r} must be an integer from 0 on; got {value!r}")

    def policy(self, where: str, heads: int, device: str) -> SparsePolicy | None:
        """How far the attention at a module path may be approximated; None keeps it exact.

        Raises:
            OptionError: a list of budgets does not have one for each of the site's query heads.
        """
        min_seq = MIN_SEQ.get(device) if self.min_seq is None else self.min_seq
        found = (value for pattern, value in self.budgets.items() if fnmatch.fnmatch(where, pattern))
        budget = next(found, self.budget)
        budgets = budget if isinstance(budget, tuple) else (budget,)
        if len(budgets) not in (1, heads):
            raise OptionError(f"option 'budgets' gives {where!r} {len(budgets)} numbers; it has {heads} query heads")
        if min_seq is None or not any(budgets) or "sparse" in self.disable:
            return None
        return SparsePolicy(budgets, self.max_density, min_seq, self.audit)

    def options(self) -> dict[str, Any]:
        """What differs from the defaults, for ``torch.compile(backend="s2o", options=config.options())``."""
        default = S2OConfig()
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in kept.items() if value != getattr(default, name)}

    def to_json(self) -> str:
        """The config as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> S2OConfig:
        """The config that `to_json` wrote.

        Raises:
            OptionError: the text is not JSON, or names an option that does not exist or is out of range.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise OptionError(f"not a config: {error}; write it with S2OConfig.to_json()") from error
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or not set(fields) <= set(known):
            raise OptionError(f"a config is a JSON object with the keys {', '.join(known)}; got {text[:200]!r}")
        return cls(**fields)

    def key(self) -> str:
        """What compiled artifacts depend on, as text for cache keys."""
        kept = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("dump_dir", "strict")}
        return repr(sorted(kept.items()))


def split_options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[S2OConfig, dict[str, Any]]:
    """Our config and Inductor's config patches, out of what the user gave to ``torch.compile``.

    Raises:
        OptionError: a name that neither we nor Inductor know, a value out of range, or Inductor
            options together with an inner compiler that would ignore them.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options

    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a dictionary of names and values; got {options!r}")
    known_inductor = inductor_config.get_config_copy()
    ours = {field.name for field in dataclasses.fields(S2OConfig)}
    patches: dict[str, Any] = {}
    if mode not in (None, "default"):
        modes = list_mode_options()
        _one_of("mode", mode, tuple(dict.fromkeys(("default", *modes))))
        patches.update(modes[mode])
    mine: dict[str, Any] = {}
    for name, value in (options or {}).items():
        short = name.removeprefix(_PREFIX)
        inductor_name = name.replace("-", "_")
        if short in mine:
            raise OptionError(f"option {short!r} is given twice, with and without the prefix {_PREFIX!r}; keep one.")
        if short in ours:
            mine[short] = value
        elif inductor_name in known_inductor and not name.startswith(_PREFIX):
            _check_inductor_type(inductor_name, value, known_inductor[inductor_name])
            patches[inductor_name] = value
        else:
            known = [*ours, *(_PREFIX + item for item in ours), *known_inductor]
            raise OptionError(
                f"unknown option {name!r}.{nearest(name, known)} s2o has {', '.join(sorted(ours))}; "
                "any option of torch._inductor.config passes through."
            )
    config = S2OConfig(**mine)
    if patches and config.inner != "inductor":
        raise OptionError(
            f"options {sorted(patches)} belong to Inductor, which inner={config.inner!r} does not run; "
            "leave them out or use inner='inductor'."
        )
    return config, patches


def _number(option: str, value: object, of: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise OptionError(f"option {option!r}{of} must be a number from 0 to 1; got {value!r}")
    return float(value)


def _budgets(given: object) -> dict[str, float | tuple[float, ...]]:
    if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(f"option 'budgets' must map patterns of module paths to budgets; got {given!r}")
    found: dict[str, float | tuple[float, ...]] = {}
    for pattern, value in given.items():
        of = f" for {pattern!r}"
        several = isinstance(value, (list, tuple)) and value
        found[pattern] = (
            tuple(_number("budgets", one, of) for one in value) if several else _number("budgets", value, of)
        )
    return found


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise OptionError(f"option {option!r} must be one of {', '.join(allowed)}; got {value!r}.{hint}")


def _check_inductor_type(name: str, value: object, default: object) -> None:
    """Only plain values have a type to check; anything else is Inductor's to judge."""
    if not isinstance(default, (bool, int, float, str)) or isinstance(value, (type(default), type(None))):
        return
    if not (isinstance(default, float) and isinstance(value, int)):
        raise OptionError(
            f"Inductor's option {name!r} takes a {type(default).__name__}; got {type(value).__name__} {value!r}."
        )
