"""Who may import whom, and what `import gfnet_dense` may ask for."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gfnet_dense

PACKAGE = Path(gfnet_dense.__file__).parent
REPOSITORY = Path(__file__).parents[1]
# The one file that cannot be imported without Triton.
KERNELS = PACKAGE / 'spectral' / 'triton' / 'kernels.py'
OPENMMLAB_TASKS = {'mmseg', 'mmdet'}


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
    found = sorted((PACKAGE / room).rglob('*.py'))
    assert found
    return found


def rooms(names: set[str]) -> set[str]:
    """Return the folders of the package that names lie in."""
    return {name.split('.')[1] for name in names if name.startswith('gfnet_dense.')}


def others(names: set[str]) -> set[str]:
    """Return the packages of names that are neither ours nor Python's own."""
    return {name.split('.')[0] for name in names} - {'gfnet_dense', *sys.stdlib_module_names}


def test_the_rules_see_what_they_should(tmp_path):
    assert {'torch', 'gfnet_dense.spectral', 'gfnet_dense.spectral.fft'} <= (
        imported_names(PACKAGE / 'spectral' / '__init__.py')
    )
    assert 'gfnet_dense.models' in imported_names(PACKAGE / '__init__.py')
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


@pytest.mark.parametrize('file', files('spectral'), ids=lambda f: f.name)
def test_the_operator_stands_on_torch_alone(file):
    names = imported_names(file)
    assert rooms(names) <= {'spectral'}
    assert others(names) <= {'torch', 'triton'}
    if file != KERNELS:
        assert others(imported_names(file, at_import_time=True)) <= {'torch'}


@pytest.mark.parametrize('file', files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_triton_is_imported_when_a_kernel_runs(file):
    assert 'gfnet_dense.spectral.triton.kernels' not in imported_names(file, at_import_time=True)


@pytest.mark.parametrize('file', files('models'), ids=lambda f: f.name)
def test_models_stand_on_the_operator_mmengine_and_timm(file):
    names = imported_names(file)
    assert rooms(names) <= {'spectral', 'models', 'serialization', 'hub'}
    assert others(names) <= {'torch', 'mmengine', 'timm'}


@pytest.mark.parametrize('file', files('data') + files('engine'), ids=lambda f: f.name)
def test_data_and_engine_know_no_models(file):
    assert not rooms(imported_names(file)) & {'models', 'spectral'}


@pytest.mark.parametrize('file', files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_the_package_asks_for_no_task_of_openmmlab(file):
    assert not others(imported_names(file, at_import_time=True)) & OPENMMLAB_TASKS


def test_nobody_imports_tools_or_tests():
    folders = (REPOSITORY / 'tools', REPOSITORY / 'tests', REPOSITORY / 'configs')
    everywhere = files() + [path for folder in folders for path in folder.rglob('*.py')]
    for file in everywhere:
        names = others({name for name in imported_names(file) if name})
        assert not names & {'tools', 'tests'}, file


def test_the_package_imports_without_triton_and_openmmlabs_tasks_and_operators():
    code = (
        'import importlib, pkgutil, sys\n'
        'for name in ("triton", "mmcv", "mmcv._ext", "mmcv.ops", "mmseg", "mmdet"):\n'
        '    sys.modules[name] = None\n'
        'import gfnet_dense\n'
        'from mmengine.registry import MODELS\n'
        'assert MODELS.get("GFNet") is gfnet_dense.models.GFNet\n'
        'assert MODELS.get("GFNetPyramid") is gfnet_dense.models.GFNetPyramid\n'
        'import timm\n'
        'assert timm.is_model("gfnet_h_s")\n'
        # Modules that the package does not import by itself may use mmcv, but not its operators.
        'del sys.modules["mmcv"]\n'
        'for module in pkgutil.walk_packages(gfnet_dense.__path__, "gfnet_dense."):\n'
        '    if module.name != "gfnet_dense.spectral.triton.kernels":\n'
        '        importlib.import_module(module.name)\n'
    )
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get('PYTHONPATH', '')])
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
