"""Compile and install the operators of mmcv, which detection needs.

    python tools/install_mmcv_ops.py

compiles them for the mmcv and the torch of the Python that runs this. The wheel is kept in the
user's cache folder, from where later environments with the same versions install it within a
minute. Operators that load already are kept.

pip alone is not enough. Its isolated build finds no torch and leaves the operators out without a
message. It also caches the wheel under one key, whether it has operators or not and whatever torch
they were compiled for.
"""

import argparse
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = 'onedl-mmcv'
BUILD_TOOLS = ('setuptools>=80,<82', 'wheel', 'packaging', 'ninja')  # torch 2.12 needs <82
HEARTBEAT_SECONDS = 30
GIB_PER_JOB = 2  # one compiler process takes about 1 GiB


class InstallError(Exception):
    """The operators cannot be installed; the message gives reason and remedy."""


def cache_root() -> Path:
    """Return the folder for compiled wheels, in the user's cache and outside every checkout."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'gfnet-dense'


def wheel_folder(root: Path, mmcv: str, torch: str, device: str) -> Path:
    """Return the folder of a wheel; its name has everything that the binary depends on."""
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    platform = sysconfig.get_platform()
    return root / f'mmcv-{mmcv}-torch{torch}-{device}-{python}-{platform}'


def find_wheel(folder: Path) -> Path | None:
    """Return the wheel in `folder`, or None; it is moved there only when it is complete."""
    return next(folder.glob('*.whl'), None)


def target_device() -> str:
    """Return the device to compile for, `'cuda'` or `'cpu'`.

    mmcv's setup.py compiles CUDA operators where torch sees a GPU or FORCE_CUDA=1 is set. It fails
    without an nvcc of torch's CUDA version.
    """
    import torch

    wanted = torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'
    if not wanted or torch.version.cuda is None:
        return 'cpu'

    from torch.utils.cpp_extension import CUDA_HOME  # warns where there is no GPU

    try:
        nvcc = subprocess.check_output([f'{CUDA_HOME}/bin/nvcc', '--version'], text=True)
    except OSError:
        nvcc = ''
    major = torch.version.cuda.split('.')[0]
    if f'release {major}.' in nvcc:
        return 'cuda'
    print(
        f'There is a GPU but no nvcc of CUDA {major}. The operators are compiled for the CPU\n'
        'only, and detection cannot train on the GPU. To change this, install CUDA '
        f'{major}\nwith nvcc and run this again.'
    )
    return 'cpu'


def operators_work(device: str) -> bool:
    """Tell whether a new process loads mmcv's operators, for `'cuda'` with their CUDA part."""
    code = 'import mmcv.ops; print(mmcv.ops.get_compiling_cuda_version())'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    return result.returncode == 0 and (device == 'cpu' or 'not available' not in result.stdout)


