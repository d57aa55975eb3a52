"""The global filter and its gradient, a cache-sized block of the map at a time.

A backend is a :class:`Transform`: how maps become spectra and come back. What is done with them,
and all derivatives, are the same for every transform and live here.

On a CPU a filter is bound by memory, not by arithmetic: temporaries as large as the map miss the
cache, and most of their time goes into fresh pages from the operating system. Block by block the
same temporaries are used again and again.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# Values of a map in one block: 4 MB in float32. Smaller blocks would fit the cache of
# a core, but leave too little for several to share.
_BLOCK = 2**20


class Transform(ABC):
    """The Fourier transform of maps like `x`, in whatever layout suits its backend.

    One is made for a single pass over a map, block by block. Spectra, products and maps that it
    returns stay valid until the next call of the same method.

    Attributes:
        height: H, rows of the map.
        width: W, columns of the map.
        dtype: What is computed in: float32, or float64 for maps of float64.
    """

    def __init__(self, x: Tensor) -> None:
        self.height, self.width = x.shape[1:3]
        # Half-precision FFTs need powers of two and overflow; the official layer runs in float32.
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        # The range of bfloat16 is that of float32: sums of finite values could leave it.
        self._unit = self.height * self.width if x.dtype == torch.bfloat16 else 1

    @abstractmethod
    def kernel(self, weight: Tensor, conjugate: bool = False) -> Tensor:
        """Bring a spectrum `(H, W // 2 + 1, C, 2)` to the layout and scale of a factor."""

    def spectrum(self, x: Tensor, keep: bool = False) -> Tensor:
        """Transform a map `(B, H, W, C)` of any floating dtype; `keep` lets the result stay valid.

        All else that a transform returns is valid until the next call of the same method.
        """
        x = x.to(self.dtype)
        return self._forward(x if self._unit == 1 else x / self._unit, keep)

    @abstractmethod
    def multiply(self, spectrum: Tensor, kernel: Tensor) -> Tensor:
        """Multiply a spectrum by a factor from :meth:`kernel`."""

    def map(self, spectrum: Tensor, out: Tensor | None = None) -> Tensor:
        """Transform a spectrum back to a map `(B, H, W, C)`; into `out`, of any float dtype."""
        fits = out is not None and out.dtype == self.dtype and out.is_contiguous()
        x = self._inverse(spectrum, out if fits and self._unit == 1 else None)
        x = x if self._unit == 1 else x * self._unit
        return x if out is None or x is out else out.copy_(x)

    @abstractmethod
    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        """Sum the product of one spectrum and the conjugate of another over the batch."""

    def gradient(self, correlation: Tensor) -> Tensor:
        """Bring what :meth:`correlate` gave to layout and scale of `(H, W // 2 + 1, C, 2)`."""
        gradient = self._gradient(correlation)
        return gradient if self._unit == 1 else gradient * (self._unit * self._unit)

    @abstractmethod
    def _forward(self, x: Tensor, keep: bool) -> Tensor: ...

    @abstractmethod
    def _inverse(self, spectrum: Tensor, out: Tensor | None) -> Tensor:
        """Return the map, which may be `out`: contiguous memory of its shape and dtype."""

    @abstractmethod
    def _gradient(self, correlation: Tensor) -> Tensor: ...


Make = Callable[[Tensor], Transform]
Tensors = tuple[Tensor, ...]


def filter_map(make: Make, x: Tensor, weight: Tensor) -> Tensor:
    """Filter `x (B, H, W, C)` with `weight (H, W // 2 + 1, C, 2)`, differentiable in both."""
    if is_capturing():  # a graph is better off with plain operators than with a loop unrolled
        transform = make(x)
        with _exact(x.device):
            spectrum = transform.multiply(transform.spectrum(x), transform.kernel(weight))
            return transform.map(spectrum).to(x.dtype)
    # For the gradient a CPU rather keeps the spectrum of x than computing it again, but not in 32
    # bits beside a map of 16.
    keep = torch.is_grad_enabled() and weight.requires_grad and x.is_cpu and x.dtype.itemsize > 2
    return _run(_Filter, x, weight, make, keep and not _is_transformed())[0]


def is_capturing() -> bool:
    """Tell whether the operators that run now are recorded: compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def multiplicity(width: int, device: torch.device) -> Tensor:
    """Return how often a column stands in the whole spectrum: once for zero and Nyquist, or twice.

    In float64, of shape `(W // 2 + 1,)`.
    """
    column = torch.arange(width // 2 + 1, device=device)
    return torch.where((column == 0) | (2 * column == width), 1.0, 2.0).double()


def to_channels(tensor: Tensor, dim: int | None, n: int, channel: int) -> Tensor:
    """Turn `n` problems of :func:`torch.func.vmap` into one with `n` times as many channels."""
    tensor = tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, channel).flatten(channel, channel + 1)


# The filter is bilinear, so its derivatives are filters again, and one more operator that is
# bilinear too: its adjoint. The two close under differentiation, to any order.
#
#     _Filter(x, w)     = y           y = F^-1(w . F x)
#     _Adjoint(g, x, w) = (gx, gw)    gx = F^-1(conj(w) . F g),  gw = m sum_b F g . conj(F x)
#
# A frequency column counts twice (m = 2) unless it is its own mirror image. In such a column,
# zero or Nyquist, the spectra of real maps are Hermitian, and so is the gradient: that of the
# Hermitian part, which alone acts.


