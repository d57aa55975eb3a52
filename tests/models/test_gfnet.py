"""The timm models: what timm's tests/test_models.py asks of its own, on all seven, and loading.

Shapes and counts are taken of the networks as published, on the meta device; numbers of networks
with a sixteenth of their channels, where that tells the same.
"""

import argparse
import copy
import itertools
import math
import os
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.layers import create_feature_extractor
from timm.models import FeatureInfo, get_pretrained_cfg
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from weights import from_file, is_hierarchical, narrow, narrow_arch, on_meta

from gfnet_dense.serialization import CheckpointError
from gfnet_dense.spectral import resize_position_embedding

# Parameters, top-1 and top-5 as reported, and the address of the weights.
PUBLISHED = {
    'gfnet_ti': (7_511_784, 74.6, 92.2, '3d0c1579aa524a0a99dd'),
    'gfnet_xs': (15_985_768, 78.6, 94.2, 'e0ab5b1583954a1fa9b2'),
    'gfnet_s': (24_869_608, 80.0, 94.9, 'e5561fa070c44d9399bf'),
    'gfnet_b': (43_120_616, 80.7, 95.1, '2fbf264597af4d72afb3'),
    'gfnet_h_ti': (15_085_096, 80.1, 95.1, 'b22dd45eccbe462cbbfb'),
    'gfnet_h_s': (32_162_632, 81.5, 95.6, '5229cb4d1daf48e69675'),
    'gfnet_h_b': (53_744_200, 82.9, 96.2, '954c5af21e824ba6b40c'),
}
# The networks of the golden files, which every name can be given.
GOLDEN = {
    'hierarchical': dict(
        embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), layer_scale_init_value=1.0
    ),
    'isotropic': dict(embed_dims=16, depths=2),
}
REDUCTIONS = [4, 8, 16, 32]

names = pytest.mark.parametrize('name', PUBLISHED)
ONE_OF_EACH = ['gfnet_h_ti', 'gfnet_ti']
one_of_each = pytest.mark.parametrize('name', ONE_OF_EACH)
# The fast lane takes one of each kind.
slow_names = pytest.mark.parametrize(
    'name',
    [
        name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow)
        for name in PUBLISHED
    ],
)


def golden_of(name: str) -> tuple[str, dict]:
    """Return the golden file that is of a name's kind, and its network."""
    kind = 'hierarchical' if is_hierarchical(name) else 'isotropic'
    return kind, GOLDEN[kind]


def channels_and_reductions(name: str) -> tuple[list[int], list[int]]:
    """Return those of all levels of a published network."""
    if is_hierarchical(name):
        first = 64 if name == 'gfnet_h_ti' else 96
        return [first * 2**i for i in range(4)], REDUCTIONS
    dims, depth = {'ti': (256, 12), 'xs': (384, 12), 's': (384, 19), 'b': (512, 19)}[
        name.removeprefix('gfnet_')
    ]
    return [dims] * depth, [16] * depth


# Registration


def test_timm_lists_them():
    assert set(timm.list_models('gfnet*')) == set(PUBLISHED)
    assert set(timm.list_models('gfnet*', pretrained=True)) == {f'{n}.in1k' for n in PUBLISHED}
    assert set(timm.list_pretrained('gfnet_h_*')) == {
        f'{name}.in1k' for name in PUBLISHED if is_hierarchical(name)
    }
    assert all(timm.is_model(name) and timm.is_model_pretrained(name) for name in PUBLISHED)


@names
def test_default_cfgs_say_what_was_published(name):
    _, top1, top5, address = PUBLISHED[name]
    for tagged in (name, f'{name}.in1k'):
        cfg = get_pretrained_cfg(tagged)
        assert cfg.url == f'https://cloud.tsinghua.edu.cn/f/{address}/?dl=1'
        assert cfg.file == name.replace('_', '-')
        assert f'top-1 {top1}%, top-5 {top5}%, as reported' in cfg.notes[0]
        assert cfg.input_size == (3, 224, 224)
        assert not cfg.fixed_input_size


