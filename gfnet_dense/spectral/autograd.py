"""The derivatives of the global filter, written once for every backend.

The filter is bilinear in the map x and the spectrum w. Its derivatives are the filter with the
conjugate spectrum and one more bilinear function, the correlation of two maps:

    filter(x, w)        y  = F^-1(w . F x)
    filter(g, w, True)  gx = F^-1(conj(w) . F g)                   gradient of <g, y> in x
    correlate(g, x)     gw = m / (H W) . sum over b of F g . conj(F x)       ... and in w

The derivatives of the correlation are filters again, so any order is covered. A column of the half
spectrum counts twice (m = 2) unless it is its own mirror image: column 0 and, for even W, W // 2
count once. The spectra of real maps are Hermitian there, and so is the gradient.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .reference import compute_dtype
from .tracing import is_capturing, is_in_forward_mode, is_transformed


class Backend(Protocol):
    """A way to compute the filter. A module with these four functions is a backend.

    Maps `x` and `g` are `(B, H, W, C)` with B > 0, share one floating dtype and have any strides.
    Spectra `weight` are `(H, W // 2 + 1, C, 2)` in the dtype to compute in, which is float32, or
    float64 for float64 maps. Results have the dtypes of maps and spectra. None of the functions
    needs derivatives of its own. Within a graph `filter` must be differentiable: made of torch's
    operators, or of a custom operator given to :func:`register_derivatives`.
    """

    def unsupported_reason(self, x: Tensor) -> str | None:
        """Say why the backend cannot filter a map like `x`; None if it can."""

    def filter(self, x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
        """Return `F^-1(weight . F x)`, or that of the conjugate spectrum."""

    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of `<g, filter(x, weight, False)>` in `weight`."""

    def adjoint(self, g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return `filter(g, weight, True)` and `correlate(g, x)`, with shared work done once."""


def differentiable_filter(backend: Backend, x: Tensor, weight: Tensor) -> Tensor:
    """Filter `x` with `weight`, differentiable in both, by the computations of a backend."""
    weight = weight.to(compute_dtype(x))
    if is_capturing():  # compilers and exporters differentiate the operators themselves
        return backend.filter(x, weight, False)
    return _filter(x, weight, False, backend)


def register_derivatives(backend: Backend, filter_operator: Any, correlate_operator: Any) -> None:
    """Give the custom operators behind a backend their derivatives, for compiled graphs.

    The operators are of any kind that :func:`torch.library.register_autograd` takes, with the
    signatures of :meth:`Backend.filter` and :meth:`Backend.correlate`.
    """
    _register(backend, filter_operator, _Filter)
    _register(backend, correlate_operator, _Correlate)


def multiplicity(width: int, device: torch.device) -> Tensor:
    """Return m for the columns of a half spectrum, in float64, of shape `(W // 2 + 1,)`."""
    column = torch.arange(width // 2 + 1, device=device)
    return torch.where((column == 0) | (2 * column == width), 1.0, 2.0).double()


# Outside of graphs a Function computes the derivatives, since operators support neither forward
# mode nor torch.func. Within graphs an operator does, since Dynamo does not trace such a Function.


class _Filter(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, conjugate: bool, backend: Backend) -> Tensor:
        return backend.filter(x, weight, conjugate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.conjugate, ctx.backend = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if needs_x and needs_weight and not (ctx.conjugate or _needs_derivatives(g, x, weight)):
            return *ctx.backend.adjoint(g, x, weight), None, None
        gx = _filter(g, weight, not ctx.conjugate, ctx.backend) if needs_x else None
        g, x = (x, g) if ctx.conjugate else (g, x)
        return gx, _correlate(g, x, ctx.backend) if needs_weight else None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, *_: None) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(_filter(dx, weight, ctx.conjugate, ctx.backend))
        if dweight is not None:
            terms.append(_filter(x, dweight, ctx.conjugate, ctx.backend))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        x, weight = _to_channels(x, in_dims[0], n, 3), _to_channels(weight, in_dims[1], n, 2)
        return _filter(x, weight, *rest).unflatten(3, (n, -1)), 3


class _Correlate(Function):
    @staticmethod
    def forward(g: Tensor, x: Tensor, backend: Backend) -> Tensor:
        return backend.correlate(g, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, ctx.backend = inputs
        ctx.save_for_backward(g, x)
        ctx.save_for_forward(g, x)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        (g, x), (needs_g, needs_x) = ctx.saved_tensors, ctx.needs_input_grad[:2]
        gg = _filter(x, weight, False, ctx.backend) if needs_g else None
        return gg, _filter(g, weight, True, ctx.backend) if needs_x else None, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dx: Tensor | None, _: None) -> Tensor:
        g, x = ctx.saved_tensors
        terms = []
        if dg is not None:
            terms.append(_correlate(dg, x, ctx.backend))
        if dx is not None:
            terms.append(_correlate(g, dx, ctx.backend))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], g: Tensor, x: Tensor, backend: Backend
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        g, x = _to_channels(g, in_dims[0], n, 3), _to_channels(x, in_dims[1], n, 3)
        return _correlate(g, x, backend).unflatten(2, (n, -1)), 2


# The same for use outside of torch.func, in the older style without `setup_context`: there `apply`
# does not bind arguments to the signature of `forward`, which takes as long as a small filter.


class _PlainFilter(_Filter):
    setup_context = staticmethod(Function.setup_context)  # marks the style

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _Filter.forward(*inputs)
        _Filter.setup_context(ctx, inputs, y)
        return y


class _PlainCorrelate(_Correlate):
    setup_context = staticmethod(Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _Correlate.forward(*inputs)
        _Correlate.setup_context(ctx, inputs, y)
        return y


def _filter(x: Tensor, weight: Tensor, conjugate: bool, backend: Backend) -> Tensor:
    if _needs_derivatives(x, weight):
        function = _Filter if is_transformed() else _PlainFilter
        return function.apply(x, weight, conjugate, backend)
    return backend.filter(x, weight, conjugate)


def _correlate(g: Tensor, x: Tensor, backend: Backend) -> Tensor:
    if _needs_derivatives(g, x):
        function = _Correlate if is_transformed() else _PlainCorrelate
        return function.apply(g, x, backend)
    return backend.correlate(g, x)


def _needs_derivatives(*tensors: Tensor) -> bool:
    """Tell whether a result must be differentiable: `apply` takes as long as a small filter."""
    if is_transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return True
    if not is_in_forward_mode():
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _to_channels(tensor: Tensor, dim: int | None, n: int, channel: int) -> Tensor:
    """Turn `n` problems of :func:`torch.func.vmap` into one with `n` times as many channels."""
    tensor = tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, channel).flatten(channel, channel + 1)


def _register(backend: Backend, operator: Any, function: type[Any]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        function.setup_context(ctx, (*inputs, backend), output)

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return function.backward(ctx, g)[:-1]

    torch.library.register_autograd(operator, backward, setup_context=setup_context)
