"""The installation: the diagnoses of the environment check, the pins, the wheel, the operators."""

import importlib.util
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load_tool('check_environment')
install = load_tool('install_mmcv_ops')


def read_pins(*files: str) -> dict[str, str]:
    texts = [(ROOT / file).read_text() for file in files or ('requirements.txt',)]
    lines = '\n'.join(texts).splitlines()
    return dict(line.split('==') for line in lines if line and not line.startswith('#'))


def read_ranges() -> list[Requirement]:
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies'].values()
    return [Requirement(text) for text in sum(extras, project['dependencies'])]


@pytest.fixture
def sound() -> check.Facts:
    """An environment without a fault, as `make test` leaves it."""
    pins = read_pins()
    return check.Facts(
        installed=dict(pins),
        pinned=pins,
        allowed={'torch': SpecifierSet('<2.14').contains, 'numpy': SpecifierSet('>=2').contains},
        has_operators=True,
        package=ROOT / 'gfnet_dense',
    )


def only(problems: list) -> check.Problem:
    assert len(problems) == 1, problems
    return problems[0]


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


@pytest.mark.parametrize('ops', [False, True])
def test_sound_environment_has_no_problems(sound, ops):
    assert check.diagnose(sound, ops) == []


@pytest.mark.parametrize(
    ('name', 'fork'),
    [
        ('mmsegmentation', 'onedl-mmsegmentation'),
        ('mmcv', 'onedl-mmcv'),
        ('mmcv-lite', 'onedl-mmcv'),
        ('mmengine', 'onedl-mmengine'),
        ('mmdet', 'onedl-mmdetection'),
    ],
)
def test_upstream_package_over_the_fork(sound, name, fork):
    sound.installed[name] = '1.2.2'
    problem = only(check.diagnose(sound, ops=False))
    assert problem.fatal
    assert f'{name} 1.2.2' in problem.text
    assert f'uninstall -y {name} ' in problem.remedy
    assert problem.remedy.endswith(f'--force-reinstall {fork}=={sound.pinned[fork]}')


def test_upstream_package_in_place_of_the_fork_is_noted(sound):
    installed = {**without(sound.installed, 'onedl-mmcv'), 'mmcv': '2.2.0'}
    problem = only(check.diagnose(replace(sound, installed=installed), ops=True))
    assert not problem.fatal
    assert 'mmcv 2.2.0' in problem.text


def test_missing_packages_are_told_at_once(sound):
    installed = without(sound.installed, 'torch', 'timm')
    errors = {'torch': "No module named 'torch'", 'timm': "No module named 'timm'"}
    facts = replace(sound, installed=installed, errors=errors)
    problem = only(check.diagnose(facts, ops=False))
    assert problem.modules == ('torch', 'timm')
    assert f'torch=={sound.pinned["torch"]} timm=={sound.pinned["timm"]}' in problem.remedy


@pytest.mark.parametrize(
    ('name', 'version', 'reason'), [('torch', '2.14.1', 'C++20'), ('numpy', '1.26.4', 'numpy 2')]
)
def test_version_out_of_bounds(sound, name, version, reason):
    sound.installed[name] = version
    problem = only(check.diagnose(sound, ops=False))
    assert problem.fatal
    assert version in problem.text and reason in problem.text
    assert problem.remedy.endswith(f'install {name}=={sound.pinned[name]}')


def test_version_within_bounds_is_noted(sound):
    sound.installed.update(torch='2.13.0', timm='1.0.30')
    problem = only(check.diagnose(sound, ops=False))
    assert not problem.fatal
    assert 'torch 2.13.0, timm 1.0.30' in problem.text


def test_torchvision_of_another_torch_is_told_once(sound):
    error = 'RuntimeError: operator torchvision::nms does not exist'
    sound.installed['torchvision'] = '0.28.0'
    sound.errors.update(torchvision=error, timm=error, mmseg=error)
    problem = only(check.diagnose(sound, ops=False))
    assert problem.modules == ('torchvision',)
    pair = f'torch=={sound.pinned["torch"]} torchvision=={sound.pinned["torchvision"]}'
    assert problem.remedy.endswith(f'install {pair}')