def test_evaluation_resizes_to_256_and_crops_to_224():
    config = resolve_data_config({}, model=on_meta('gfnet_h_ti'))
    resize, crop, *_, normalize = create_transform(**config).transforms
    assert (resize.size, resize.interpolation.value) == (256, 'bicubic')
    assert crop.size == (224, 224)
    assert normalize.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalize.std.tolist() == pytest.approx([0.229, 0.224, 0.225])


# What timm tests of every model


@slow_names
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=42, img_size=32).train()
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 42)
    assert logits.isfinite().all()
    (logits * torch.randn(2, 42)).sum().backward()
    idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@slow_names
def test_default_cfgs_fit_the_models(name):
    model = on_meta(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][0]
    assert f'{cfg["classifier"]}.weight' in state
    assert f'{cfg["first_conv"]}.weight' in state
    channels = channels_and_reductions(name)[0][-1]
    assert model.num_features == model.head_hidden_size == channels
    assert (model.num_classes, model.in_chans) == (1000, 3)
    assert model.output_fmt == 'NHWC'
    y = model.forward_features(torch.empty(1, *cfg['input_size'], device='meta'))
    assert y.shape == (1, *cfg['pool_size'], channels)
    assert model.forward_head(y).shape == (1, 1000)
    assert model.forward_head(y, pre_logits=True).shape == (1, channels)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.forward_head(y).shape == (1, channels)
    model.reset_classifier(0, '')
    assert model.forward_head(y).shape == y.shape
    model.reset_classifier(7, 'catavgmax')
    assert model.get_classifier() is model.head
    assert model.head_hidden_size == 2 * channels
    assert model.forward_head(y).shape == (1, 7)
    assert on_meta(name, num_classes=0).forward_head(y).shape == (1, channels)
    assert on_meta(name, num_classes=0, global_pool='').forward_head(y).shape == y.shape


@one_of_each
def test_evaluation_resizes_the_position_embedding_once_for_its_values(name, monkeypatch):
    model = narrow(name).eval()
    x = torch.randn(1, 3, 64, 96)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return resize_position_embedding(*arguments)

    monkeypatch.setattr('gfnet_dense.models.gfnet.resize_position_embedding', counted)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        assert len(calls) == 1
        model.pos_embed.data.add_(torch.randn_like(model.pos_embed))
        changed = model(x)
    assert len(calls) == 2
    assert not torch.allclose(changed, first)
    # With gradients nothing is cached, so this is an independent result.
    learned = model(x)
    assert torch.equal(learned, changed)
    learned.sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


@names
def test_feature_info_is_that_of_the_published_networks(name):
    info = FeatureInfo(on_meta(name).feature_info, range(-4, 0))
    channels, reductions = channels_and_reductions(name)
    assert info.channels() == channels[-4:]
    assert info.reduction() == reductions[-4:]
    assert len(info) == len(channels)


