"""Import the dependencies, print what was found, and say how to repair what is wrong.

    python tools/check_environment.py [--ops]

The exit status is 1 if something does not work. With --ops, missing operators of mmcv count, too.
This needs the standard library alone, so it also works where the dependencies are broken.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP = f'{sys.executable} -m pip'


@dataclass(frozen=True)
class Package:
    """A dependency.

    Attributes:
        module: The name for `import`.
        distribution: The name for pip.
        others: Other distributions that install the same module.
        probe: The module whose import shows that the package works, if it is not `module`.
    """

    module: str
    distribution: str
    others: tuple[str, ...] = ()
    probe: str = ''


# In the order of their dependencies, so that a cause is reported before its consequences.
STACK = (
    Package('numpy', 'numpy'),
    Package('torch', 'torch'),
    Package('torchvision', 'torchvision'),
    Package('timm', 'timm'),
    Package('cv2', 'opencv-python-headless', ('opencv-python',), probe='cv2.mat_wrapper'),
    Package('mmengine', 'onedl-mmengine', ('mmengine', 'mmengine-lite')),
    Package('mmcv', 'onedl-mmcv', ('mmcv', 'mmcv-full', 'mmcv-lite')),
    Package('mmseg', 'onedl-mmsegmentation', ('mmsegmentation',), probe='mmseg.models'),
    Package('mmdet', 'onedl-mmdetection', ('mmdet',)),
    Package('pycocotools', 'pycocotools', probe='pycocotools.mask'),
    Package('matplotlib', 'matplotlib', probe='matplotlib.figure'),
    Package('sklearn', 'scikit-learn'),
    Package('PIL', 'pillow', probe='PIL.Image'),
)
OPERATORS = 'mmcv.ops'

# Reasons for the bounds of pyproject.toml that users run into.
REASONS = {
    'torch': 'safe loading needs 2.6, and mmcv does not compile against the C++20 headers of 2.14',
    'numpy': 'mmsegmentation needs numpy 2',
}


@dataclass
class Facts:
    """The state of an environment.

    Attributes:
        installed: Version of every installed distribution, by its name.
        pinned: The versions of requirements.txt, by distribution.
        allowed: Whether pyproject.toml allows a version, by distribution.
        errors: The error of importing a package or `OPERATORS`, by module.
        has_operators: Whether mmcv has a compiled extension, even one that does not load.
        package: The folder that `import gfnet_dense` finds, or None.
    """

    installed: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    allowed: dict[str, Callable[[str], bool]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    has_operators: bool = False
    package: Path | None = None

    def found(self, package: Package) -> tuple[str, str] | None:
        """Return the distribution that provides `package` and its version, or None."""
        for name in (package.distribution, *package.others):
            if name in self.installed:
                return name, self.installed[name]
        return None

    def requirement(self, distribution: str) -> str:
        """Return the argument for pip, such as `'torch==2.12.1'`."""
        pin = self.pinned.get(distribution)
        return f'{distribution}=={pin}' if pin else distribution


@dataclass(frozen=True)
class Problem:
    """Something wrong with some modules, and the command that repairs it."""

    modules: tuple[str, ...]
    text: str
    remedy: str
    fatal: bool = True


def diagnose(facts: Facts, ops: bool) -> list[Problem]:
    """Return everything wrong with an environment, in the order in which to repair it.

    Once a rule finds something fatal about a package, later rules do not report the package.

    Args:
        facts: The state of the environment.
        ops: Whether mmcv's operators are needed.
    """
    wanted_operators = partial(operators, ops=ops)
    rules = (missing, upstream, opencv, out_of_bounds, wanted_operators, imports, not_pinned)
    problems: list[Problem] = []
    suspects = list(STACK)
    for rule in rules:
        problems += rule(facts, suspects)
        explained = {module for problem in problems if problem.fatal for module in problem.modules}
        suspects = [package for package in suspects if package.module not in explained]
    return [*problems, *own_package(facts)]


def missing(facts: Facts, suspects: list[Package]) -> Iterator[Problem]:
    """Find packages that no distribution provides."""
    absent = [package for package in suspects if facts.found(package) is None]
    if absent:
        names = [package.distribution for package in absent]
        remedy = f'{PIP} install {" ".join(map(facts.requirement, names))}'
        modules = tuple(package.module for package in absent)
        yield Problem(modules, f'Not installed: {", ".join(names)}.', remedy)


def upstream(facts: Facts, suspects: list[Package]) -> Iterator[Problem]:
    """Find upstream packages that were installed over the forks, or in their place."""
    for package in (package for package in suspects if package.distribution.startswith('onedl-')):
        fork = package.distribution
        for name in package.others:
            if name not in facts.installed:
                continue
            found = f'{name} {facts.installed[name]}'
            remedy = f'{PIP} uninstall -y {name} && {PIP} install --no-deps --force-reinstall '
            remedy += facts.requirement(fork)
            if fork not in facts.installed:
                text = f'{found} is the upstream package; only its fork {fork} was tested.'
                yield Problem((package.module,), text, remedy, fatal=False)
                continue
            text = f'{found} was installed over its fork {fork}: both write {package.module}/.'
            if name == 'mmsegmentation':
                text += ' mmengine does this for a config with `_base_ = "mmseg::..."`.'
            yield Problem((package.module,), text, remedy)


def opencv(facts: Facts, suspects: list[Package]) -> Iterator[Problem]:
    """Find two builds of OpenCV with different versions; both write the same folder."""
    both = ('opencv-python', 'opencv-python-headless')
    if len({facts.installed.get(name) for name in both} - {None}) == 2:
        found = ' and '.join(f'{name} {facts.installed[name]}' for name in both)
        remedy = f'{PIP} install --no-deps --force-reinstall '
        remedy += ' '.join(map(facts.requirement, both))
        yield Problem(('cv2',), f'{found} have both written the folder cv2/.', remedy)


def out_of_bounds(facts: Facts, suspects: list[Package]) -> Iterator[Problem]:
    """Find versions that pyproject.toml excludes."""
    for package in suspects:
        name = package.distribution
        found = facts.installed.get(name)
        if found and name in facts.allowed and not facts.allowed[name](found):
            reason = REASONS.get(name, 'pyproject.toml excludes it')
            remedy = f'{PIP} install {facts.requirement(name)}'
            yield Problem((package.module,), f'{name} {found} does not fit: {reason}.', remedy)


def operators(facts: Facts, suspects: list[Package], ops: bool) -> Iterator[Problem]:
    """Find operators of mmcv that are missing but needed, or compiled for another torch."""
    error = facts.errors.get(OPERATORS)
    if error is None or facts.errors.keys() & {'torch', 'mmcv'}:
        return
    remedy = f'{sys.executable} {ROOT / "tools" / "install_mmcv_ops.py"}'
    if facts.has_operators:
        # mmseg works without operators, but not with broken ones.
        stopped = [
            package.module for package in suspects if facts.errors.get(package.module) == error
        ]
        text = (
            f'The operators of mmcv do not load ({error}). They were compiled for another torch; '
        )
        text += 'pip may have taken an old wheel from its cache.'
        if not ops:
            remedy = f'{PIP} install --no-cache-dir --no-deps --force-reinstall '
            remedy += facts.requirement('onedl-mmcv')
        yield Problem((OPERATORS, *stopped), text, remedy)
    elif ops:
        text = 'mmcv was installed without its compiled operators, which detection needs.'
        yield Problem((OPERATORS,), text, remedy)


def imports(facts: Facts, suspects: list[Package]) -> Iterator[Problem]:
    """Find packages that do not import; report an error that reaches several for the first."""
    first: dict[str, Package] = {}
    for package in STACK:
        if error := facts.errors.get(package.module):
            first.setdefault(error, package)
    for error, package in first.items():
        if package not in suspects:
            continue
        text = f'{package.module} does not import ({error}).'
        absent = re.search(r"No module named '(\w+)", error)
        if 'torchvision::nms' in error:
            text += ' It was built for another version of torch.'
            pair = f'{facts.requirement("torch")} {facts.requirement("torchvision")}'
            remedy = f'{PIP} install {pair}'
        elif absent and absent[1] != package.module:
            remedy = f'{PIP} install -r {ROOT / "requirements.txt"}'
        else:
            if 'libGL' in error:
                text += ' This is the desktop build of OpenCV; the headless one needs no libGL.'
            requirement = facts.requirement(package.distribution)
            remedy = f'{PIP} install --no-deps --force-reinstall {requirement}'
        yield Problem((package.module,), text, remedy)


def not_pinned(facts: Facts, suspects: list[Package]) -> Iterator[Problem]:
    """Find versions other than the tested ones."""
    others = []
    for package in suspects:
        name, version = facts.found(package) or ('', '')
        if name in facts.pinned and version != facts.pinned[name]:
            others.append((package.module, name, version))
    if others:
        modules, names, versions = zip(*others, strict=True)
        text = ', '.join(f'{name} {version}' for name, version in zip(names, versions, strict=True))
        remedy = f'{PIP} install {" ".join(map(facts.requirement, names))}'
        yield Problem(modules, f'Not the tested version: {text}.', remedy, fatal=False)


def own_package(facts: Facts) -> Iterator[Problem]:
    """Find out whether gfnet_dense is missing, or another copy than this one."""
    if facts.package not in (ROOT / 'gfnet_dense', ROOT.parent):  # a checkout, an installed wheel
        where = f'comes from {facts.package}' if facts.package else 'is not installed'
        remedy = f'{PIP} install --no-deps -e {ROOT}'
        yield Problem(('gfnet_dense',), f'gfnet_dense {where}.', remedy)


def observe() -> Facts:
    """Return the state of the environment that runs this."""
    facts = Facts()
    for distribution in importlib.metadata.distributions():
        facts.installed.setdefault(canonical(distribution.name), public(distribution.version))

    pins = ROOT / 'requirements.txt'
    if pins.exists():
        facts.pinned = dict(re.findall(r'^([\w.-]+)==([\w.]+)', pins.read_text(), re.MULTILINE))
    facts.allowed = bounds()

    for package in STACK:
        if error := import_error(package.probe or package.module):
            facts.errors[package.module] = error
    if error := import_error(OPERATORS):
        facts.errors[OPERATORS] = error
    if 'mmcv' not in facts.errors:
        facts.has_operators = importlib.util.find_spec('mmcv._ext') is not None

    # Find the package without importing it, because its dependencies may be broken.
    if (spec := importlib.util.find_spec('gfnet_dense')) and spec.origin:
        facts.package = Path(spec.origin).resolve().parent
    return facts


def canonical(name: str) -> str:
    """Return the name of a distribution in the form that pip compares."""
    return re.sub(r'[-_.]+', '-', name).lower()


def public(version: str) -> str:
    """Return a version without its local part: 2.12.1 for `'2.12.1+cu130'`."""
    return version.partition('+')[0]


def bounds() -> dict[str, Callable[[str], bool]]:
    """Return the version bounds in the metadata of gfnet-dense, including those of its extras."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        texts = importlib.metadata.requires('gfnet-dense') or []
    except ImportError:  # PackageNotFoundError, for a missing distribution, is one, too
        return {}
    specifiers: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, texts):
        name = canonical(requirement.name)
        specifiers[name] = specifiers.get(name, SpecifierSet()) & requirement.specifier
    return {name: partial(each.contains, prereleases=True) for name, each in specifiers.items()}


