"""The derivatives: of every backend, of one that records its calls, of one of custom operators."""

import pytest
import torch
from filter_oracle import assert_near, expected, random_case, result_and_gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jvp, vjp, vmap

from gfnet_dense.spectral import BACKENDS, fft, global_filter
from gfnet_dense.spectral.autograd import differentiable_filter, register_derivatives
from gfnet_dense.spectral.reference import reference_filter
from gfnet_dense.spectral.tracing import operator_unsupported_reason

# 'fused' takes no float64.
TESTED = [b for b in BACKENDS if b != 'fused']
backends = pytest.mark.parametrize('backend', TESTED)


@pytest.mark.parametrize(
    'backend', [pytest.param(b, marks=[pytest.mark.slow] * (b != 'native')) for b in TESTED]
)
@pytest.mark.parametrize(
    'size',
    [(1, 1), (2, 3), *(pytest.param(s, marks=pytest.mark.slow) for s in [(3, 2), (4, 4)])],
    ids=str,
)
def test_derivatives_of_any_order_and_kind(backend, size):
    inputs = random_case(size, channels=1)[:2]

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, backend)

    def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x, weight).pow(3).sum(), (x, weight), create_graph=True)

    assert gradcheck(run, inputs, check_forward_ad=True)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True)
    assert gradgradcheck(gradient, inputs)