def test_missing_dependency_of_a_package(sound):
    sound.errors['mmseg'] = "ModuleNotFoundError: No module named 'ftfy'"
    problem = only(check.diagnose(sound, ops=False))
    assert problem.modules == ('mmseg',)
    assert 'ftfy' in problem.text
    assert problem.remedy.endswith(f'install -r {ROOT / "requirements.txt"}')


def test_opencv_without_libgl(sound):
    sound.errors['cv2'] = 'ImportError: libGL.so.1: cannot open shared object file'
    sound.errors['mmcv'] = sound.errors['mmcv.ops'] = sound.errors['cv2']
    problem = only(check.diagnose(sound, ops=True))
    assert problem.modules == ('cv2',)
    pin = sound.pinned['opencv-python-headless']
    assert problem.remedy.endswith(f'--force-reinstall opencv-python-headless=={pin}')


def test_opencv_removed_with_its_other_build(sound):
    sound.errors['cv2'] = "ModuleNotFoundError: No module named 'cv2.mat_wrapper'"
    problem = only(check.diagnose(sound, ops=False))
    assert 'opencv-python-headless' in problem.remedy


def test_opencv_of_two_versions(sound):
    sound.installed['opencv-python'] = '4.11.0.86'
    problem = only(check.diagnose(sound, ops=False))
    assert '4.11.0.86' in problem.text
    assert problem.fatal


def test_desktop_opencv_alone_is_fine(sound):
    installed = without(sound.installed, 'opencv-python-headless')
    assert check.diagnose(replace(sound, installed=installed), ops=False) == []


def test_operators_missing(sound):
    sound.has_operators = False
    sound.errors['mmcv.ops'] = "ModuleNotFoundError: No module named 'mmcv._ext'"
    assert check.diagnose(sound, ops=False) == []
    problem = only(check.diagnose(sound, ops=True))
    assert problem.fatal
    assert problem.remedy.endswith('install_mmcv_ops.py')


@pytest.mark.parametrize(
    ('ops', 'remedy'), [(True, 'install_mmcv_ops.py'), (False, 'pip install --no-cache-dir')]
)
def test_operators_for_another_torch(sound, ops, remedy):
    error = 'ImportError: _ext.so: undefined symbol: _ZN2at'
    sound.errors.update({'mmcv.ops': error, 'mmseg': error})
    problem = only(check.diagnose(sound, ops))
    assert problem.fatal
    assert problem.modules == ('mmcv.ops', 'mmseg')
    assert 'another torch' in problem.text
    assert remedy in problem.remedy


@pytest.mark.parametrize('package', [None, Path('/elsewhere/gfnet_dense')])
def test_another_copy_of_this_package(sound, package):
    problem = only(check.diagnose(replace(sound, package=package), ops=False))
    assert problem.remedy.endswith(f'install --no-deps -e {ROOT}')


def test_pins_are_exact_and_within_the_ranges():
    pins, ranges = read_pins('requirements.txt', 'requirements-test.txt'), read_ranges()
    assert {requirement.name for requirement in ranges} <= pins.keys()
    for requirement in ranges:
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_core_needs_torch_timm_and_numpy_alone_and_any_newer_version():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    core = [Requirement(text) for text in project['dependencies']]
    assert {requirement.name for requirement in core} == {'torch', 'timm', 'numpy'}
    for requirement in core:
        assert requirement.specifier.contains('999'), requirement
        floor = next(iter(requirement.specifier)).version
        assert not requirement.specifier.contains(f'{int(floor.split(".")[0]) - 1}.99')


def test_only_openmmlab_bounds_torch():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
        'optional-dependencies'
    ]
    bounds = {
        name: [Requirement(text) for text in texts if Requirement(text).name == 'torch']
        for name, texts in extras.items()
    }
    (bound,) = bounds.pop('openmmlab')
    assert bound.specifier.contains('2.13.0') and not bound.specifier.contains('2.14.0')
    assert not any(bounds.values())


def test_stack_of_the_check_is_what_is_pinned():
    checked = {name for p in check.STACK for name in (p.distribution, *p.others)}
    assert read_pins().keys() <= checked


def test_this_environment_passes_the_check():
    assert [p for p in check.diagnose(check.observe(), ops=False) if p.fatal] == []


