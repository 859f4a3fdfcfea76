"""Compiles a C++ file of this folder for the machine at hand and loads it, once per machine and compiler.

The files have a plain C interface and include neither torch nor Python, which makes them compile in three seconds
and the result independent of both. It lies in `$S2O_CACHE_DIR`, by default `s2o_inductor` in the user's cache
folder, under a name made of the source, the compiler and the instruction set. Where anything is missing, callers
get None and take their torch code; nothing here raises.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger("s2o_inductor")

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
# How compilers spell "for this machine"; some know none of them.
_TARGETS = (("-march=native",), ("-mcpu=native",), ())
_SECONDS = 300


@functools.cache  # concurrent first calls may both build: the last to finish replaces an equal file
def library(name: str, wished: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library made from `name`.cpp; None, with one line in the log, where it cannot be had.

    Args:
        name: of the file.
        wished: options that make it faster, and that not every compiler knows.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        try:
            return ctypes.CDLL(str(_build(source, wished)))
        except (OSError, RuntimeError, subprocess.SubprocessError):
            if not wished:
                raise
            return ctypes.CDLL(str(_build(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("no native CPU kernel %r, torch code runs instead: %s", name, error)
        return None


def cache_folder() -> Path:
    """Where libraries are kept.

    Raises:
        RuntimeError: there is no home directory.
    """
    if chosen := os.environ.get("S2O_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2o_inductor"


def _compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, or the first that is found."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in CXX")


def _target(compiler: list[str]) -> tuple[tuple[str, ...], bytes]:
    """The flags that compile for this machine, and the macros then predefined: compiler version, instruction set."""
    message = ""
    for flags in _TARGETS:
        command = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
        if done.returncode == 0:
            return flags, done.stdout
        message = done.stderr.decode(errors="replace")
    raise RuntimeError(f"{shlex.join(compiler)} does not work: {message.strip()[:500]}")


def _build(source: Path, wished: tuple[str, ...] = ()) -> Path:
    """The path of the compiled library, which is made where it is missing."""
    compiler = _compiler()
    flags, macros = _target(compiler)
    command = [*compiler, *_FLAGS, *flags, *wished]
    texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(b"\0".join((shlex.join(command).encode(), macros, *texts))).hexdigest()[:20]
    folder = cache_folder()
    path = folder / f"{source.stem}-{key}.so"
    if path.is_file():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written under another name and moved: processes that build at the same time never load half a file.
    with tempfile.TemporaryDirectory(dir=folder) as room:
        unfinished = Path(room) / path.name
        done = subprocess.run(
            [*command, str(source), "-o", str(unfinished)], capture_output=True, text=True, timeout=_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed on {source.name}: {done.stderr.strip()[:500]}")
        unfinished.replace(path)
    return path
