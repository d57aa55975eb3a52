"""Compile `filter.cpp` on first use, for the processor at hand, and keep it in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from ..build_cache import load_or_build

_SOURCE = Path(__file__).with_name('filter.cpp')
_FLAGS = ('-std=c++17', '-O3', '-fPIC', '-shared', '-pthread')


class BuildError(RuntimeError):
    """The library cannot be built or loaded on this machine."""


@functools.cache
def load() -> ctypes.CDLL:
    """Return the compiled library, from the cache if it was compiled before.

    Raises:
        BuildError: If there is no compiler, it fails, or its result cannot be loaded.
    """
    compiler = _find_compiler()
    name = f'filter-{_fingerprint(compiler)}.so'
    try:
        return load_or_build(
            name, lambda target: _compile(compiler, target), lambda file: ctypes.CDLL(str(file))
        )
    except OSError as e:
        raise BuildError(f'the compiled library cannot be loaded: {e}') from e


def _find_compiler() -> list[str]:
    """Return the command of the first C++ compiler there is; `$CXX` may hold arguments, too."""
    for command in (os.environ.get('CXX', ''), 'c++', 'g++', 'clang++'):
        try:
            words = shlex.split(command)
        except ValueError as e:
            raise BuildError(f'$CXX cannot be parsed ({e}): {command}') from e
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise BuildError('it needs a C++ compiler: $CXX, c++, g++ or clang++')


def _flags() -> tuple[str, ...]:
    native = '-march=native' if platform.machine() in ('x86_64', 'AMD64') else '-mcpu=native'
    return (*_FLAGS, native)


def _fingerprint(compiler: list[str]) -> str:
    """Hash everything that decides what the compiler makes, and where it runs."""
    version = _run([*compiler, '--version'])
    parts = (compiler, version, _flags(), _processor())
    return hashlib.sha256(_SOURCE.read_bytes() + repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Describe what `native` stands for: homes are shared by machines that differ."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').split('\n\n')[0].splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    names = ('model name', 'flags', 'Features', 'CPU implementer', 'CPU part')
    return '\n'.join(line for line in lines if line.startswith(names))


def _compile(compiler: list[str], target: Path) -> None:
    logging.getLogger(__name__).info('Compiling %s with %s', _SOURCE.name, compiler[0])
    _run([*compiler, *_flags(), str(_SOURCE), '-o', str(target)])


def _run(command: list[str]) -> str:
    # Messages in English, whatever the user's language.
    env = {**os.environ, 'LC_ALL': 'C'}
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, errors='replace', env=env, check=False
        )
    except OSError as e:
        raise BuildError(f'the C++ compiler {command[0]} does not run: {e.strerror}') from e
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f'exit code {process.returncode}']
        first = next((line for line in lines if 'error' in line), lines[-1])
        raise BuildError(f'the C++ compiler {command[0]} fails: {first}')
    return process.stdout
