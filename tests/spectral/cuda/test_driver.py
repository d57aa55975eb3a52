"""What stands between the package and CUDA, with functions of the driver that note their calls."""

import ctypes
import re
import struct

import pytest
import torch

from gfnet_dense.spectral.cuda import driver

pytest.importorskip('cuda.bindings')
SOURCE = 'extern "C" __global__ void twice(float* x, int n) { if (threadIdx.x < n) x[0] *= SCALE; }'


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Return a list of what is asked of the driver; the GPU is one of compute capability 9.0."""
    from cuda.bindings import driver as bindings

    made = []

    def note(name, *values):
        monkeypatch.setattr(
            bindings, name, lambda *args: made.append((name, *args)) or (0, *values)
        )

    note('cuModuleLoadData', 'module')
    note('cuModuleGetFunction', 123)
    note('cuFuncSetAttribute')
    for name, *values in (
        ('cuDeviceGet', 'handle'),
        ('cuDevicePrimaryCtxRetain', 'context'),
        ('cuCtxSetCurrent',),
        ('cuMemAlloc', 456),
        ('cuMemcpyHtoD',),
        ('cuCtxSynchronize',),
    ):
        note(name, *values)
    monkeypatch.setattr(driver, '_architecture', lambda device: 90)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(
        torch._C, '_cuda_getCurrentRawStream', lambda device: 70 + device, raising=False
    )
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return made


def make_kernel(tmp_path, scale: int) -> driver.Kernel:
    source = tmp_path / 'twice.cu'
    source.write_text(SOURCE)
    return driver.Kernel(source, dict(SCALE=scale), 'twice', 'Qif', 64, 4096, 7)


def test_a_kernel_is_compiled_once_for_its_macros(calls, tmp_path, monkeypatch):
    make_kernel(tmp_path, 2)

    def loaded() -> list[bytes]:
        return [code for name, code, *_ in calls if name == 'cuModuleLoadData']

    (first,) = loaded()
    bound, (_, module, name), (_, function, _, shared) = calls[2], *calls[4:]
    assert bound == ('cuCtxSetCurrent', 'context')
    assert first.startswith(b'\x7fELF')
    assert (module, name, function, shared) == ('module', b'twice', 123, 4096)
    make_kernel(tmp_path, 3)
    assert loaded()[1] != first
    monkeypatch.setattr(driver, 'compile_source', None)  # not called any more
    make_kernel(tmp_path, 2)
    assert loaded()[2] == first
    assert len([*tmp_path.glob('gfnet-dense/twice-*.cubin')]) == 2


def test_a_launch_hands_over_sizes_stream_and_arguments(calls, tmp_path, monkeypatch):
    launched = []

    def launch(function, *sizes_and_rest):
        *sizes, stream, pointers, extra = sizes_and_rest
        values = [
            struct.unpack(kind, ctypes.string_at(pointer, struct.calcsize(kind)))[0]
            for kind, pointer in zip('Qif', pointers, strict=True)
        ]
        launched.append((function, sizes, stream, values, extra))
        return status

    monkeypatch.setattr(driver, '_launch_kernel', lambda: launch)
    kernel, status = make_kernel(tmp_path, 2), 0
    kernel.launch((5, 6), 2**40, -7, 0.5)
    assert launched == [(123, [5, 6, 1, 64, 1, 1, 4096], 77, [2**40, -7, 0.5], None)]
    status = 201  # the thread has no context
    calls.clear()
    with pytest.raises(RuntimeError, match='error 201 of the driver'):
        kernel.launch((5, 6), 2**40, -7, 0.5)
    assert ('cuCtxSetCurrent', 'context') in calls and len(launched) == 3
    status = 700
    with pytest.raises(RuntimeError, match='error 700 of the driver'):
        kernel.launch((5, 6), 2**40, -7, 0.5)


@pytest.mark.parametrize(
    ('architecture', 'reason'),
    [(90, None), (75, r'8\.0 or more'), (999, r'does not know compute capability 99\.9')],
)
def test_which_gpus(calls, monkeypatch, architecture, reason):
    monkeypatch.setattr(driver, '_architecture', lambda device: architecture)
    said = driver.unsupported_reason(0)
    assert said is None if reason is None else re.search(reason, said)


def test_without_what_comes_with_newer_torch(calls, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    assert driver.unsupported_reason(0) == 'it needs an NVIDIA GPU'
    monkeypatch.setattr(torch.version, 'hip', None)

    def missing(name: str) -> str:
        raise driver.PackageNotFoundError

    monkeypatch.setattr(driver, 'version', missing)
    assert 'newer bring' in driver.unsupported_reason(0)


def test_a_compiler_that_does_not_answer(calls, monkeypatch):
    from cuda.bindings import nvrtc

    def fail() -> None:
        raise RuntimeError('libnvrtc is missing')

    monkeypatch.setattr(nvrtc, 'nvrtcGetSupportedArchs', fail)
    assert 'libnvrtc is missing' in driver.unsupported_reason(0)


def test_uploads_for_good(calls):
    values = torch.arange(6, dtype=torch.int32)
    assert driver.upload(values, 0) == 456
    assert ('cuMemcpyHtoD', 456, values.data_ptr(), 24) in calls
    assert calls[-1] == ('cuCtxSynchronize',)


def test_says_what_the_compiler_says(tmp_path):
    source = tmp_path / 'wrong.cu'
    source.write_text('#include "ptx.h"\n__global__ void f() { no_such_function(); }')
    with pytest.raises(RuntimeError, match=r'wrong.cu\(2\).*no_such_function'):
        driver.compile_source(source, ['--gpu-architecture=sm_90', '-DWARPS=1', '-DRESIDENT=1'])