def import_error(module: str) -> str:
    """Return the error of importing `module` in one line; empty if there is none."""
    silence = io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            importlib.import_module(module)
    except Exception as error:  # broken packages raise OSError, AssertionError and others
        return f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'[:200]
    return ''


def print_table(facts: Facts, problems: list[Problem]) -> None:
    """Print a line for each package."""
    status = {}
    for problem in problems:
        for module in problem.modules:
            status.setdefault(module, 'ERROR' if problem.fatal else 'note')
    rows = [('package', 'distribution', 'found', 'tested', '')]
    for package in STACK:
        name, version = facts.found(package) or (package.distribution, '-')
        tested = facts.pinned.get(name, '-')
        rows.append((package.module, name, version, tested, status.get(package.module, 'ok')))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print('  '.join(map(str.ljust, row, widths)).rstrip())


def print_machine(facts: Facts) -> None:
    """Print Python, system, GPUs, and whether filters and mmcv have their compiled parts."""
    system = f'{platform.system()} {platform.machine()}, {os.cpu_count()} processors'
    print(f'Python {platform.python_version()}, {system}')
    if 'torch' not in facts.errors:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f'device: {", ".join(gpus) or "CPU (torch sees no GPU)"}')
        if not import_error('gfnet_dense.spectral'):
            from gfnet_dense.spectral import unsupported_reason

            reason = unsupported_reason(torch.empty(1, 1, 1, 1), 'native')  # compiles it
            slower = 'without it filters on a CPU take several times as long'
            print(f'filters in C++: {f"no: {reason}; {slower}" if reason else "yes"}')
            for gpu in range(len(gpus)):
                x = torch.empty(1, 8, 8, 8, dtype=torch.bfloat16, device=f'cuda:{gpu}')
                reason = unsupported_reason(x, 'fused')
                print(f'filters on GPU {gpu}: {f"by torch.fft: {reason}" if reason else "fused"}')
    if 'mmcv' in facts.errors:
        return
    if OPERATORS in facts.errors:
        print('mmcv operators: no; only detection needs them')
    else:
        from mmcv.ops import get_compiling_cuda_version

        cuda = get_compiling_cuda_version()
        target = 'the CPU' if cuda == 'not available' else f'CUDA {cuda}'
        print(f'mmcv operators: yes, compiled for {target}')


def main() -> int:
    """Check the environment, print a report and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ops', action='store_true', help="also require mmcv's operators")
    args = parser.parse_args()
    warnings.simplefilter('ignore')

    facts = observe()
    problems = diagnose(facts, args.ops)
    print_table(facts, problems)
    print_machine(facts)
    for problem in problems:
        print(
            f'\n{"ERROR" if problem.fatal else "note"}: {problem.text}\n  repair: {problem.remedy}'
        )
    return int(any(problem.fatal for problem in problems))


if __name__ == '__main__':
    sys.exit(main())