@names
def test_features_only(name):
    size = 50, 83
    model = narrow(name, features_only=True, num_classes=5).eval()
    maps = model(torch.randn(2, 3, *size))
    assert len(maps) == 4
    channels, reductions = channels_and_reductions(name)
    assert model.feature_info.reduction() == reductions[-4:]
    for y, channel, reduction in zip(maps, channels[-4:], reductions[-4:], strict=True):
        assert y.shape == (2, channel // 16, *(math.ceil(side / reduction) for side in size))
        assert y.isfinite().all()
        assert y.is_contiguous()
    assert not any('head' in key or key.startswith('model.norm.') for key in model.state_dict())


def test_features_of_a_network_with_two_stages():
    arch = dict(embed_dims=(4, 8), depths=(1, 1))
    model = timm.create_model('gfnet_h_ti', features_only=True, arch=arch)
    assert model.feature_info.channels() == [4, 8]


@one_of_each
@pytest.mark.parametrize(
    ('feature_cls', 'out_indices'),
    [
        ('getter', (0, 2)),
        ('getter', (-2, -1)),
        ('getter', 2),
        pytest.param('fx', (0, 2), marks=pytest.mark.slow),
        ('hook', (1, -1)),
    ],
)
def test_out_indices(name, feature_cls, out_indices):
    model = narrow(name, features_only=True, out_indices=out_indices, feature_cls=feature_cls)
    x = torch.randn(1, 3, 64, 48)
    whole = narrow(name).eval()
    own = model.state_dict()
    prefix = {'getter': 'model.', 'fx': 'graph_module.', 'hook': 'body.'}[feature_cls]
    model.load_state_dict({k: whole.state_dict()[k.removeprefix(prefix)] for k in own})
    expected = whole.forward_intermediates(x, out_indices, intermediates_only=True)
    maps = model.eval()(x)
    assert model.feature_info.channels() == [y.shape[1] for y in expected]
    assert len(maps) == len(expected)
    for y, z in zip(maps, expected, strict=True):
        assert torch.equal(y if feature_cls == 'getter' else y.permute(0, 3, 1, 2), z)


@names
def test_intermediates(name):
    model = narrow(name).eval()
    x = torch.randn(2, 3, 32, 64)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    channels, reductions = channels_and_reductions(name)
    assert [tuple(y.shape) for y in maps] == [
        (2, channel // 16, 32 // reduction, 64 // reduction)
        for channel, reduction in zip(channels, reductions, strict=True)
    ]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], last, rtol=1e-5, atol=1e-5)