def test_check_speaks_without_any_package():
    command = [sys.executable, '-I', '-S', ROOT / 'tools' / 'check_environment.py']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'ERROR: Not installed: numpy, torch, ' in result.stdout
    assert result.stderr == ''


@pytest.fixture(scope='module')
def wheel_names(tmp_path_factory) -> set[str]:
    """The files of a wheel built from this checkout, without network."""
    folder = tmp_path_factory.mktemp('wheel')
    options = ['--no-build-isolation', '--no-deps', '--no-index', '--quiet']
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', *options, '--wheel-dir', folder, ROOT], check=True
    )
    (wheel,) = folder.glob('gfnet_dense-*.whl')
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize('room', ['configs', 'tools'])
def test_wheel_contains_configs_and_tools(wheel_names, room):
    files = [path.relative_to(ROOT) for path in (ROOT / room).rglob('*') if path.is_file()]
    expected = {f'gfnet_dense/.mim/{file}' for file in files if '__pycache__' not in file.parts}
    assert expected
    assert expected == {name for name in wheel_names if name.startswith(f'gfnet_dense/.mim/{room}')}


def test_wheel_contains_every_module_and_nothing_else(wheel_names):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'gfnet_dense').rglob('*.py')}
    assert modules | {'gfnet_dense/py.typed'} <= wheel_names
    assert {name.split('/')[0] for name in wheel_names if '.dist-info/' not in name} == {
        'gfnet_dense'
    }
    assert not any('__pycache__' in name for name in wheel_names)


def test_wheel_installs_the_command(wheel_names):
    assert any(name.endswith('.dist-info/entry_points.txt') for name in wheel_names)


def test_wheel_folder_carries_what_a_binary_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    folder = install.wheel_folder(install.cache_root(), '2.3.6', '2.12.1+cu130', 'cpu')
    assert folder.parent == tmp_path / 'gfnet-dense'
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    for part in ('mmcv-2.3.6', 'torch2.12.1+cu130', 'cpu', python, sysconfig.get_platform()):
        assert part in folder.name


@pytest.mark.parametrize(('torch', 'said'), [('2.12.1+cu130', 'reused'), ('2.6.0', 'must be')])
def test_announces_to_compile_unless_a_wheel_for_the_pins_is_there(
    monkeypatch, tmp_path, capsys, torch, said
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(install, 'operators_work', lambda device: False)
    monkeypatch.setattr(install, 'require_compiler', lambda: None)
    folder = install.wheel_folder(install.cache_root(), '2.3.6', torch, 'cpu')
    folder.mkdir(parents=True)
    (folder / 'onedl_mmcv.whl').touch()
    install.announce()
    assert said in capsys.readouterr().out


def test_no_two_environments_share_a_wheel_folder(tmp_path):
    versions = [
        ('2.3.6', '2.12.1', 'cpu'),
        ('2.3.7', '2.12.1', 'cpu'),
        ('2.3.6', '2.13.0', 'cpu'),
        ('2.3.6', '2.12.1', 'cuda'),
    ]
    assert len({install.wheel_folder(tmp_path, *each) for each in versions}) == len(versions)


def test_an_unfinished_build_is_not_a_wheel(tmp_path):
    build = tmp_path / 'build'
    build.mkdir()
    (build / 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl').touch()
    assert install.find_wheel(tmp_path) is None


def test_progress_counts_objects(tmp_path):
    assert install.progress(tmp_path) == 'preparing'
    objects = tmp_path / 'pip-wheel-x' / 'mmcv' / 'build' / 'temp'
    objects.mkdir(parents=True)
    plan = ''.join(f'build {objects}/{name}.o: compile {name}.cpp\n' for name in 'abc')
    (objects / 'build.ninja').write_text(plan)
    (objects / 'a.o').touch()
    assert install.progress(tmp_path) == '1 of 3 files compiled'


def test_excerpt_prefers_the_errors_of_the_compiler(tmp_path):
    log = tmp_path / 'build.log'
    log.write_text('\n'.join(['x.cpp:1:2: error: no such thing', *['Traceback line'] * 50]))
    assert install.excerpt(log) == 'x.cpp:1:2: error: no such thing'


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(install.InstallError, match=re.escape('sudo apt install g++')):
        install.require_compiler()
