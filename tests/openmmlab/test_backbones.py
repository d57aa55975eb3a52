"""The networks against published counts, numbers of the official code, and what a backbone is."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DATA_SAMPLERS, METRICS, MODELS, Registry
from torch import Tensor, nn

from gfnet_dense import openmmlab
from gfnet_dense.models import GlobalFilter
from gfnet_dense.models.checkpoint import adapt_state_dict
from gfnet_dense.models.gfnet import HIERARCHICAL, ISOTROPIC
from gfnet_dense.openmmlab import GFNet, GFNetPyramid
from gfnet_dense.spectral import RESIZE_METHODS

# With the 1000-way head, at 224 pixels; and the drop path rate of the official training.
PUBLISHED = {
    'ti': (GFNet, 7_511_784, 0.0),
    'xs': (GFNet, 15_985_768, 0.0),
    's': (GFNet, 24_869_608, 0.15),
    'b': (GFNet, 43_120_616, 0.25),
    'h-ti': (GFNetPyramid, 15_085_096, 0.1),
    'h-s': (GFNetPyramid, 32_162_632, 0.2),
    'h-b': (GFNetPyramid, 53_744_200, 0.4),
}
EMBED_DIMS = {
    'ti': 256,
    'xs': 384,
    's': 384,
    'b': 512,
    'h-ti': (64, 128, 256, 512),
    'h-s': (96, 192, 384, 768),
    'h-b': (96, 192, 384, 768),
}
DEPTHS = {
    'ti': 12,
    'xs': 12,
    's': 19,
    'b': 19,
    'h-ti': (3, 3, 10, 3),
    'h-s': (3, 3, 10, 3),
    'h-b': (3, 3, 27, 3),
}
LAYER_SCALE = {'h-ti': 1e-3, 'h-s': 1e-5, 'h-b': 1e-6}
PYRAMID = {
    'embed_dims': (4, 6, 8, 10),
    'depths': (1, 2, 1, 1),
    'layer_scale_init_value': 0.5,
}
PATCHES = {'embed_dims': 8, 'depths': 3}
SIZES = [(1, 1), (1, 7), (33, 65), (31, 17), (32, 32), (64, 3), (40, 56)]
NETWORKS = [(GFNetPyramid, PYRAMID), (GFNet, PATCHES)]

names = pytest.mark.parametrize('name', PUBLISHED)
networks = pytest.mark.parametrize(('network', 'arch'), NETWORKS, ids=['GFNetPyramid', 'GFNet'])


def on_meta(name: str, **arguments) -> GFNet | GFNetPyramid:
    """Make a published network without memory for its parameters."""
    with torch.device('meta'):
        return PUBLISHED[name][0](name, **arguments)


def shrunk(name: str, **arguments) -> GFNet | GFNetPyramid:
    """Make a published network with an eighth of its channels."""
    dims = EMBED_DIMS[name]
    arch = {
        'embed_dims': dims // 8 if isinstance(dims, int) else [dim // 8 for dim in dims],
        'depths': DEPTHS[name],
        'layer_scale_init_value': LAYER_SCALE.get(name),
    }
    return PUBLISHED[name][0](arch, img_size=32, drop_path_rate=0, **arguments)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks in the order of the data, of either network."""
    blocks = list(model.blocks)
    return list(itertools.chain(*blocks)) if isinstance(model, GFNetPyramid) else blocks


