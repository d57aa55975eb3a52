"""Processes that tests start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def run(
    *command: object,
    cwd: Path | None = None,
    status: int = 0,
    stderr: int = subprocess.STDOUT,
    **environment: object,
) -> subprocess.CompletedProcess:
    """Run a command that has to end with an exit status; it prints errors to its output.

    It finds this checkout's package and the helpers of the tests.
    """
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get('PYTHONPATH', '')])
    changes = {'PYTHONPATH': path, 'PYTHON': sys.executable, **environment}
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **{key: str(value) for key, value in changes.items()}},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert result.returncode == status, f'{result.stdout}{result.stderr or ""}'[-5000:]
    return result


def run_tool(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run a script of tools/, as :func:`run` runs a command."""
    interpreter = 'bash' if name.endswith('.sh') else sys.executable
    return run(interpreter, ROOT / 'tools' / name, *arguments, **options)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]