def _run(function: type[Function], *inputs: Any) -> Any:
    """Apply a function, or only compute it where nobody could ask for derivatives.

    `apply` alone takes as long as the filter of a small map.
    """
    observed = torch.is_grad_enabled() or _is_transformed()
    return function.apply(*inputs) if observed else function.forward(*inputs)


def _is_transformed() -> bool:
    """Tell whether transforms of `torch.func` or derivatives forward are being taken."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Filter(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, make: Make, keep: bool) -> Tensors:
        y, transform, kept = x.new_empty(x.shape), make(x), []
        with _exact(x.device):
            for (weight_part,), maps in _channel_blocks((weight,), (x, y)):
                kernel = transform.kernel(weight_part)
                for x_block, y_block in _blocks(maps):
                    spectrum = transform.spectrum(x_block, keep)
                    if keep:
                        kept.append(spectrum)
                    transform.map(transform.multiply(spectrum, kernel), out=y_block)
        return y, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        *tensors, ctx.make, _ = inputs
        kept = output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # zeros as large as a spectrum are for nothing
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, *kept = ctx.saved_tensors
        if g is None:
            return None, None, None, None
        if not ctx.needs_input_grad[1]:
            return *_run(_Filter, g, _conjugate(weight), ctx.make, False), None, None, None
        return *_run(_Adjoint, g, x, weight, ctx.make, kept), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, *_: None) -> Tensors:
        x, weight = ctx.saved_tensors
        terms = [] if dx is None else [_filter(dx, weight, ctx.make)]
        terms += [] if dweight is None else [_filter(x, dweight, ctx.make)]
        return (sum(terms),)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, make: Make, _: bool) -> tuple:
        n = info.batch_size
        x, weight = to_channels(x, in_dims[0], n, 3), to_channels(weight, in_dims[1], n, 2)
        return (_filter(x, weight, make).unflatten(3, (n, -1)),), (3,)


def _filter(x: Tensor, weight: Tensor, make: Make) -> Tensor:
    return _Filter.apply(x, weight, make, False)[0]


class _Adjoint(Function):
    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, make: Make, kept: Iterable[Tensor]
    ) -> tuple[Tensor, Tensor]:
        gx, gweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
        transform, transform_x = make(x), make(x)
        # The transform of a captured gradient may lay spectra out in another way than the forward.
        kept = iter(() if is_capturing() else kept)
        with _exact(x.device):
            for spectra, maps in _channel_blocks((weight, gweight), (g, x, gx)):
                kernel = transform.kernel(spectra[0], conjugate=True)
                correlation = None
                for g_block, x_block, gx_block in _blocks(maps):
                    spectrum, spectrum_x = transform.spectrum(g_block), next(kept, None)
                    if spectrum_x is None:
                        spectrum_x = transform_x.spectrum(x_block)
                    term = transform.correlate(spectrum, spectrum_x)
                    correlation = term if correlation is None else correlation + term
                    transform.map(transform.multiply(spectrum, kernel), out=gx_block)
                spectra[1].copy_(transform.gradient(correlation))
        return gx, gweight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.make, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        dg = _filter(a, weight, ctx.make) + _filter(x, b, ctx.make)
        return dg, *_Adjoint.apply(g, a, b, ctx.make, ()), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        g, x, weight = ctx.saved_tensors
        dg, dx, dweight = (
            torch.zeros_like(tensor) if tangent is None else tangent
            for tensor, tangent in zip((g, x, weight), tangents[:3], strict=True)
        )
        first = _Adjoint.apply(dg, x, weight, ctx.make, ())
        second = _Adjoint.apply(g, dx, dweight, ctx.make, ())
        return first[0] + second[0], first[1] + second[1]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        n, (*tensors, make, _) = info.batch_size, inputs
        g, x, weight = (
            to_channels(tensor, dim, n, channel)
            for tensor, dim, channel in zip(tensors, in_dims[:3], (3, 3, 2), strict=True)
        )
        gx, gweight = _Adjoint.apply(g, x, weight, make, ())
        return (gx.unflatten(3, (n, -1)), gweight.unflatten(2, (n, -1))), (3, 2)


def _channel_blocks(spectra: Tensors, maps: Tensors) -> Iterator[tuple[Tensors, Tensors]]:
    """Cut the channels, so that one image of each part fits a block."""
    parts = _parts(maps[0], math.prod(maps[0].shape[1:]))
    return zip(_cut(spectra, parts, dim=2), _cut(maps, parts, dim=3), strict=True)


def _blocks(maps: Tensors) -> Iterator[Tensors]:
    """Cut the batch, so that each part fits a block unless one image does not."""
    return _cut(maps, min(maps[0].shape[0], _parts(maps[0], maps[0].numel())), dim=0)


def _parts(x: Tensor, values: int) -> int:
    return math.ceil(values / _BLOCK) if x.device.type == 'cpu' else 1


def _cut(tensors: Tensors, parts: int, dim: int) -> Iterator[Tensors]:
    if parts == 1:  # on a small map, views of the whole are not for free
        return iter([tensors])
    return zip(*(tensor.chunk(parts, dim) for tensor in tensors), strict=True)


def _conjugate(weight: Tensor) -> Tensor:
    return weight * weight.new_tensor([1, -1])


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Keep matrix products in the precision of their operands, and their sums in float32."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False), _exact(device):
            yield
    elif device.type == 'cuda' and not is_capturing():  # a graph keeps the settings of its caller
        settings = torch.backends.cuda.matmul
        names = ('allow_tf32', 'allow_fp16_reduced_precision_reduction')
        before = [getattr(settings, name) for name in names]
        try:
            for name in names:
                setattr(settings, name, False)
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(settings, name, value)
    else:
        yield
