"""Who may import whom, and what the core works without, with real imports."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

import gfnet_dense

PACKAGE = Path(gfnet_dense.__file__).parent
REPOSITORY = Path(__file__).parents[1]
OPENMMLAB_TASKS = {'mmseg', 'mmdet'}

# The rooms, the highest first. Each imports only rooms below it; the package itself is above all.
ROOMS = (
    'cli',
    'inference',
    'openmmlab',
    'durable',
    'data',
    'demo',
    'models',
    'serialization',
    'benchmark',
    'spectral',
)
# What a room may import when it is imported, besides the standard library and rooms below.
PACKAGES = {
    'spectral': {'torch'},
    'serialization': {'torch', 'numpy', 'safetensors'},
    'benchmark': {'torch'},
    'models': {'torch', 'timm', 'filelock', 'tqdm'},
}


@functools.cache
def imported_names(path: Path, at_import_time: bool = False) -> set[str]:
    """Return the full names of what a file imports, relative imports resolved.

    Names count whether they are modules or not: `from gfnet_dense import models` imports
    `gfnet_dense` and `gfnet_dense.models`.
    """
    names = set()
    for node in statements(ast.parse(path.read_text(encoding='utf-8')), at_import_time):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                package = path.relative_to(PACKAGE.parent).parts[: -node.level]
                base = '.'.join((*package, *base.split('.'))).rstrip('.')
            names.add(base)
            names.update(f'{base}.{alias.name}' for alias in node.names)
    return names


def statements(tree: ast.AST, at_import_time: bool) -> Iterator[ast.AST]:
    """Walk a tree, without the bodies of functions and what only type checkers run if asked."""
    for node in ast.iter_child_nodes(tree):
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test):
            continue
        yield node
        yield from statements(node, at_import_time)


def files(room: str = '') -> list[Path]:
    file = PACKAGE / f'{room}.py'
    found = [file] if file.exists() else sorted((PACKAGE / room).rglob('*.py'))
    assert found
    return found


def rooms(names: set[str]) -> set[str]:
    """Return the rooms of the package that names lie in."""
    return {name.split('.')[1] for name in names if name.startswith('gfnet_dense.')}


def others(names: set[str]) -> set[str]:
    """Return the packages of names that are neither ours nor Python's own."""
    return {name.split('.')[0] for name in names} - {'gfnet_dense', *sys.stdlib_module_names}


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_the_rules_see_what_they_should(tmp_path):
    assert {'torch', 'gfnet_dense.spectral.fft', 'gfnet_dense.spectral.resize.Grid'} <= (
        imported_names(PACKAGE / 'spectral' / '__init__.py')
    )
    assert 'gfnet_dense.models.GFNet' in imported_names(PACKAGE / '__init__.py')
    assert rooms(imported_names(PACKAGE / 'models' / 'gfnet.py')) >= {'spectral', 'models'}
    file = tmp_path / 'file.py'
    file.write_text(
        'from typing import TYPE_CHECKING\n'
        'try:\n    import mmseg.models\nexcept ImportError:\n    pass\n'
        'if TYPE_CHECKING:\n    import a\n'
        'class C:\n    import mmdet\n    def f(self):\n        import b\n'
        'async def g():\n    from c import d\n'
    )
    assert others(imported_names(file, at_import_time=True)) == {'mmseg', 'mmdet'}
    assert others(imported_names(file)) == {'mmseg', 'mmdet', 'a', 'b', 'c'}


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_imports_rooms_below_it(room):
    below = {*ROOMS[ROOMS.index(room) :]}
    for file in files(room):
        assert rooms(imported_names(file)) <= below, relative(file)


@pytest.mark.parametrize('room', PACKAGES)
def test_a_room_stands_on_few_packages(room):
    for file in files(room):
        assert others(imported_names(file, at_import_time=True)) <= PACKAGES[room], relative(file)


@pytest.mark.parametrize('room', ['durable', 'data'])
def test_runs_and_data_know_nothing_of_gfnet(room):
    for file in files(room):
        assert not rooms(imported_names(file)) & {'models', 'spectral', 'openmmlab'}, relative(file)


def test_only_tools_and_tests_use_the_demo():
    for room in ROOMS:
        if room != 'demo':
            for file in files(room):
                assert 'demo' not in rooms(imported_names(file)), relative(file)


@pytest.mark.parametrize('file', files(), ids=relative)
def test_the_package_asks_for_no_task_of_openmmlab(file):
    assert not others(imported_names(file, at_import_time=True)) & OPENMMLAB_TASKS


@pytest.mark.parametrize('file', files(), ids=relative)
def test_bindings_of_cuda_are_imported_when_a_kernel_is_compiled(file):
    assert 'cuda' not in others(imported_names(file, at_import_time=True))