def loss_of(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Weigh every output with a random number, or else a norm's gradient would vanish."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    return sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs)


# Published sizes


@names
def test_parameter_counts_are_the_published_ones(name):
    model = on_meta(name, num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][1]


@names
def test_shapes_are_the_published_ones(name):
    state = on_meta(name, num_classes=1000).state_dict()
    dims, depths = EMBED_DIMS[name], DEPTHS[name]
    if name.startswith('h-'):
        grids = [(56, 29), (28, 15), (14, 8), (7, 4)]
        for stage, (dim, depth, grid) in enumerate(zip(dims, depths, grids, strict=True)):
            for i in range(depth):
                shape = state[f'blocks.{stage}.{i}.filter.complex_weight'].shape
                assert shape == (*grid, dim, 2)
                assert state[f'blocks.{stage}.{i}.gamma'].shape == (dim,)
        assert state['pos_embed'].shape == (1, 56 * 56, dims[0])
        assert state['patch_embed.0.proj.weight'].shape == (dims[0], 3, 4, 4)
        assert state['patch_embed.3.proj.weight'].shape == (dims[3], dims[2], 2, 2)
        assert state['head.weight'].shape == (1000, dims[3])
    else:
        for i in range(depths):
            assert state[f'blocks.{i}.filter.complex_weight'].shape == (14, 8, dims, 2)
        assert not any(key.endswith('gamma') for key in state)
        assert state['pos_embed'].shape == (1, 14 * 14, dims)
        assert state['patch_embed.proj.weight'].shape == (dims, 3, 16, 16)
        assert state['head.weight'].shape == (1000, dims)


def test_layer_scale_may_be_an_integer():
    model = GFNetPyramid({**PYRAMID, 'layer_scale_init_value': 1})
    assert all(torch.equal(block.gamma, torch.ones_like(block.gamma)) for block in blocks_of(model))


@names
def test_drop_path_grows_linearly_to_the_published_rate(name):
    rates = [block.drop_path.drop_prob for block in blocks_of(on_meta(name))]
    last = PUBLISHED[name][2]
    expected = [last * i / (len(rates) - 1) for i in range(len(rates))]
    assert rates == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize('name', LAYER_SCALE)
def test_layer_scale_starts_at_the_published_value(name):
    model = GFNetPyramid({'embed_dims': 4, 'depths': 2, 'layer_scale_init_value': 0.25})
    assert all((block.gamma == 0.25).all() for block in blocks_of(model))
    assert HIERARCHICAL[name].layer_scale_init_value == LAYER_SCALE[name]


@networks
def test_initial_values(network, arch):
    wide = {**arch, 'embed_dims': 64 if network is GFNet else (64,) * 4}
    model = network(wide, num_classes=50)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, GlobalFilter):
            assert module.complex_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


# Numbers of the official code


def golden_arguments(kind: str) -> tuple[type, dict]:
    if kind == 'isotropic':
        return GFNet, {'arch': {'embed_dims': 16, 'depths': 2}}
    dims, depths = (8, 16, 24, 32), (1, 1, 2, 1)
    arch = {'embed_dims': dims, 'depths': depths, 'layer_scale_init_value': 1.0}
    return GFNetPyramid, {'arch': arch}


def golden_state(numbers: dict[str, Tensor], prefix: str = 'state_dict.') -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}


kinds = pytest.mark.parametrize('kind', ['hierarchical', 'isotropic'])


@kinds
@pytest.mark.parametrize('training', [True, False])
def test_logits_are_those_of_the_official_code(golden, relative_error, kind, training):
    numbers = golden(kind)
    network, arguments = golden_arguments(kind)
    model = network(**arguments, img_size=64, num_classes=10).train(training)
    model.load_state_dict(golden_state(numbers))
    assert list(model.state_dict().keys() ^ golden_state(numbers).keys()) == []
    assert relative_error(model(numbers['input']), numbers['logits']) < 1e-5


def test_stage_maps_are_those_of_the_official_code(golden, relative_error):
    numbers = golden('hierarchical')
    network, arguments = golden_arguments('hierarchical')
    model = network(**arguments, img_size=64).eval()
    state, _ = adapt_state_dict(golden_state(numbers), model)
    model.load_state_dict(state, strict=False)
    for i in range(4):
        setattr(model, f'norm{i}', nn.Identity())  # the numbers are from before any norm
    outputs = model(numbers['input'])
    assert len(outputs) == 4
    for i, y in enumerate(outputs):
        assert relative_error(y, numbers[f'stage{i}']) < 1e-5


@kinds
def test_the_official_resize_in_forward(golden, relative_error, kind):
    numbers = golden(kind)
    network, arguments = golden_arguments(kind)
    model = network(**arguments, img_size=64, num_classes=10, filter_resize='bicubic').eval()
    model.load_state_dict(golden_state(numbers))
    assert relative_error(model(numbers['input_96']), numbers['logits_96']) < 1e-5
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(model(numbers['input_96']), numbers['logits_96']) < 1e-5