def require_compiler() -> None:
    """Raise InstallError unless a C++17 program that includes Python's headers compiles."""
    compiler = shlex.split(os.environ.get('CXX', 'c++'))
    if shutil.which(compiler[0]) is None:
        raise InstallError(
            f"mmcv's operators must be compiled, but there is no C++ compiler ({compiler[0]}).\n"
            'On Debian and Ubuntu: sudo apt install g++'
        )
    python_dev = f'python{sys.version_info.major}.{sys.version_info.minor}-dev'
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text('#include <Python.h>\n#include <string_view>\n')
        include = f'-I{sysconfig.get_path("include")}'
        command = [*compiler, '-std=c++17', include, '-fsyntax-only', str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if 'Python.h' in result.stderr:
        raise InstallError(
            "mmcv's operators must be compiled, but the header Python.h is missing.\n"
            f'On Debian and Ubuntu: sudo apt install {python_dev}'
        )
    if result.returncode != 0:
        raise InstallError(f'{compiler[0]} does not compile C++17:\n{result.stderr.strip()}')


def require_build_tools() -> None:
    """Raise InstallError if a Python package that the build imports is missing."""
    names = [re.match(r'\w+', tool)[0] for tool in BUILD_TOOLS]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(
            f'The build needs {", ".join(missing)}:\n'
            f'{sys.executable} -m pip install {shlex.join(BUILD_TOOLS)}'
        )


def announce() -> None:
    """Print what installing will do, and raise InstallError if it cannot."""
    if operators_work('cpu'):
        return
    # Neither is installed yet. torch appends to its version what it was built for.
    pins = (ROOT / 'requirements.txt').read_text()
    mmcv = re.search(rf'^{DISTRIBUTION}==(.+)', pins, re.MULTILINE)[1]
    torch = re.search('^torch==(.+)', pins, re.MULTILINE)[1]
    wanted = wheel_folder(cache_root(), mmcv, torch=f'{torch}*', device='*')
    if any(wanted.parent.glob(f'{wanted.name}/*.whl')):
        print("mmcv's operators were compiled before and are reused.")
        return
    print(
        "mmcv's operators must be compiled: half an hour to an hour on 2 CPU cores, once. The\n"
        f'wheel is kept in {cache_root()}, and later installations take a minute.'
    )
    require_compiler()


def parallel_jobs() -> int:
    """Return how many compilers to run at once, by the number of processors and the memory."""
    processors = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return max(1, min(processors, int(memory / GIB_PER_JOB)))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock `folder`; the system releases the lock when this process ends, however it ends."""
    with open(folder / 'lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('Waiting for another process that compiles the same wheel.')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress(build: Path) -> str:
    """Count the object files of a build against ninja's plan, as in `'12 of 78 files'`."""
    plan = next(build.rglob('build.ninja'), None)
    if plan is None:
        return 'preparing'
    total = len(re.findall(r'^build \S+\.o:', plan.read_text(), flags=re.MULTILINE))
    done = sum(1 for _ in plan.parent.rglob('*.o'))
    return f'{done} of {total} files compiled'


def compile_wheel(mmcv: str, device: str, folder: Path) -> Path:
    """Compile the wheel and move it into `folder`, which the caller must have locked."""
    build, log = folder / 'build', folder / 'build.log'
    shutil.rmtree(build, ignore_errors=True)  # remains of an interrupted build
    build.mkdir()
    scripts = sysconfig.get_path('scripts')
    environment = {
        'MAX_JOBS': str(parallel_jobs()),
        **os.environ,
        'PATH': f'{scripts}{os.pathsep}{os.environ["PATH"]}',  # where pip puts ninja
        'TMPDIR': str(build),
    }
    if device == 'cpu':
        environment.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
    command = [sys.executable, '-m', 'pip', 'wheel', '--verbose', '--wheel-dir', str(build)]
    command += ['--no-deps', '--no-cache-dir', '--no-build-isolation', '--no-binary', DISTRIBUTION]
    command += [f'{DISTRIBUTION}=={mmcv}']
    print(f'log: {log}')
    start = time.monotonic()
    with (
        open(log, 'w') as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
    ):
        while process.poll() is None:
            try:
                process.wait(HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                minutes, seconds = divmod(int(time.monotonic() - start), 60)
                print(f'  {minutes:2d} min {seconds:02d} s: {progress(build)}')
    wheel = find_wheel(build)
    if process.returncode != 0 or wheel is None:
        raise InstallError(f'Compiling failed:\n{excerpt(log)}\nThe whole log: {log}')
    if not any(name.startswith('mmcv/_ext') for name in zipfile.ZipFile(wheel).namelist()):
        raise InstallError(f'mmcv built a wheel without its operators. The log: {log}')
    finished = wheel.replace(folder / wheel.name)
    shutil.rmtree(build)
    return finished


def excerpt(log: Path) -> str:
    """Return the compiler's error messages from a log, or else its last lines."""
    lines = log.read_text(errors='replace').splitlines()
    errors = [line for line in lines if re.search(r'\berror ?:|\bKilled\b|No space left', line)]
    return '\n'.join(line[:300] for line in (errors[:5] or lines[-20:]))


def install() -> None:
    """Make `import mmcv.ops` work in this environment, or raise InstallError."""
    try:
        import torch

        mmcv = importlib.metadata.version(DISTRIBUTION)
    except (ImportError, OSError) as error:
        raise InstallError(f'{error}\nFirst: pip install -r requirements.txt') from error
    device = target_device()
    if operators_work(device):
        print("mmcv's operators are installed and load.")
        return

    folder = wheel_folder(cache_root(), mmcv, torch.__version__, device)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        wheel = find_wheel(folder)
        if wheel is None:
            require_compiler()
            require_build_tools()
            print(f'Compiling mmcv {mmcv} for torch {torch.__version__}, {device}')
            wheel = compile_wheel(mmcv, device, folder)
    print(f'Installing {wheel}')
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--force-reinstall']
    subprocess.run([*pip, '--no-index', str(wheel)], check=True)
    if not operators_work(device):
        raise InstallError(f'The operators of {wheel} do not load. Delete it and try again.')
    print("mmcv's operators are installed and load.")


def main() -> None:
    """Parse the command line and report an InstallError without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--announce',
        action='store_true',
        help='only print what will be done, and fail if a compiler is missing; needs no torch',
    )
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # shows the progress through a pipe, too
    try:
        if args.announce:
            announce()
        else:
            install()
    except (InstallError, subprocess.CalledProcessError) as error:
        sys.exit(f'\n{error}\n')


if __name__ == '__main__':
    main()
