"""The global filter on CPUs, as C++ that is compiled on first use; without derivatives.

Three operators of namespace `gfnet_dense_native`, which compilers take as they are. All take maps
of shape `(B, H, W, C)` and compute those of float16 and bfloat16 in float32. Spectra have the shape
`(H, W // 2 + 1, C, 2)` and are float32, or float64 for maps of float64. Of a spectrum only its
Hermitian part acts. Results are identical for any number of threads.
"""

import ctypes
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing import operator_unsupported_reason
from .build import BuildError, load

__all__ = ['adjoint', 'correlate', 'filter', 'unsupported_reason']

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unsupported_reason(x: Tensor) -> str | None:
    """Say why maps like `x` cannot be filtered here; None if they can. May compile the library."""
    if reason := operator_unsupported_reason():
        return reason
    if x.device.type != 'cpu' or x.layout != torch.strided:
        return 'it takes dense maps on a CPU'
    if x.dtype not in _DTYPES:
        return f'it takes maps of float16, bfloat16, float32 and float64, not {x.dtype}'
    return _build_failure()


@torch.compiler.assume_constant_result
def _build_failure() -> str | None:
    return _try_to_build()


@functools.cache
def _try_to_build() -> str | None:
    try:
        load()
    except BuildError as e:
        return str(e)
    return None


# torch.library.custom_op is more convenient, but takes longer than the filter of a small map.
NAMESPACE = __name__.replace('.', '_')
_LIBRARY = torch.library.Library(NAMESPACE, 'DEF')
for _schema in (
    'filter(Tensor x, Tensor weight, bool conjugate) -> Tensor',
    'adjoint(Tensor g, Tensor x, Tensor weight) -> (Tensor, Tensor)',
    'correlate(Tensor g, Tensor x) -> Tensor',
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
_OPERATORS = getattr(torch.ops, NAMESPACE)


def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """Return `F^-1(K . F x)` in the dtype of `x`, with `K = weight` or its conjugate."""
    return _OPERATORS.filter.default(x, weight, conjugate)


def adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `<g, F^-1(weight . F x)>` with respect to `x` and `weight`."""
    return _OPERATORS.adjoint.default(g, x, weight)


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of `<g, F^-1(weight . F x)>` with respect to `weight` alone."""
    return _OPERATORS.correlate.default(g, x)


def _filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    _check(x, weight=weight)
    x, weight = _readable(x), _spectrum(weight, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _call('filter', x, *_map(x), weight.data_ptr(), conjugate, y.data_ptr())
    return y


def _adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, g, weight)
    g, x, spectrum = _readable(g), _readable(x), _spectrum(weight, x)
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gweight = torch.empty_like(spectrum)
    pointers = spectrum.data_ptr(), gx.data_ptr(), gweight.data_ptr()
    _call('adjoint', x, *_map(g), *_map(x), *pointers)
    return gx, gweight.to(weight.dtype)


def _correlate(g: Tensor, x: Tensor) -> Tensor:
    _check(x, g)
    g, x = _readable(g), _readable(x)
    gweight = _empty_spectrum(x)
    _call('adjoint', x, *_map(g), *_map(x), None, None, gweight.data_ptr())
    return gweight


def _check(x: Tensor, g: Tensor | None = None, weight: Tensor | None = None) -> None:
    """Raise a ValueError where C++ would read beyond a tensor or mistake its dtype."""
    if x.dtype not in _DTYPES or x.ndim != 4 or 0 in x.shape[1:3]:
        raise ValueError(f'x must be a map (B, H, W, C), but is {x.dtype} {tuple(x.shape)}')
    if g is not None and (g.dtype != x.dtype or g.shape != x.shape):
        raise ValueError(
            f'g must be as x, {x.dtype} {tuple(x.shape)}, but is {g.dtype} {tuple(g.shape)}'
        )
    _, height, width, channels = x.shape
    expected = (height, width // 2 + 1, channels, 2)
    if weight is not None and weight.shape != expected:
        raise ValueError(f'weight must have shape {expected}, but has {tuple(weight.shape)}')


def _readable(x: Tensor) -> Tensor:
    """Return a map whose channels lie side by side; other strides do not matter."""
    return x if x.stride(3) == 1 else x.contiguous()


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spectrum(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(_computed_in(x)).contiguous()


def _empty_spectrum(x: Tensor) -> Tensor:
    _, height, width, channels = x.shape
    return x.new_empty((height, width // 2 + 1, channels, 2), dtype=_computed_in(x))


def _map(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()[:3]


def _call(name: str, x: Tensor, *arguments: int | None) -> None:
    # Threads come from the OpenMP runtime that torch itself uses. Its idle threads keep their cores
    # busy for a while after each operator of torch, so that threads of our own, or of a second
    # runtime, would wait for them. In a forked process that runtime would wait forever for threads
    # that only the parent has: there, every call starts threads of its own.
    threads = torch.get_num_threads()
    function, parallel = _function(name), None if _is_forked else _openmp()
    if function(parallel, threads, _DTYPES[x.dtype], *x.shape, *arguments):
        raise MemoryError(f'not enough memory to filter a map of shape {tuple(x.shape)}')


@functools.cache
def _function(name: str) -> Callable[..., int]:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
    strided = [pointer, size, size, size]
    rest = {
        'filter': [*strided, pointer, integer, pointer],
        'adjoint': [*strided, *strided, pointer, pointer, pointer],
    }
    function = getattr(load(), f'gfnet_dense_{name}')
    function.argtypes = [pointer, integer, integer, size, size, size, size, *rest[name]]
    return function


@functools.cache
def _openmp() -> int | None:
    """Return the address of what starts a parallel region in the runtime that torch is linked to.

    GCC's runtime and those of LLVM and Intel have it under this name; None if there is none.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)

_LIBRARY.impl('filter', _filter, 'CPU')
_LIBRARY.impl('adjoint', _adjoint, 'CPU')
_LIBRARY.impl('correlate', _correlate, 'CPU')


@torch.library.register_fake(f'{NAMESPACE}::filter', lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f'{NAMESPACE}::adjoint', lib=_LIBRARY)
def _(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.register_fake(f'{NAMESPACE}::correlate', lib=_LIBRARY)
def _(g: Tensor, x: Tensor) -> Tensor:
    return _empty_spectrum(x)
