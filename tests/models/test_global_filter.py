"""The layer, above all the resized spectra that it keeps in evaluation."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, jvp, vmap

from gfnet_dense.models import GlobalFilter
from gfnet_dense.models import global_filter as global_filter_module
from gfnet_dense.spectral import BACKENDS, RESIZE_METHODS, global_filter, resize_spectrum

GRID = (6, 7)
SIZE = (9, 8)
methods = pytest.mark.parametrize('method', RESIZE_METHODS)


def make_layer(method: str = 'bilinear') -> GlobalFilter:
    return GlobalFilter(3, GRID, method)


def fresh_spectrum(layer: GlobalFilter, size: tuple[int, int] = SIZE) -> Tensor:
    """Resize what the parameter holds at this very moment."""
    with torch.no_grad():
        return resize_spectrum(layer.complex_weight, layer.grid, size, layer.resize)


@pytest.mark.parametrize('case', ['native', 'larger', 'odd', 'smaller', 'wide'])
@pytest.mark.parametrize('training', [True, False])
def test_agrees_with_the_official_layer(golden, relative_error, case, training):
    numbers = golden('filter')
    weight, x = numbers[f'{case}.weight'], numbers[f'{case}.input']
    layer = GlobalFilter(x.shape[3], (weight.shape[0], weight.shape[0])).double().train(training)
    layer.load_state_dict({'complex_weight': weight})
    with torch.set_grad_enabled(training):
        for _ in range(2):
            assert relative_error(layer(x), numbers[f'{case}.output']) < 1e-12


def test_starts_as_the_official_layer():
    layer = GlobalFilter(64, (56, 56))
    assert layer.complex_weight.shape == (56, 29, 64, 2)
    assert layer.complex_weight.dtype == torch.float32
    assert layer.complex_weight.mean().abs() < 1e-3
    assert layer.complex_weight.std().item() == pytest.approx(0.02, rel=0.01)


@methods
@pytest.mark.parametrize('size', [GRID, SIZE, (1, 1), (13, 4)], ids=str)
def test_training_and_evaluation_compute_the_same(size, method):
    layer, x = make_layer(method), torch.randn(2, *size, 3)
    trained = layer.train()(x)
    expected = global_filter(x, fresh_spectrum(layer, size))
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert trained.requires_grad
    assert torch.equal(trained, expected)
    assert torch.equal(evaluated, expected)


@methods
def test_evaluation_resizes_once_for_a_grid(method):
    layer = make_layer(method).eval()
    with torch.no_grad():
        first = layer.spectrum(SIZE)
        other = layer.spectrum((5, 5))
        assert layer.spectrum(torch.zeros(1, *SIZE, 3).shape[1:3]) is first
        assert layer.spectrum((5, 5)) is other
    with torch.inference_mode():
        assert layer.spectrum(SIZE) is first
    assert torch.equal(first, fresh_spectrum(layer))
    assert not first.requires_grad


def test_nested_transforms_leave_nothing_in_the_cache():
    layer = make_layer().eval().requires_grad_(False)
    x = torch.randn(1, *SIZE, 3)

    def nested(x):
        inner = torch.func.grad(lambda x: layer(x).square().sum())
        return (inner(x) * x).sum() + layer(x).sum()

    first = torch.func.grad(nested)(x)
    assert torch.equal(torch.func.grad(nested)(x), first)
    with torch.no_grad():
        assert torch.equal(layer.spectrum(SIZE), fresh_spectrum(layer))


def test_tensors_without_values_are_not_cached():
    x = torch.randn(1, *SIZE, 3)
    with torch.no_grad():
        meta = make_layer().eval().to('meta')
        for _ in range(2):
            assert meta(x.to('meta')).shape == x.shape
        layer = make_layer().eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer.spectrum(SIZE).shape == fresh_spectrum(layer).shape
        assert torch.equal(layer.spectrum(SIZE), fresh_spectrum(layer))
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer.spectrum(SIZE)


def test_the_grid_of_the_parameter_needs_no_copy():
    layer = make_layer()
    for mode in (True, False):
        assert layer.train(mode).spectrum(GRID) is layer.complex_weight


def test_few_spectra_are_kept_and_none_in_training():
    layer = make_layer().eval()
    with torch.no_grad():
        spectra = [weakref.ref(layer.spectrum((8, width))) for width in range(8, 40)]
    gc.collect()
    assert 1 <= sum(spectrum() is not None for spectrum in spectra) <= 4
    layer.train()
    gc.collect()
    assert not any(spectrum() is not None for spectrum in spectra)
    with torch.no_grad():
        assert layer.spectrum(SIZE) is not layer.spectrum(SIZE)


def by_optimizer(layer: GlobalFilter) -> None:
    layer.complex_weight.grad = torch.ones_like(layer.complex_weight)
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()


def by_fused_optimizer(layer: GlobalFilter) -> None:
    layer.complex_weight.grad = torch.ones_like(layer.complex_weight)
    torch.optim.SGD(layer.parameters(), lr=0.1, foreach=True).step()


def through_data(layer: GlobalFilter) -> None:
    layer.complex_weight.data.mul_(2)


def without_grad(layer: GlobalFilter) -> None:
    with torch.no_grad():
        layer.complex_weight.add_(1)


def in_inference_mode(layer: GlobalFilter) -> None:
    with torch.inference_mode():
        layer.complex_weight.data.add_(1)


def by_loading(layer: GlobalFilter) -> None:
    layer.load_state_dict(make_layer().state_dict())


def by_assigning_at_load(layer: GlobalFilter) -> None:
    layer.load_state_dict(make_layer().state_dict(), assign=True)


def as_an_average_does(layer: GlobalFilter) -> None:
    layer.complex_weight.data.copy_(0.9 * layer.complex_weight.data + 0.1)


def by_other_data(layer: GlobalFilter) -> None:
    layer.complex_weight.data = torch.randn_like(layer.complex_weight)


def by_vector(layer: GlobalFilter) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 3, layer.parameters())


def by_another_parameter(layer: GlobalFilter) -> None:
    layer.complex_weight = nn.Parameter(torch.randn_like(layer.complex_weight))


def through_numpy(layer: GlobalFilter) -> None:
    layer.complex_weight.detach().numpy()[...] *= -1


def in_a_single_bit(layer: GlobalFilter) -> None:
    entry = layer.complex_weight.data[0, 0, 0]
    entry[0] = torch.nextafter(entry[0], torch.tensor(1.0))


def to_float64(layer: GlobalFilter) -> None:
    layer.to(torch.float64)


def to_half_and_back(layer: GlobalFilter) -> None:
    layer.half().float()


def by_data_of_another_dtype(layer: GlobalFilter) -> None:
    layer.complex_weight.data = layer.complex_weight.data.double()


def by_training(layer: GlobalFilter) -> None:
    layer.train()
    by_optimizer(layer)
    layer.eval()


def by_apply(layer: GlobalFilter) -> None:
    layer.apply(lambda module: nn.init.normal_(module.complex_weight))


def by_another_method(layer: GlobalFilter) -> None:
    layer.resize = 'spatial'


@pytest.mark.parametrize(
    'change',
    [
        by_optimizer,
        by_fused_optimizer,
        through_data,
        without_grad,
        in_inference_mode,
        by_loading,
        by_assigning_at_load,
        as_an_average_does,
        by_other_data,
        by_vector,
        by_another_parameter,
        through_numpy,
        in_a_single_bit,
        to_float64,
        to_half_and_back,
        by_data_of_another_dtype,
        by_training,
        by_apply,
        by_another_method,
    ],
)
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_a_kept_spectrum_is_never_stale(change, context):
    layer = make_layer().eval()
    with context():
        before = layer.spectrum(SIZE)
        layer.spectrum((5, 5))
    copied = before.clone()
    change(layer)
    with context():
        after = layer.spectrum(SIZE)
        other = layer.spectrum((5, 5))
    assert after.dtype == layer.complex_weight.dtype
    assert not torch.equal(after.double(), before.double())
    assert torch.equal(after, fresh_spectrum(layer))
    assert torch.equal(other, fresh_spectrum(layer, (5, 5)))
    assert torch.equal(before, copied)  # whoever still holds it, holds what it was


def test_values_that_are_not_numbers_are_never_taken_for_old_ones():
    layer = make_layer().eval()
    with torch.no_grad():
        layer.complex_weight[0, 0] = torch.nan
        assert layer.spectrum(SIZE).isnan().any()
        layer.complex_weight.fill_(1)
        assert torch.equal(layer.spectrum(SIZE), fresh_spectrum(layer))


def test_a_change_by_another_thread_while_resizing_leaves_nothing_stale(monkeypatch):
    layer = make_layer().eval()

    def interrupted(*arguments):
        resized = resize_spectrum(*arguments)
        monkeypatch.undo()

        def change_and_use():
            layer.complex_weight.data.mul_(2)
            with torch.no_grad():
                layer.spectrum(SIZE)

        other = threading.Thread(target=change_and_use)
        other.start()
        other.join()
        return resized

    monkeypatch.setattr(global_filter_module, 'resize_spectrum', interrupted)
    with torch.no_grad():
        layer.spectrum(SIZE)  # as of before or after the change, which came in between
        assert torch.equal(layer.spectrum(SIZE), fresh_spectrum(layer))


def test_many_threads_at_once():
    layer = make_layer().eval()
    sizes = [(height, 5) for height in range(7, 13)]
    expected = {size: fresh_spectrum(layer, size) for size in sizes}
    problems = []

    def work(start: int) -> None:
        try:
            with torch.no_grad():
                for i in range(1500):
                    size = sizes[(start + i * (start + 1)) % len(sizes)]
                    if not torch.equal(layer.spectrum(size), expected[size]):
                        problems.append(size)
        except Exception as e:
            problems.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert problems == []


@methods
def test_evaluation_with_gradients_reaches_the_parameter(method):
    layer = make_layer(method).eval()
    with torch.no_grad():
        layer(torch.randn(1, *SIZE, 3))
    layer(torch.randn(1, *SIZE, 3)).square().sum().backward()
    assert layer.complex_weight.grad.abs().sum() > 0


@methods
def test_what_inference_mode_kept_serves_a_backward_pass(method):
    layer = make_layer(method).eval().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(1, *SIZE, 3))
        assert not layer.spectrum(SIZE).is_inference()
    x = torch.randn(1, *SIZE, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.complex_weight.grad is None


@methods
def test_what_autocast_kept_is_no_less_exact(method):
    layer = make_layer(method).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        kept = layer.spectrum(SIZE)
    assert torch.equal(kept, fresh_spectrum(layer))


def test_transforms_of_torch_func_see_the_parameter_they_are_given(relative_error):
    layer, x = make_layer().eval(), torch.randn(1, *SIZE, 3)
    weight = layer.complex_weight.detach().clone()

    def use(weight: Tensor) -> Tensor:
        return functional_call(layer, {'complex_weight': weight}, (x,))

    with torch.no_grad():
        y = layer(x)
    # The layer is linear in its parameter.
    _, derivative = jvp(use, (weight,), (weight,))
    assert relative_error(derivative, y) < 1e-5
    ensemble = vmap(use)(torch.stack([weight, 2 * weight]))
    assert relative_error(ensemble, torch.stack([y, 2 * y])) < 1e-5


@pytest.mark.parametrize('copying', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_carry_the_parameter_alone(copying):
    layer, x = make_layer().eval(), torch.randn(1, *SIZE, 3)
    bytes_before = len(pickle.dumps(layer))
    with torch.no_grad():
        y = layer(x)
        assert len(pickle.dumps(layer)) == bytes_before
        twin = copying(layer)
        assert not twin.training
        assert torch.equal(twin(x), y)
        twin.complex_weight.mul_(2)
        assert torch.equal(twin(x), 2 * y)
        assert torch.equal(layer(x), y)


def test_the_state_is_the_parameter_alone():
    layer = make_layer().eval()
    with torch.no_grad():
        layer(torch.randn(1, *SIZE, 3))
    assert list(layer.state_dict()) == ['complex_weight']
    assert [name for name, _ in layer.named_parameters()] == ['complex_weight']
    assert list(layer.buffers()) == []


@pytest.mark.parametrize('training', [True, False])
def test_compiles_to_one_graph(training):
    layer, x = make_layer().train(training), torch.randn(1, *SIZE, 3)
    with torch.no_grad():
        layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
        layer.complex_weight.data.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@methods
def test_other_dtypes(dtype, method):
    layer, x = make_layer(method).to(dtype).eval(), torch.randn(1, *SIZE, 3, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    expected = global_filter(x.double(), fresh_spectrum(layer).double())
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('training', [True, False])
def test_modes_return_the_layer(training):
    layer = make_layer()
    assert layer.train(training) is layer
    assert layer.training is training
    assert layer.eval() is layer


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0, (4, 4)), r'positive.*0 and \(4, 4\)'),
        ((3, (4, 0)), r'positive.*3 and \(4, 0\)'),
        ((3, (4, 4), 'nearest'), f"'nearest'.*{', '.join(RESIZE_METHODS)}"),
        ((3, (4, 4), 'bilinear', 'cufft'), f"'cufft'.*{', '.join(BACKENDS)}"),
    ],
)
def test_what_makes_no_layer_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalFilter(*arguments)


def test_maps_that_do_not_fit_are_refused():
    layer = make_layer()
    with pytest.raises(ValueError, match=r'\(9, 5, 2, 2\), but got \(9, 5, 3, 2\)'):
        layer(torch.zeros(1, *SIZE, 2))
    with pytest.raises(ValueError, match='cell'):
        layer(torch.zeros(1, 0, 4, 3))


def test_says_what_it_is_made_for():
    text = repr(make_layer('spatial'))
    assert 'grid=(6, 7)' in text
    assert 'spatial' in text