@kinds
def test_the_official_resize_of_weights(golden, relative_error, kind):
    numbers = golden(kind)
    network, arguments = golden_arguments(kind)
    model = network(**arguments, img_size=96, num_classes=10, filter_resize='bicubic').eval()
    state, _ = adapt_state_dict(golden_state(numbers), model)
    for key, expected in golden_state(numbers, 'state_dict_96.').items():
        assert relative_error(state[key], expected) < 1e-5
    model.load_state_dict(state)
    assert relative_error(model(numbers['input_96']), numbers['logits_96']) < 1e-5


@kinds
def test_the_last_map_leads_to_the_logits(golden, relative_error, kind):
    numbers = golden(kind)
    network, arguments = golden_arguments(kind)
    model = network(**arguments, img_size=64).eval()
    state = golden_state(numbers)
    adapted, _ = adapt_state_dict(state, model)
    model.load_state_dict(adapted, strict=False)
    features = model(numbers['input'])[-1].mean(dim=(2, 3))
    logits = F.linear(features, state['head.weight'], state['head.bias'])
    assert relative_error(logits, numbers['logits']) < 1e-5


# Any size


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('img_size', [64, (33, 50)])
def test_a_pyramid_of_any_size(training, img_size):
    model = GFNetPyramid(PYRAMID, img_size=img_size).train(training)
    with torch.set_grad_enabled(training):
        for batch, (height, width) in itertools.product((1, 2), SIZES):
            outputs = model(torch.randn(batch, 3, height, width))
            assert isinstance(outputs, tuple)
            assert [tuple(y.shape) for y in outputs] == [
                (batch, dim, math.ceil(height / stride), math.ceil(width / stride))
                for dim, stride in zip(PYRAMID['embed_dims'], (4, 8, 16, 32), strict=True)
            ]
            assert all(y.isfinite().all() for y in outputs)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('img_size', [64, (33, 50)])
def test_patches_of_any_size(training, img_size):
    model = GFNet(PATCHES, img_size=img_size, out_indices=[0, 2]).train(training)
    with torch.set_grad_enabled(training):
        for batch, (height, width) in itertools.product((1, 2), SIZES):
            outputs = model(torch.randn(batch, 3, height, width))
            shape = (batch, 8, math.ceil(height / 16), math.ceil(width / 16))
            assert [tuple(y.shape) for y in outputs] == [shape] * 2
            assert all(y.isfinite().all() for y in outputs)


@networks
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_a_classifier_of_any_size(network, arch, size):
    model = network(arch, img_size=48, num_classes=5)
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


@networks
@pytest.mark.parametrize('method', RESIZE_METHODS)
def test_training_and_evaluation_see_the_same(network, arch, method):
    model = network(arch, img_size=48, filter_resize=method, drop_path_rate=0)
    for size in [(31, 17), (64, 64), (31, 17)]:
        x = torch.randn(2, 3, *size)
        trained = model.train()(x)
        with torch.no_grad():
            evaluated = model.eval()(x)
        for a, b in zip(trained, evaluated, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@networks
def test_the_method_of_resizing_matters_on_other_grids_only(network, arch):
    reference = network(arch, img_size=64)
    for method in RESIZE_METHODS[1:]:
        model = network(arch, img_size=64, filter_resize=method)
        model.load_state_dict(reference.state_dict())
        same, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 48, 80)
        torch.testing.assert_close(model(same)[-1], reference(same)[-1])
        assert not torch.allclose(model(other)[-1], reference(other)[-1], rtol=1e-4, atol=1e-4)


