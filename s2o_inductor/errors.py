"""Errors that s2o raises at users. A site that cannot be rewritten is a decline, never an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class S2OError(Exception):
    """Base of every error of this package."""


class OptionError(S2OError, ValueError):
    """An option has an unknown name or a value out of range."""


class UnsupportedTorchError(S2OError, RuntimeError):
    """The installed torch is older than this backend supports."""


class VerificationError(S2OError, AssertionError):
    """Under ``strict``, a rewritten region does not agree with the code it replaces."""


class DeclinedError(S2OError, RuntimeError):
    """Under ``strict``, a candidate site was declined."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or the empty string when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