@backends
@pytest.mark.parametrize('size', [(3, 4), (5, 3)], ids=str)
def test_transforms_of_torch_func(backend, size):
    n, shape = 3, (2, *size, 2)
    xs = torch.randn(n, *shape, dtype=torch.float64)
    weights = torch.randn(n, size[0], size[1] // 2 + 1, 2, 2, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, backend)

    def pull(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return vjp(run, x, weight)[1](x)

    for function in (run, pull, lambda x, w: jvp(run, (x, w), (x, w))[1]):
        for dims in ((0, 0), (0, None), (None, 0)):
            inputs = [t if d == 0 else t[0] for t, d in zip((xs, weights), dims, strict=True)]
            actual = vmap(function, dims)(*inputs)
            rows = [
                function(*(t[i] if d == 0 else t for t, d in zip(inputs, dims, strict=True)))
                for i in range(n)
            ]
            stacked = (
                tuple(map(torch.stack, zip(*rows, strict=True)))
                if isinstance(actual, tuple)
                else torch.stack(rows)
            )
            torch.testing.assert_close(actual, stacked, rtol=0, atol=1e-12)

    # Linear in either input: the second derivative in x alone is zero, the mixed one gives the map.
    second = hessian(lambda x, w: run(x, w).sum(), argnums=(0, 1))(xs[0], weights[0])
    assert not second[0][0].any()
    dot = torch.einsum(
        '...,...->', second[0][1].flatten(0, 3).flatten(1) @ weights[0].flatten(), xs[0].flatten()
    )
    torch.testing.assert_close(dot, run(xs[0], weights[0]).sum())


@backends
def test_forward_mode_without_gradients(backend):
    x, weight, dx = (t.detach() for t in random_case((3, 4)))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = global_filter(torch.autograd.forward_ad.make_dual(x, dx), weight, backend)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert_near([tangent], [reference_filter(dx, weight)], 1e-12)


@backends
def test_a_batch_of_gradients(backend):
    x, weight, _ = random_case((3, 4))
    gs = torch.randn(5, *x.shape, dtype=torch.float64)
    y = global_filter(x, weight, backend)
    actual = vmap(lambda g: torch.autograd.grad(y, (x, weight), g, retain_graph=True))(gs)
    rows = [expected(x, weight, g)[1:] for g in gs]
    assert_near(list(actual), [torch.stack(t) for t in zip(*rows, strict=True)], 1e-12)


@backends
def test_gradients_only_where_they_are_asked_for(backend):
    x, weight, g = (t.detach() for t in random_case((5, 6), torch.float32))
    gradients = expected(x, weight, g)[1:]
    for index, tensor in enumerate((x, weight)):
        tensor.requires_grad_()
        (gradient,) = torch.autograd.grad(global_filter(x, weight, backend), tensor, g)
        assert_near([gradient], [gradients[index]], 1e-6)
        tensor.requires_grad_(False)


class Recorder:
    """A backend that records which of its functions run."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def unsupported_reason(self, x: Tensor) -> None:
        return None

    def filter(self, x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
        self.calls.append('conjugate filter' if conjugate else 'filter')
        return fft.filter(x, weight, conjugate)

    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        self.calls.append('correlate')
        return fft.correlate(g, x)

    def adjoint(self, g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append('adjoint')
        return fft.adjoint(g, x, weight)


@pytest.mark.parametrize(
    ('needs_x', 'needs_weight', 'calls'),
    [
        (False, False, []),
        (True, False, ['conjugate filter']),
        (False, True, ['correlate']),
        (True, True, ['adjoint']),
    ],
)
def test_computes_no_more_than_is_asked_for(needs_x, needs_weight, calls):
    x, weight, g = (t.detach() for t in random_case((4, 5)))
    recorder = Recorder()
    y = differentiable_filter(
        recorder, x.requires_grad_(needs_x), weight.requires_grad_(needs_weight)
    )
    if needs_x or needs_weight:
        y.backward(g)
    assert recorder.calls == ['filter', *calls]


def test_keeps_only_the_inputs_for_the_gradient():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x, weight, _ = random_case((6, 5), torch.float32)
        differentiable_filter(fft, x, weight)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]


class Operators(Recorder):
    """A backend of custom operators."""

    def filter(self, x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
        return torch.ops.gfnet_dense_test.filter(x, weight, conjugate)

    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        return torch.ops.gfnet_dense_test.correlate(g, x)

    def adjoint(self, g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.filter(g, weight, True), self.correlate(g, x)


@pytest.fixture(scope='module')
def operators() -> Operators:
    operators, names = Operators(), ('gfnet_dense_test::filter', 'gfnet_dense_test::correlate')
    run_filter = torch.library.custom_op(names[0], fft.filter, mutates_args=())
    run_filter.register_fake(lambda x, weight, conjugate: x.new_empty(x.shape))
    run_correlate = torch.library.custom_op(names[1], fft.correlate, mutates_args=())
    run_correlate.register_fake(
        lambda g, x: x.new_empty(x.shape[1], x.shape[2] // 2 + 1, x.shape[3], 2)
    )
    register_derivatives(operators, *names)
    return operators


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True])
def test_operators_compile_to_one_graph_with_their_gradients(operators, dynamic):
    torch.compiler.reset()
    run = torch.compile(
        lambda x, weight: differentiable_filter(operators, x, weight),
        backend='aot_eager',
        fullgraph=True,
        dynamic=dynamic,
    )
    case = random_case((4, 5))
    assert_near(result_and_gradients(run, *case), expected(*case), 1e-12)


def test_operators_are_what_torch_asks_for(operators):
    x, weight, g = random_case((4, 3))
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    names = torch.ops.gfnet_dense_test
    torch.library.opcheck(names.filter.default, (x, weight, True), test_utils=checks)
    torch.library.opcheck(names.correlate.default, (g.requires_grad_(), x), test_utils=checks)


def ask(x: Tensor) -> Tensor:
    return x + 1 if operator_unsupported_reason() else x


class Ask(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ask(x)


@pytest.mark.filterwarnings('ignore:.isinstance.treespec:FutureWarning')  # torch.export in itself
def test_exported_graphs_hold_no_custom_operators():
    x = torch.zeros(2)
    assert not ask(x).any()
    assert torch.jit.trace(ask, x, check_trace=False)(x).all()
    assert torch.export.export(Ask(), (x,)).module()(x).all()


def test_compiled_graphs_hold_custom_operators_but_not_under_transforms():
    torch.compiler.reset()
    x = torch.zeros(2)
    assert torch.compile(lambda x: vmap(ask)(x), backend='eager', fullgraph=True)(x).all()
    if hasattr(torch.compiler, 'is_exporting'):  # before torch 2.7 all graphs count as exported
        assert not torch.compile(ask, backend='eager', fullgraph=True)(x).any()
