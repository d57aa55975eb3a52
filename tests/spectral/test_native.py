"""The C++ for CPUs against float64 `torch.fft`, and what is around it: building, threads, forks."""

import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from filter_oracle import assert_near, expected
from hypothesis import example, given, settings
from torch import Tensor

import gfnet_dense
from gfnet_dense.spectral import hermitian_part, native
from gfnet_dense.spectral.native import build

ERRORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='needs a C++ compiler'
)


def result_and_gradients(x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
    results = [native.filter(x, weight, False), *native.adjoint(g, x, weight)]
    assert all(result.is_contiguous() for result in results)
    return results


def case(batch, height, width, channels, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Return a map, a spectrum and the gradient of a result."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, height, width, channels), (height, width // 2 + 1, channels, 2)
    x, weight, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (*shapes, shapes[0])
    )
    return [x.to(dtype), weight.to(torch.promote_types(dtype, torch.float32)), g.to(dtype)]


def strided(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in another place and order in memory."""
    if layout == 'channels first':
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == 'every other':
        return tensor.repeat_interleave(2, dim=-2)[..., ::2, :]
    if layout == 'misaligned':
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == 'part of more channels':
        return torch.cat([tensor, tensor, tensor], -1)[..., tensor.shape[-1] : -tensor.shape[-1]]
    return tensor


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill with NaN what `torch.empty` returns."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


LAYOUTS = ['dense', 'channels first', 'every other', 'misaligned', 'part of more channels']
sides = st.one_of(st.integers(1, 16), st.integers(1, 70))


@pytest.mark.slow
@settings(max_examples=400)
@example(2, 1, 1, 1, torch.float32, ['dense'] * 3, 1, 0)
@example(1, 32, 62, 16, torch.float32, ['dense'] * 3, 1, 0)
@given(
    batch=st.integers(0, 5),
    height=sides,
    width=sides,
    channels=st.integers(1, 100),
    dtype=st.sampled_from(list(ERRORS)),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_result_and_gradients(batch, height, width, channels, dtype, layouts, threads, seed):
    tensors = case(batch, height, width, channels, dtype, seed)
    x, weight, g = map(strided, tensors, layouts)
    with threads_of_torch(threads), poisoned():
        actual = result_and_gradients(x, weight, g)
        assert [t.dtype for t in actual] == [dtype, dtype, weight.dtype]
        assert torch.equal(native.correlate(g, x), actual[2])
        conjugate = native.filter(g, weight, True)
    assert_near(actual, expected(*tensors), ERRORS[dtype])
    assert torch.equal(conjugate, actual[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    'size', [(200, 334, 17), (128, 128, 32), (1, 509, 3), (331, 2, 3)], ids=str
)
def test_large_maps(size):
    tensors = case(2, *size)
    assert_near(result_and_gradients(*tensors), expected(*tensors), 1e-6)


@pytest.mark.parametrize('scale', [1e-12, 1e12])
def test_a_gradient_is_as_exact_when_it_is_small_or_large(scale):
    x, weight, g = case(2, 9, 10, 20)
    g *= scale
    assert_near(result_and_gradients(x, weight, g), expected(x, weight, g), 1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    tiny = torch.finfo(torch.float32).tiny  # below, numbers of bfloat16 are scaled down to zero
    x = x[x.isfinite() & ((x == 0) | (x.abs().float() >= tiny))].view(1, 1, 1, -1)
    weight = torch.zeros(1, 1, x.shape[3], 2)
    for factor in (1, 0.7, 1.1, 2**-20, -(2.0**10)):
        weight[..., 0] = factor
        assert torch.equal(native.filter(x, weight, False), (x.float() * weight[..., 0]).to(dtype))


def test_sums_may_leave_the_range_of_bfloat16():
    x = torch.full((1, 16, 16, 4), 2e38, dtype=torch.bfloat16)
    weight = torch.zeros(16, 9, 4, 2)
    weight[..., 0] = 1
    assert_near([native.filter(x, weight, False)], [x.double()], 1e-2)


def test_the_imaginary_part_of_a_column_that_is_its_own_mirror_image_does_not_act():
    x, weight, g = case(2, 6, 8, 5)
    gweight = native.correlate(g, x)
    for column in (0, 4):
        mirrored = gweight[:, column].flip(0).roll(1, 0) * torch.tensor([1, -1])
        torch.testing.assert_close(gweight[:, column], mirrored)
    torch.testing.assert_close(
        native.filter(x, weight, False), native.filter(x, hermitian_part(weight, 8), False)
    )


# With enough images a thread keeps what it read of the spectrum.
@pytest.mark.parametrize(
    'size', [(1, 12, 9, 40), (3, 7, 7, 100), (2, 30, 31, 16), (8, 6, 10, 150)], ids=str
)
def test_threads_do_not_change_results(size):
    tensors, results = case(*size), []
    for threads in (1, 2, 3, 16):
        with threads_of_torch(threads):
            results.append(result_and_gradients(*tensors))
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_several_python_threads_at_once():
    cases = [case(2, 8 + i, 9 + i, 20 + i, seed=i) for i in range(6)]
    results = [result_and_gradients(*tensors) for tensors in cases]
    with threads_of_torch(2), ThreadPoolExecutor(6) as pool:
        for _ in range(20):
            actual = pool.map(lambda tensors: result_and_gradients(*tensors), cases)
            for a, e in zip(actual, results, strict=True):
                assert all(map(torch.equal, a, e))


def _as_expected(tensors: list[Tensor], expected: list[Tensor]) -> None:
    assert all(map(torch.equal, result_and_gradients(*tensors), expected))


@pytest.mark.parametrize('threads', [1, 3])
def test_a_forked_process_does_not_hang(threads):
    tensors = case(2, 7, 7, 100)  # so small that torch.equal() takes one thread: it would hang
    with threads_of_torch(threads):
        torch.ones(2**20).sum()  # threads of torch, which the child does not have
        expected = result_and_gradients(*tensors)
        child = multiprocessing.get_context('fork').Process(
            target=_as_expected, args=(tensors, expected)
        )
        child.start()
        child.join(60)
        exit_code = child.exitcode
        child.kill()
    assert exit_code == 0


def test_graphs_hold_it_whole():
    def run(x, weight, g):
        if native.unsupported_reason(x):
            return ()
        gx, gweight = native.adjoint(g, x, weight)
        return native.filter(x * 1, weight, False) + 1, gx, gweight, native.correlate(g, x)

    for dtype in ERRORS:
        tensors = case(2, 6, 7, 5, dtype)
        compiled = torch.compile(run, fullgraph=True, backend='aot_eager')
        assert all(map(torch.equal, compiled(*tensors), run(*tensors)))
        # Dynamo of torch before 2.7 takes every graph for an exported one.
        assert len(compiled(*tensors)) == (4 if hasattr(torch.compiler, 'is_exporting') else 0)


@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
def test_operators_are_registered_correctly(dtype):
    x, weight, g = case(2, 4, 5, 3, dtype)
    x = strided(x, 'every other')
    operators = getattr(torch.ops, native.NAMESPACE)
    tests = ('test_schema', 'test_faketensor')
    torch.library.opcheck(operators.filter.default, (x, weight, True), test_utils=tests)
    torch.library.opcheck(operators.adjoint.default, (g, x, weight), test_utils=tests)
    torch.library.opcheck(operators.correlate.default, (g, x), test_utils=tests)


@pytest.mark.parametrize(
    ('run', 'message'),
    [
        (lambda x, w, g: native.filter(x, w[:, :1], False), r'shape \(4, 3, 2, 2\), but has'),
        (lambda x, w, g: native.filter(x[0], w, False), r'map \(B, H, W, C\), but is'),
        (lambda x, w, g: native.adjoint(g[:1], x, w), r'g must be as x.*\(1, 4, 5, 2\)'),
        (lambda x, w, g: native.adjoint(g, x, w[:2]), 'weight must have shape'),
        (lambda x, w, g: native.correlate(g.double(), x), 'but is torch.float64'),
    ],
)
def test_operators_refuse_what_does_not_fit_together(run, message):
    with pytest.raises(ValueError, match=message):
        run(*case(2, 4, 5, 2))


# Memory.


def flags_of(address: int) -> list[str]:
    """Return what the system notes about the mapping of an address; `hg` stands for large pages."""
    inside = False
    for line in Path('/proc/self/smaps').read_text().splitlines():
        if match := re.match(r'([0-9a-f]+)-([0-9a-f]+) ', line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith('VmFlags:'):
            return line.split()[1:]
    return []


@pytest.mark.skipif(
    not (Path('/sys/kernel/mm/transparent_hugepage').exists() and flags_of(id(build))),
    reason='needs a system that grants large pages and tells of them',
)
def test_large_results_ask_for_large_pages():
    x, weight, g = case(1, 96, 96, 1024)  # 38 MB
    # In a mapping of its own: parts of the heap may have been results before.
    x = torch.frombuffer(mmap.mmap(-1, x.nbytes), dtype=x.dtype).view_as(x).copy_(x)
    y = native.filter(x, weight, False)
    gx, _ = native.adjoint(g, x, weight)
    middle = y.nbytes // 2
    assert 'hg' not in flags_of(x.data_ptr() + middle)
    assert 'hg' in flags_of(y.data_ptr() + middle)
    assert 'hg' in flags_of(gx.data_ptr() + middle)


# Loading, without what it cached before.
load = build.load.__wrapped__


def test_a_compiler_command_that_cannot_be_parsed(monkeypatch):
    monkeypatch.setenv('CXX', "g++ 'x")
    with pytest.raises(build.BuildError, match=r'\$CXX cannot be parsed'):
        load()


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', '')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(build.BuildError, match=r'^it needs a C\+\+ compiler: \$CXX, c\+\+, g'):
        load()


def test_what_it_does_not_take():
    x = torch.zeros(1, 2, 2, 1)
    assert native.unsupported_reason(x) is None
    assert 'float8' in native.unsupported_reason(x.to(torch.float8_e5m2))
    assert 'CPU' in native.unsupported_reason(x.to('meta'))
    assert 'dense' in native.unsupported_reason(x.to_sparse())


REASON = (
    'import torch; from gfnet_dense.spectral import native; '
    'print(native.unsupported_reason(torch.zeros(1, 2, 2, 1)))'
)


def run_python(code: str, **env: str) -> subprocess.Popen:
    """Start a process of its own, where torch alone is found besides this package."""
    code = f'import sys; sys.modules.update(timm=None, mmengine=None); {code}'
    env = {**os.environ, 'PYTHONPATH': str(Path(gfnet_dense.__file__).parents[1]), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, '-c', code], env=env, text=True, stdout=pipe)


def reason(**env: str) -> str:
    process = run_python(REASON, **env)
    output, _ = process.communicate()
    assert process.returncode == 0
    return output.splitlines()[-1]  # after the log


@pytest.mark.slow
def test_with_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / 'compiler'
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho "fatal error: no header" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    said = reason(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert said == f'the C++ compiler {compiler} fails: fatal error: no header'
    assert list((tmp_path / 'gfnet-dense').iterdir()) == []
    compiler.write_text('no program')
    assert re.search('does not run', reason(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)))


def write_compiler(path: Path, before: str = '') -> Path:
    """Write a compiler that spares itself the optimization, which takes most of the time."""
    command = shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')
    path.write_text(f'#!/bin/sh\n{before}\nexec {command} "$@" -O0\n')
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_without_a_cache(tmp_path):
    file, compiler = tmp_path / 'file', write_compiler(tmp_path / 'compiler')
    file.touch()
    assert reason(CXX=str(compiler), XDG_CACHE_HOME=str(file)) == 'None'
    assert {*tmp_path.iterdir()} == {file, compiler}


@pytest.mark.slow
def test_processes_that_start_together_build_once(tmp_path):
    """The compiler keeps a list of its runs, and is slow enough for all of them to meet."""
    runs = tmp_path / 'runs'
    slowly = f'case "$*" in *-shared*) echo >> {runs}; sleep 2;; esac'
    compiler = write_compiler(tmp_path / 'compiler', slowly)
    env = {'CXX': str(compiler), 'XDG_CACHE_HOME': str(tmp_path)}
    processes = [run_python(REASON, **env) for _ in range(3)]
    assert [process.communicate()[0].splitlines()[-1] for process in processes] == ['None'] * 3
    assert runs.read_text() == '\n'
    assert [path.suffix for path in (tmp_path / 'gfnet-dense').iterdir()] == ['.so']


def test_the_name_of_the_library_carries_all_that_it_depends_on(monkeypatch, tmp_path):
    names = {build._fingerprint(['c++'])}
    monkeypatch.setattr(build, '_processor', lambda: 'another one')
    names.add(build._fingerprint(['c++']))
    monkeypatch.setattr(build, '_flags', lambda: ('-O1',))
    names.add(build._fingerprint(['c++']))
    monkeypatch.setattr(build, '_run', lambda command: 'another version')
    names.add(build._fingerprint(['c++']))
    monkeypatch.setattr(build, '_SOURCE', tmp_path / 'filter.cpp')
    build._SOURCE.write_text('another source')
    names.add(build._fingerprint(['c++']))
    assert len(names) == 5


@pytest.mark.skipif(not shutil.which('objdump'), reason='needs objdump of the GNU binutils')
def test_the_compiler_keeps_the_prefetches():
    """GCC removes calls of a function that only prefetches, and no result tells."""
    command = ['objdump', '--disassemble', '--no-show-raw-insn', build.load()._name]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r'^\w+ <', listing, flags=re.MULTILINE)
    passes = [function for function in functions if 'run_pass' in function.partition('>')[0]]
    assert len(passes) >= 2 * 2 * 6  # both directions and types, and at least six factors
    assert all(re.search(r'\b(prefetch|prfm)', function) for function in passes)


@pytest.mark.slow
def test_importing_it_compiles_nothing(tmp_path):
    code = 'from gfnet_dense.spectral import native'
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)).wait() == 0
    assert list(tmp_path.iterdir()) == []