@networks
def test_images_of_a_batch_do_not_see_each_other(network, arch):
    model = network(arch, img_size=32).eval()
    x = torch.randn(3, 3, 40, 24)
    for whole, single in zip(model(x), model(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('network', 'arch', 'arguments', 'patch'),
    [(GFNetPyramid, PYRAMID, {'out_indices': [0]}, 4), (GFNet, PATCHES, {}, 16)],
)
def test_what_a_patch_lacks_is_zero(network, arch, arguments, patch):
    model = network(arch, img_size=32, **arguments)
    x = torch.randn(1, 3, 33, 49)
    padded = F.pad(x, (0, -49 % patch, 0, -33 % patch))
    torch.testing.assert_close(model(x)[0], model(padded)[0])


@networks
def test_inputs_are_left_alone_whatever_their_strides(network, arch):
    model = network(arch, img_size=32)
    x = torch.randn(2, 3, 40, 36)
    before = x.clone()
    expected = model(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 2, 1)[:, :, :40]):
        for a, b in zip(model(other), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


# A backbone of OpenMMLab


@pytest.mark.parametrize(
    ('out_indices', 'levels'),
    [
        (None, (0, 1, 2, 3)),
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ([1, 3], (1, 3)),
        ((-1,), (3,)),
        ((0, -2), (0, 2)),
        (range(2), (0, 1)),
    ],
)
def test_out_indices_of_a_pyramid(out_indices, levels):
    whole = GFNetPyramid(PYRAMID, img_size=32)
    model = GFNetPyramid(PYRAMID, img_size=32, out_indices=out_indices)
    own = model.state_dict()
    assert {k for k in own if k.startswith('norm')} == {
        f'norm{i}.{kind}' for i in levels for kind in ('weight', 'bias')
    }
    assert len(model.blocks) == len(model.patch_embed) == levels[-1] + 1
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in own})
    x = torch.randn(1, 3, 32, 48)
    expected = whole.eval()(x)
    outputs = model.eval()(x)
    assert len(outputs) == len(levels)
    for y, i in zip(outputs, levels, strict=True):
        assert torch.equal(y, expected[i])


@pytest.mark.parametrize(
    ('out_indices', 'levels'),
    [(None, (2,)), ((0, 1, 2), (0, 1, 2)), ([0, -1], (0, 2)), ([1], (1,))],
)
def test_out_indices_of_patches(out_indices, levels):
    whole = GFNet(PATCHES, img_size=32, out_indices=(0, 1, 2))
    model = GFNet(PATCHES, img_size=32, out_indices=out_indices)
    own = model.state_dict()
    assert {k for k in own if k.startswith('norm')} == {
        f'norm{i}.{kind}' for i in levels for kind in ('weight', 'bias')
    }
    assert len(model.blocks) == levels[-1] + 1
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in own})
    x = torch.randn(1, 3, 32, 48)
    expected = whole.eval()(x)
    outputs = model.eval()(x)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(levels)
    for y, i in zip(outputs, levels, strict=True):
        assert torch.equal(y, expected[i])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(in_chans=4), 'in_chans is called in_channels here'),
        (dict(out_indices=3), 'out_indices must be a list or tuple, but got 3'),
    ],
)
def test_arguments_of_the_plain_networks_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        GFNetPyramid(PYRAMID, img_size=32, **arguments)


def test_each_map_passes_its_own_norm():
    model = GFNetPyramid(PYRAMID, img_size=32)
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    for y in before:
        torch.testing.assert_close(y.mean(1), torch.zeros_like(y.mean(1)), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            y.var(1, correction=0), torch.ones_like(y[:, 0]), rtol=0, atol=0.1
        )
    for i in range(4):
        with torch.no_grad():
            getattr(model, f'norm{i}').bias += i
    for i, (a, b) in enumerate(zip(before, model(x), strict=True)):
        torch.testing.assert_close(b, a + i)


def test_levels_that_are_not_built_do_not_change_the_drop_path():
    arch = {'embed_dims': (4, 4, 4, 4), 'depths': (1, 2, 3, 1)}
    whole = [b.drop_path.drop_prob for b in blocks_of(GFNetPyramid(arch, drop_path_rate=0.6))]
    assert whole == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    part = GFNetPyramid(arch, drop_path_rate=0.6, out_indices=(0, 1))
    assert [b.drop_path.drop_prob for b in blocks_of(part)] == whole[:3]


@networks
def test_drop_path_acts_in_training_only(network, arch):
    model = network({**arch, 'layer_scale_init_value': 1.0}, img_size=32, drop_path_rate=0.9)
    x = torch.randn(8, 3, 32, 32)
    first, second = model.train()(x)[-1], model(x)[-1]
    assert not torch.equal(first, second)
    first, second = model.eval()(x)[-1], model(x)[-1]
    assert torch.equal(first, second)


@networks
def test_maps_are_contiguous(network, arch):
    for y in network(arch, img_size=32)(torch.randn(2, 3, 64, 64)):
        assert y.is_contiguous()


@names
@pytest.mark.parametrize('num_classes', [0, 7])
def test_every_parameter_receives_a_gradient(name, num_classes):
    model = shrunk(name, num_classes=num_classes)
    loss_of(model(torch.randn(2, 3, 32, 32))).backward()
    idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@networks
