"""Options of the backend: one frozen dataclass, read from ``torch.compile(options=...)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from s2o_inductor.errors import OptionError, nearest

Inner = Literal["inductor", "aot_eager", "eager"]
Verify = Literal["first", "always", "off"]
PASSES = ("attention", "multi-head", "lift-masks", "moe")
_PREFIX = "s2o."


@dataclasses.dataclass(frozen=True)
class S2OConfig:
    """What the backend does. Every option may also be written with the prefix ``s2o.``.

    Attributes:
        inner: compiler of the rewritten graph. "aot_eager" and "eager" generate no code: they are
            for debugging and tests. "eager" does not lift masks, having no joint graph.
        verify: compare every distinct rewritten region with the code it replaces before keeping it:
            "first" once per structure and process, "always" each time, "off" never.
        strict: raise instead of declining a site, and on a failed verification.
        disable: names of passes not to run; see `PASSES`.
        exclude: shell-style patterns of module paths whose sites stay as they are.
        dump_dir: folder for the graphs before and after each stage; None writes nothing.
    """

    inner: Inner = "inductor"
    verify: Verify = "first"
    strict: bool = False
    disable: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dump_dir: str | None = None

    def __post_init__(self) -> None:
        _one_of("inner", self.inner, get_args(Inner))
        _one_of("verify", self.verify, get_args(Verify))
        if not isinstance(self.strict, bool):
            raise OptionError(f"option 'strict' must be True or False; got {self.strict!r}")
        for name in ("disable", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise OptionError(f"option {name!r} must be a list of strings; got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in self.disable:
            _one_of("disable", name, PASSES)
        if self.dump_dir is not None and not isinstance(self.dump_dir, str):
            raise OptionError(f"option 'dump_dir' must be a folder's path; got {self.dump_dir!r}")

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

    known_inductor = inductor_config.get_config_copy()
    ours = {field.name for field in dataclasses.fields(S2OConfig)}
    patches: dict[str, Any] = {}
    if mode not in (None, "default"):
        modes = list_mode_options()
        _one_of("mode", mode, ("default", *modes))
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