@one_of_each
def test_arguments_of_forward_intermediates(name):
    model = narrow(name).eval()
    with torch.no_grad():
        model.norm.weight.uniform_(1, 2)
    x = torch.randn(1, 3, 32, 48)
    last, maps = model.forward_intermediates(x)
    for indices in (1, 3, [0, 2], [-2]):
        taken = range(len(maps) - indices, len(maps)) if isinstance(indices, int) else indices
        for some in (
            model.forward_intermediates(x, indices)[1],
            model.forward_intermediates(x, indices, intermediates_only=True),
            model.forward_intermediates(x, indices, stop_early=True)[1],
        ):
            assert len(some) == len(taken)
            assert all(torch.equal(y, maps[i]) for y, i in zip(some, taken, strict=True))
    for y, z in zip(model.forward_intermediates(x, output_fmt='NHWC')[1], maps, strict=True):
        assert torch.equal(y, z.permute(0, 2, 3, 1))

    *_, normed = model.forward_intermediates(x, norm=True)[1]
    assert torch.equal(normed.permute(0, 2, 3, 1), last)
    first, _ = model.forward_intermediates(x, norm=True, intermediates_only=True, indices=[0, 1])
    if is_hierarchical(name):  # the norm is made for the last stage
        assert torch.equal(first, maps[0])
        stopped, _ = model.forward_intermediates(x, [1], stop_early=True)
        assert torch.equal(stopped.permute(0, 3, 1, 2), maps[1])
    else:
        assert torch.equal(first, model.norm(maps[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    calls = []
    list(model.modules())[-1].register_forward_hook(lambda *_: calls.append(1))  # the head's
    blocks = model.blocks[-1] if is_hierarchical(name) else model.blocks
    blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    model.forward_intermediates(x, [0], stop_early=True)
    assert calls == []
    with pytest.raises(ValueError, match="NCHW or NHWC, but got 'NLC'"):
        model.forward_intermediates(x, output_fmt='NLC')
    with pytest.raises(AssertionError, match='out of range'):
        model.forward_intermediates(x, [len(maps)])


@one_of_each
def test_prune_intermediate_layers(name):
    whole = narrow(name).eval()
    x = torch.randn(1, 3, 32, 32)
    _, maps = whole.forward_intermediates(x)

    model = copy.deepcopy(whole)
    assert model.prune_intermediate_layers([0, -3]) == [0, len(maps) - 3]
    assert len(model.blocks) == len(maps) - 2
    assert model.num_classes == 0
    changed = is_hierarchical(name)
    assert isinstance(model.norm, nn.Identity) is changed
    assert model.num_features == model.head_hidden_size == maps[-3].shape[1]
    y = model(x)
    assert torch.equal((y if changed else whole.norm(y)).permute(0, 3, 1, 2), maps[-3]) is changed
    some = model.forward_intermediates(x, [0, len(maps) - 3], intermediates_only=True)
    assert torch.equal(some[0], maps[0])
    assert torch.equal(some[1], maps[-3])

    model = copy.deepcopy(whole)
    assert model.prune_intermediate_layers(1, prune_head=False) == [len(maps) - 1]
    assert torch.equal(model(x), whole(x))
    model.prune_intermediate_layers(1, prune_norm=True)
    assert torch.equal(model(x).permute(0, 3, 1, 2), maps[-1])


@names
def test_gradient_checkpointing_changes_nothing(name):
    model, x = narrow(name, num_classes=3).train(), torch.randn(2, 3, 32, 32)
    results = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@slow_names
def test_fx(name):
    model, x = narrow(name, num_classes=6).eval(), torch.randn(2, 3, 48, 32)
    traced = create_feature_extractor(model, ['head'])
    (y,) = traced(x).values()
    assert torch.equal(y, model(x))
    (y,) = traced.train()(x).values()
    (y * torch.randn(2, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in traced.parameters())
    assert len(list(traced.parameters())) == len(list(model.parameters()))


# One block makes the same graph as many, and two stages as four.
def shallow(name: str) -> nn.Module:
    arch = narrow_arch(name)
    stages = 2 if is_hierarchical(name) else 1
    arch.update(embed_dims=arch['embed_dims'][:stages], depths=[1] * stages)
    return timm.create_model(name, arch=arch, img_size=32, num_classes=4)


@pytest.mark.slow
@names
def test_compiles_forward_and_backward_to_one_graph(name):
    # Without the code that inductor makes of the graphs, for which its compiler takes a minute.
    torch.compiler.reset()
    model, x = shallow(name).train(), torch.randn(2, 3, 40, 64)
    results = []
    for network in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
        model.zero_grad()
        y = network(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@one_of_each
def test_a_compiled_network_takes_further_sizes(name):
    torch.compiler.reset()
    model = shallow(name).eval()
    compiled = torch.compile(model, backend='aot_eager')
    with torch.no_grad():
        for size in ((64, 64), (50, 61), (37, 45)):  # sizes vary from the second on
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@one_of_each
def test_gradients_of_each_image(name):
    model, x = shallow(name).double().eval(), torch.randn(3, 3, 40, 37).double()
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, image[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), parameters.values())
        for gradients, e in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(gradients[i], e, rtol=1e-7, atol=1e-12)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants, as meant
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.slow
@names
def test_traced_and_exported(name):
    model = shallow(name).eval()
    x, other = torch.randn(2, 2, 3, 40, 64)
    with torch.no_grad():
        graphs = [torch.jit.trace(model, x), torch.export.export(model, (x,)).module()]
        for graph in graphs:
            torch.testing.assert_close(graph(other), model(other), rtol=1e-5, atol=1e-5)
        # Resized or not, no parameter became a constant.
        before = graphs[0](other)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(graphs[0](other), model(other), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(graphs[0](other), before)


@names
def test_parameters_stored_for_another_size_compute_the_same(name):
    model, x = narrow(name, num_classes=4).eval(), torch.randn(1, 3, 40, 68)
    model.pos_embed.requires_grad_(False)
    expected = model(x)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.set_input_size((40, 68))
    assert torch.equal(model(x), expected)
    first = (10, 17) if is_hierarchical(name) else (3, 5)
    assert model.grid == first and not model.pos_embed.requires_grad
    changed = {key for key, value in model.state_dict().items() if value.shape != shapes[key]}
    assert changed >= {key for key in shapes if key.endswith('complex_weight')} | {'pos_embed'}
    assert all(p.requires_grad for n, p in model.named_parameters() if n != 'pos_embed')
    with pytest.raises(ValueError, match='must be a positive int'):
        model.set_input_size(0)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@names
def test_torchscript_has_no_words_for_the_filter(name):
    # The module says why. Should this pass one day, it can be offered.
    errors = AssertionError, RuntimeError, ValueError, torch.jit.frontend.NotSupportedError
    with pytest.raises(errors):
        torch.jit.script(shallow(name))


# Optimisation


@one_of_each
def test_layer_decay_and_weight_decay_of_an_optimizer(name):
    model = narrow(name)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1, weight_decay=0.05, layer_decay=0.5)
    group_of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    last = model.get_layer_depth('head.bias')[0]
    assert group_of[id(model.head.weight)]['lr_scale'] == 1
    assert group_of[id(model.pos_embed)]['lr_scale'] == pytest.approx(0.5**last)
    for key, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or key == 'pos_embed'
        assert group_of[id(parameter)]['weight_decay'] == (0 if spared else 0.05), key


# Construction


def test_rates_are_off_unless_asked_for():
    model = narrow('gfnet_h_b', drop_path_rate=0.4, drop_rate=0.5).train()
    rates = [block.drop_path.drop_prob for block in itertools.chain(*model.blocks)]
    assert rates == pytest.approx([0.4 * i / 35 for i in range(36)])
    assert model.head_drop.p == 0.5
    model, x = narrow('gfnet_h_b').train(), torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), model(x))


def test_device_and_dtype():
    model = timm.create_model('gfnet_ti', device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    model.reset_classifier(3)
    assert (model.head.weight.device.type, model.head.weight.dtype) == ('meta', torch.bfloat16)


def test_a_new_head_is_initialised_and_keeps_the_mode():
    model = timm.create_model('gfnet_ti', img_size=32).eval()
    model.reset_classifier(500)
    assert not model.head.training
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()


@pytest.mark.parametrize('arguments', [dict(patch_size=8), dict(num_heads=3)])
def test_unknown_arguments_are_refused(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        timm.create_model('gfnet_ti', **arguments)


# Weights


def official_file(folder: Path, state: dict[str, Tensor], name: str = 'official.pth') -> Path:
    """Write what the authors' training script saves."""
    path = folder / name
    args = argparse.Namespace(arch='gfnet-h-ti', lr=5e-4, data_path='.', clip_grad=None)
    torch.save({'model': state, 'epoch': 3, 'scaler': {'scale': 65536.0}, 'args': args}, path)
    return path


def golden_state(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = 'state_dict.'
    return {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}


@names
def test_logits_of_official_files(golden, relative_error, tmp_path, name):
    kind, arch = golden_of(name)
    numbers = golden(kind)
    path = official_file(tmp_path, golden_state(numbers))
    arguments = dict(arch=arch, img_size=64, num_classes=10)
    for model in (
        timm.create_model(name, checkpoint_path=path, **arguments),
        timm.create_model(name, **from_file(path, **arguments)),
    ):
        assert relative_error(model.eval()(numbers['input']), numbers['logits']) < 1e-5
    with pytest.raises(RuntimeError, match=r'head\.weight'):
        timm.create_model(name, checkpoint_path=path, arch=arch, img_size=64, num_classes=7)


class Dangerous:
    def __reduce__(self):
        return (os.mkdir, ('executed',))


@pytest.mark.parametrize('way', ['checkpoint_path', 'file'])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'weights.pth'
    torch.save({'model': narrow('gfnet_ti').state_dict(), 'args': Dangerous()}, path)
    arguments = from_file(path) if way == 'file' else dict(checkpoint_path=path)
    with pytest.raises((RuntimeError, CheckpointError)):
        narrow('gfnet_ti', **arguments)
    assert not (tmp_path / 'executed').exists()


@names
def test_files_fit_other_sizes_as_official_finetuning_does(golden, relative_error, tmp_path, name):
    kind, arch = golden_of(name)
    numbers = golden(kind)
    path = official_file(tmp_path, golden_state(numbers))
    arguments = dict(arch=arch, img_size=96, num_classes=10, filter_resize='bicubic')
    model = timm.create_model(name, **from_file(path, **arguments)).eval()
    assert relative_error(model(numbers['input_96']), numbers['logits_96']) < 1e-5


def test_features_of_official_weights(golden, relative_error, tmp_path):
    name, numbers, arch = 'gfnet_h_ti', golden('hierarchical'), GOLDEN['hierarchical']
    path = official_file(tmp_path, golden_state(numbers))
    arguments = from_file(path, arch=arch, img_size=64)
    model = timm.create_model(name, features_only=True, **arguments).eval()
    maps = model(numbers['input'])
    for i, y in enumerate(maps):
        assert relative_error(y, numbers[f'stage{i}']) < 1e-5
    model = timm.create_model(name, features_only=True, out_indices=(1,), **arguments).eval()
    assert relative_error(model(numbers['input'])[0], numbers['stage1']) < 1e-5


@slow_names
def test_pretrained_finds_the_official_weights_by_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    source = narrow(name).eval()
    official_file(tmp_path / 'checkpoints', source.state_dict(), f'{name.replace("_", "-")}.pth')
    x = torch.randn(1, 3, 32, 32)

    model = narrow(name, pretrained=True).eval()
    assert torch.equal(model(x), source(x))
    # Another number of classes: all but the head.
    model = narrow(name, pretrained=True, num_classes=5).eval()
    assert torch.equal(model.forward_features(x), source.forward_features(x))
    assert model(x).shape == (1, 5)
    # Pooled features.
    model = narrow(f'{name}.in1k', pretrained=True, num_classes=0).eval()
    assert torch.equal(model(x), source.forward_head(source.forward_features(x), pre_logits=True))
    model = narrow(name, pretrained=True, features_only=True).eval()
    expected = source.forward_intermediates(x, 4, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(model(x), expected, strict=True))


@one_of_each
def test_other_image_channels(tmp_path, name):
    source = narrow(name).eval()
    path = official_file(tmp_path, source.state_dict())
    gray = torch.randn(1, 1, 32, 32)
    model = narrow(name, in_chans=1, **from_file(path)).eval()
    expected = source(gray.expand(1, 3, 32, 32))
    torch.testing.assert_close(model(gray), expected, rtol=1e-4, atol=1e-5)
    twice = torch.randn(1, 3, 32, 32)
    model = narrow(name, in_chans=6, **from_file(path)).eval()
    torch.testing.assert_close(
        model(torch.cat([twice, twice], dim=1)), source(twice), rtol=1e-4, atol=1e-5
    )


def test_other_sources_replace_the_official_one(tmp_path, monkeypatch):
    source = narrow('gfnet_ti').eval()
    path = official_file(tmp_path, source.state_dict())
    x = torch.randn(1, 3, 32, 32)
    asked = []

    def download(url, **_):
        asked.append(url)
        return str(path)

    monkeypatch.setattr('timm.models._builder.download_cached_file', download)
    address = 'https://example.org/weights.pth'
    for overlay in (dict(url=address), dict(state_dict=source.state_dict())):
        model = narrow('gfnet_ti', pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(model(x), source(x))
    assert asked == [address]


def test_a_folder_for_downloads_is_refused_where_it_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match=r'cache_dir=.* TORCH_HOME'):
        narrow('gfnet_ti', pretrained=True, cache_dir=tmp_path)
    path = official_file(tmp_path, narrow('gfnet_ti').state_dict())
    narrow('gfnet_ti', cache_dir=tmp_path, **from_file(path))


def test_weights_of_another_size_are_refused(tmp_path):
    path = official_file(tmp_path, narrow('gfnet_h_s').state_dict())
    with pytest.raises(CheckpointError, match=r'holds .*embed_dims \(6, 12, 24, 48\)'):
        narrow('gfnet_h_ti', **from_file(path))
    with pytest.raises(RuntimeError, match='size mismatch'):
        narrow('gfnet_h_ti', checkpoint_path=path)


def test_a_saved_model_comes_back(tmp_path):
    model = narrow('gfnet_h_ti', num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