def test_parameters_learn_from_images_of_another_size(network, arch):
    for method in RESIZE_METHODS:
        model = network(arch, img_size=32, filter_resize=method)
        loss_of(model(torch.randn(2, 3, 40, 72))).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@networks
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1, 100])
def test_loss_and_gradients_are_finite_under_autocast(network, arch, dtype, scale):
    model = network(arch, img_size=32, num_classes=5)
    images, targets = scale * torch.randn(4, 3, 64, 48), torch.arange(4)
    with torch.autocast('cpu', dtype):
        loss = F.cross_entropy(model(images).float(), targets)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@networks
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_maps_under_autocast_are_near_those_of_float32(network, arch, dtype, relative_error):
    model = network(arch, img_size=32).eval()
    x = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype):
            outputs = model(x)
    for y, z in zip(outputs, expected, strict=True):
        assert relative_error(y.float(), z) < 16 * torch.finfo(dtype).eps


@networks
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
@pytest.mark.parametrize('autocast', [False, True])
def test_gradient_checkpointing_changes_nothing(network, arch, drop_path_rate, autocast):
    results = []
    for with_cp in (False, True):
        torch.manual_seed(3)
        model = network(arch, img_size=32, drop_path_rate=drop_path_rate, with_cp=with_cp)
        calls = []
        for block in blocks_of(model):
            block.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        x = torch.randn(2, 3, 48, 40, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            outputs = model(x)
        loss_of(outputs).backward()
        assert len(calls) == (2 if with_cp else 1) * len(blocks_of(model))
        gradients = {k: p.grad for k, p in model.named_parameters()}
        results.append((*outputs, x.grad, *gradients.values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_rests_without_gradients():
    model = GFNetPyramid(PYRAMID, img_size=32, with_cp=True)
    with torch.no_grad():
        assert not model(torch.randn(1, 3, 32, 32))[0].requires_grad


def is_frozen_in_pyramid(name: str, frozen_stages: int) -> bool:
    if frozen_stages < 0:
        return False
    parts = name.split('.')
    if parts[0] == 'pos_embed':
        return True
    if parts[0] == 'patch_embed':
        return int(parts[1]) < max(1, frozen_stages)
    if parts[0] == 'blocks':
        return int(parts[1]) < frozen_stages
    return int(parts[0].removeprefix('norm')) < frozen_stages


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3, 4])
def test_frozen_stages_of_a_pyramid(frozen_stages):
    model = GFNetPyramid(PYRAMID, img_size=32, frozen_stages=frozen_stages, drop_path_rate=0.5)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            frozen = is_frozen_in_pyramid(name, frozen_stages)
            assert parameter.requires_grad is not frozen, name
            module = model.get_submodule(name.rpartition('.')[0])
            assert module.training is (not frozen or module is model), name
        model.eval()
        assert not any(module.training for module in model.modules())
        assert model.train() is model
    if frozen_stages < 4:
        loss_of(model(torch.randn(2, 3, 32, 32))).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) is is_frozen_in_pyramid(name, frozen_stages), name


def test_frozen_stages_drop_nothing():
    arch = {**PYRAMID, 'depths': (3, 1, 1, 1)}
    model = GFNetPyramid(arch, img_size=32, frozen_stages=1, drop_path_rate=0.9).train()
    x = torch.randn(8, 3, 40, 40)
    first, second = model(x), model(x)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 3])
def test_frozen_stages_of_patches(frozen_stages):
    model = GFNet(PATCHES, img_size=32, out_indices=(0, 1, 2), frozen_stages=frozen_stages).train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    prefixes = ['pos_embed', 'patch_embed.'] if frozen_stages >= 0 else []
    prefixes += [f'blocks.{i}.' for i in range(frozen_stages)]
    prefixes += [f'norm{i}.' for i in range(frozen_stages)]
    assert frozen == {k for k in model.state_dict() if k.startswith(tuple(prefixes))}
    assert [block.training for block in model.blocks] == [i >= frozen_stages for i in range(3)]


@networks
def test_norm_eval(network, arch):
    for norm_eval in (False, True):
        model = network(arch, img_size=32, norm_eval=norm_eval)
        assert model.train() is model
        for module in model.modules():
            is_norm = isinstance(module, nn.LayerNorm)
            assert module.training is not (is_norm and norm_eval)
        assert not any(module.training for module in model.eval().modules())