def test_nobody_imports_tools_or_tests():
    folders = (REPOSITORY / 'tools', REPOSITORY / 'tests', REPOSITORY / 'configs')
    everywhere = files() + [path for folder in folders for path in folder.rglob('*.py')]
    for file in everywhere:
        names = others({name for name in imported_names(file) if name})
        assert not names & {'tools', 'tests'}, file


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get('PYTHONPATH', '')])
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': path, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def modules_of(*distributions: str) -> set[str]:
    """Return the top-level modules of distributions and of all that they depend on."""

    def normal(name: str) -> str:
        return re.sub(r'[-_.]+', '-', name).lower()

    needed, queue = set(), list(distributions)
    while queue:
        name = normal(queue.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # for another platform
            continue
        queue += [re.match(r'[\w.-]+', line)[0] for line in lines if 'extra ==' not in line]
    return {
        module
        for module, names in packages_distributions().items()
        if needed & {normal(name) for name in names}
    }


# Whatever else is installed is not found.
ALONE = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        python = top in sys.stdlib_module_names or top.startswith('_sysconfigdata')
        if python or top in allowed:
            return self.finder.find_spec(name, path, target)

allowed = {'gfnet_dense', *ALLOWED}
sys.meta_path[:] = map(Hidden, sys.meta_path)
"""


def alone_with(*distributions: str) -> str:
    return f'ALLOWED = {sorted(modules_of(*distributions))!r}\n{ALONE}'


def test_the_operator_works_with_torch_alone():
    allowed = modules_of('torch')
    assert 'torch' in allowed
    assert not allowed & {'timm', 'torchvision', 'mmengine', 'cv2', 'sklearn'}
    run(
        alone_with('torch') + 'import torch\n'
        'from gfnet_dense.spectral import global_filter, resize_spectrum\n'
        'x, weight = torch.ones(2, 4, 6, 3), torch.randn(8, 5, 3, 2, requires_grad=True)\n'
        'y = global_filter(x, resize_spectrum(weight, (8, 8), (4, 6)))\n'
        'y.sum().backward()\n'
        'assert weight.grad.any()\n'
        'import gfnet_dense\n'
        'assert gfnet_dense.global_filter is global_filter\n'
        'try:\n'
        '    from gfnet_dense import GFNet\n'
        'except ImportError as e:\n'
        '    assert "GFNet needs timm" in str(e), e\n'
        'else:\n'
        '    raise AssertionError\n'
        'assert not {"timm", "mmengine", "numpy.fft"} & {*sys.modules}\n'
    )


def test_the_networks_work_with_torch_and_timm_alone(tmp_path):
    allowed = modules_of('torch', 'timm')
    assert {'torch', 'timm', 'torchvision', 'safetensors', 'PIL'} <= allowed
    assert not allowed & {'mmengine', 'mmcv', 'cv2', 'sklearn', 'pycocotools', 'matplotlib'}
    run(
        alone_with('torch', 'timm') + 'import torch, timm\n'
        'from gfnet_dense import GFNet, GFNetPyramid, GlobalFilter\n'
        'from gfnet_dense import global_filter, resize_spectrum\n'
        'model = timm.create_model("gfnet_h_s", arch=dict(embed_dims=(8, 16), depths=(1, 1)))\n'
        'assert type(model) is GFNetPyramid\n'
        'assert model(torch.ones(1, 3, 40, 64)).shape == (1, 1000)\n'
        'model = timm.create_model("gfnet_h_ti", features_only=True).eval()\n'
        'assert [y.shape[1] for y in model(torch.ones(1, 3, 32, 32))] == [64, 128, 256, 512]\n'
        'from gfnet_dense.models.convert import convert_checkpoint\n'
        'state = GFNet(dict(embed_dims=8, depths=2), img_size=32, num_classes=5).state_dict()\n'
        f'torch.save({{"model": state}}, {str(tmp_path / "a.pth")!r})\n'
        f'convert_checkpoint({str(tmp_path / "a.pth")!r}, {str(tmp_path / "b.safetensors")!r})\n'
        f'GFNet(dict(embed_dims=8, depths=2), img_size=64, num_classes=5).load_pretrained('
        f'{str(tmp_path / "b.safetensors")!r})\n'
        'assert "mmengine" not in sys.modules\n'
    )


@pytest.mark.slow
def test_the_package_imports_without_bindings_of_cuda_and_openmmlabs_tasks_and_operators():
    run(
        'import importlib, pkgutil, sys\n'
        'for name in ("cuda", "mmcv", "mmcv._ext", "mmcv.ops", "mmseg", "mmdet"):\n'
        '    sys.modules[name] = None\n'
        'import gfnet_dense\n'
        'from gfnet_dense import openmmlab\n'
        'from mmengine.registry import MODELS\n'
        'assert MODELS.get("GFNet") is openmmlab.GFNet\n'
        'assert MODELS.get("GFNetPyramid") is openmmlab.GFNetPyramid\n'
        'import timm\n'
        'assert timm.is_model("gfnet_h_s")\n'
        # Modules that the package does not import by itself may use mmcv, but not its operators.
        'del sys.modules["mmcv"]\n'
        'for module in pkgutil.walk_packages(gfnet_dense.__path__, "gfnet_dense."):\n'
        '    importlib.import_module(module.name)\n'
    )


@pytest.mark.slow
def test_an_mmengine_that_cannot_be_imported_costs_the_registration_alone():
    # mmengine's runner needs OpenCV, which it does not ask for.
    output = run(
        'import sys, warnings\n'
        'sys.modules["cv2"] = None\n'
        'with warnings.catch_warnings(record=True) as caught:\n'
        '    warnings.simplefilter("always")\n'
        '    from gfnet_dense import GFNetPyramid\n'
        'print([str(w.message) for w in caught if "gfnet" in str(w.message).lower()])\n'
    )
    assert 'GFNet is not registered in mmengine' in output
    assert 'cv2' in output