@networks
def test_copies_compute_the_same(network, arch):
    model, x = network(arch, img_size=32).eval(), torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        y = model(x)[-1]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x)[-1], y)


def test_registries_of_openmmlab_find_the_networks():
    child = Registry('model', parent=MODELS, scope='a_child_of_mmengine')
    try:
        for registry in (MODELS, child):
            with torch.device('meta'):
                model = registry.build({'type': 'GFNetPyramid', 'arch': 'h-ti'})
            assert type(model) is GFNetPyramid
            assert isinstance(model, BaseModule)
            assert type(registry.build({'type': 'GFNet', 'arch': PATCHES})) is GFNet
    finally:
        MODELS.children.pop('a_child_of_mmengine')


@networks
def test_init_weights_keeps_the_initial_values(network, arch):
    model = network(arch, img_size=32)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_checkpoint_without_type_says_what_to_give():
    """As --cfg-options model.backbone.init_cfg.checkpoint=... makes it of init_cfg=None."""
    model = GFNetPyramid(PYRAMID, img_size=32, init_cfg={'checkpoint': 'a.pth'})
    with pytest.raises(ValueError, match=r"has no type, but is .*'a\.pth'.* type=Pretrained"):
        model.init_weights()


def test_init_weights_follows_other_init_cfgs():
    init_cfg = {'type': 'Constant', 'layer': 'LayerNorm', 'val': 3}
    model = GFNetPyramid(PYRAMID, img_size=32, init_cfg=init_cfg)
    model.init_weights()
    assert (model.norm0.weight == 3).all()


# Arguments


def test_arch_is_a_name_or_a_dict():
    with torch.device('meta'):
        for network, table in ((GFNet, ISOTROPIC), (GFNetPyramid, HIERARCHICAL)):
            for name in table:
                named = network(name)
                given = network(
                    {
                        'embed_dims': EMBED_DIMS[name],
                        'depths': DEPTHS[name],
                        'layer_scale_init_value': LAYER_SCALE.get(name),
                    }
                )
                shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (named, given)]
                assert shapes[0] == shapes[1]
    model = GFNetPyramid({'embed_dims': [4, 8], 'depths': [1, 1], 'patch_size': 2}, img_size=16)
    assert [tuple(y.shape) for y in model(torch.zeros(1, 3, 15, 16))] == [
        (1, 4, 8, 8),
        (1, 8, 4, 4),
    ]
    assert GFNetPyramid(PYRAMID, in_channels=5)(torch.zeros(1, 5, 8, 8))[0].shape == (1, 4, 2, 2)


def test_img_size_sets_the_grids():
    model = GFNetPyramid(PYRAMID, img_size=(100, 70))
    grids = [block[0].filter.grid for block in model.blocks]
    assert grids == [(25, 18), (13, 9), (7, 5), (4, 3)]
    assert model.pos_embed.shape == (1, 25 * 18, 4)
    assert on_meta('h-s', img_size=512).blocks[0][0].filter.complex_weight.shape == (128, 65, 96, 2)
    assert GFNet(PATCHES, img_size=(100, 70)).blocks[2].filter.grid == (7, 5)


@pytest.mark.parametrize(
    ('network', 'arguments', 'message'),
    [
        (GFNet, {'arch': 'h-ti'}, "'h-ti' of GFNet.*ti, xs, s, b"),
        (GFNetPyramid, {'arch': 'ti'}, "'ti' of GFNetPyramid.*h-ti, h-s, h-b"),
        (GFNetPyramid, {'arch': 50}, 'a name or a dict.*50'),
        (GFNetPyramid, {'arch': {'embed_dims': (4, 8)}}, "embed_dims and depths.*'embed_dims'"),
        (GFNetPyramid, {'arch': {**PYRAMID, 'heads': 2}}, "patch_size.*'heads'"),
        (
            GFNetPyramid,
            {'arch': {'embed_dims': (4, 8), 'depths': (1, 1, 1)}},
            r'same length.*\(4, 8\) and \(1, 1, 1\)',
        ),
        (GFNetPyramid, {'arch': {'embed_dims': (4, 0), 'depths': (1, 1)}}, r'embed_dims.*\(4, 0\)'),
        (GFNetPyramid, {'arch': {'embed_dims': (4,), 'depths': (1.5,)}}, r'depths.*1\.5'),
        (GFNetPyramid, {'arch': {'embed_dims': (), 'depths': ()}}, 'embed_dims'),
        (GFNetPyramid, {'arch': {**PYRAMID, 'patch_size': 0}}, 'patch_size.*0'),
        (GFNet, {'arch': {'embed_dims': (4, 8), 'depths': (1, 1)}}, r'one stage.*\(1, 1\)'),
        (GFNetPyramid, {'img_size': 0}, 'img_size.*0'),
        (GFNetPyramid, {'img_size': (32, -1)}, r'img_size.*\(32, -1\)'),
        (GFNetPyramid, {'img_size': (32, 32, 3)}, r'img_size.*\(32, 32, 3\)'),
        (GFNetPyramid, {'img_size': (32,)}, r'img_size.*\(32,\)'),
        (GFNetPyramid, {'in_channels': 0}, 'in_channels.*0'),
        (GFNetPyramid, {'num_classes': -1}, 'num_classes.*-1'),
        (GFNetPyramid, {'out_indices': ()}, r'out_indices.*0\.\.3.*\(\)'),
        (GFNetPyramid, {'out_indices': (0, 4)}, r'0\.\.3.*\(0, 4\)'),
        (GFNetPyramid, {'out_indices': (-5,)}, r'0\.\.3.*\(-5,\)'),
        (GFNetPyramid, {'out_indices': (2, 1)}, r'increasing.*\(2, 1\)'),
        (GFNetPyramid, {'out_indices': (3, -1)}, r'increasing.*\(3, -1\)'),
        (GFNetPyramid, {'out_indices': (0,), 'num_classes': 3}, 'classifier.*num_classes=3'),
        (GFNet, {'arch': PATCHES, 'out_indices': (3,)}, r'0\.\.2.*\(3,\)'),
        (GFNetPyramid, {'filter_resize': 'nearest'}, f"'nearest'.*{', '.join(RESIZE_METHODS)}"),
        (GFNetPyramid, {'filter_backend': 'cufft'}, "'cufft'.*auto"),
        (GFNetPyramid, {'drop_path_rate': 1.0}, r'drop_path_rate.*1\.0'),
        (GFNetPyramid, {'drop_path_rate': -0.1}, r'drop_path_rate.*-0\.1'),
        (GFNetPyramid, {'frozen_stages': 5}, r'frozen_stages.*-1\.\.4.*5'),
        (GFNetPyramid, {'frozen_stages': -2}, 'frozen_stages.*-2'),
    ],
)
def test_arguments_that_make_no_network_are_refused(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**{'arch': PYRAMID, **arguments})


@networks
@pytest.mark.parametrize(
    'shape', [(3, 32, 32), (1, 1, 3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0)]
)
def test_what_is_no_batch_of_images_is_refused(network, arch, shape):
    model = network(arch, img_size=32)
    with pytest.raises(ValueError) as e:
        model(torch.zeros(shape))
    assert network.__name__ in str(e.value)
    assert '(B, 3, H, W)' in str(e.value)
    assert str(shape) in str(e.value)


@networks
def test_an_empty_batch_gives_empty_maps(network, arch):
    outputs = network(arch, img_size=32)(torch.zeros(0, 3, 32, 48))
    assert all(y.shape[0] == 0 and y.ndim == 4 for y in outputs)


def test_registry_names_that_mmpretrain_has_too_do_not_clash():
    """As in either order of imports: both registries hold the name, and the scope decides."""
    ours = {
        'ImageClassifier': (MODELS, openmmlab.ImageClassifier),
        'Accuracy': (METRICS, openmmlab.Accuracy),
        'RepeatAugSampler': (DATA_SAMPLERS, openmmlab.RepeatAugSampler),
    }
    for name, (registry, own) in ours.items():
        # As mmpretrain.registry makes its registries.
        child = Registry(registry.name, parent=registry, scope='mmpretrain')
        try:
            theirs = child.register_module(module=type(name, (), {}))
            registry.register_module(name=name, module=own, force=True)
            assert registry.get(name) is child.get(f'mmengine.{name}') is own
            assert child.get(name) is registry.get(f'mmpretrain.{name}') is theirs
        finally:
            registry.children.pop('mmpretrain')
