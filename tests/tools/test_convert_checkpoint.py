"""Clean checkpoints from what people have, and what the tool refuses."""

import argparse
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import mmengine.runner
import pytest
import safetensors.torch
import timm.models
import torch
from torch import Tensor, nn

from gfnet_dense.models.checkpoint import read_state_dict
from gfnet_dense.openmmlab import GFNet, GFNetPyramid

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_checkpoint.py'
PYRAMID = {'embed_dims': (4, 6, 8, 10), 'depths': (1, 2, 1, 1), 'layer_scale_init_value': 0.5}
PATCHES = {'embed_dims': 8, 'depths': 3, 'patch_size': 8}
GOLDEN = {
    'hierarchical': lambda **kwargs: GFNetPyramid(
        {'embed_dims': (8, 16, 24, 32), 'depths': (1, 1, 2, 1), 'layer_scale_init_value': 1.0},
        **kwargs,
    ),
    'isotropic': lambda **kwargs: GFNet({'embed_dims': 16, 'depths': 2}, **kwargs),
}
formats = pytest.mark.parametrize('name', ['clean.pth', 'clean.safetensors'])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def convert(monkeypatch, capsys) -> Callable[..., str]:
    """Run the tool and return what it prints; if it fails, raise with what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name='__main__')
        printed = capsys.readouterr()
        if end.value.code != 0:
            raise ValueError(printed.err)
        return printed.out

    return run


def official(state: dict[str, Tensor]) -> dict:
    """Return what the authors' training script saves."""
    return {
        'model': state,
        'optimizer': {'state': {0: {'exp_avg': torch.zeros(5)}}, 'param_groups': [{'lr': 1e-3}]},
        'args': argparse.Namespace(arch='gfnet-h-ti', lr=5e-4),
        'epoch': 299,
    }


def segmentor(state: dict[str, Tensor]) -> dict:
    """Return what mmengine saves."""
    weights = {f'backbone.{key}': value for key, value in state.items()}
    weights['decode_head.conv_seg.weight'] = torch.zeros(2, 3)
    return {'state_dict': weights, 'meta': {'iter': 100}, 'message_hub': {'log_scalars': {}}}


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + 0.5)
    return model.eval()


# What people have


@formats
@pytest.mark.parametrize('layout', [official, segmentor, dict])
@pytest.mark.parametrize('kind', GOLDEN)
def test_logits_stay_those_of_the_official_code(
    golden, relative_error, convert, name, layout, kind
):
    numbers = golden(kind)
    prefix = 'state_dict.'
    state = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
    torch.save(layout(state), 'source.pth')
    said = convert('source.pth', name)
    assert said.startswith(f'{name}: GFNet')
    assert '10 classes' in said

    model = GOLDEN[kind](img_size=64, num_classes=10).eval()
    model.load_pretrained(name)
    assert relative_error(model(numbers['input']), numbers['logits']) < 1e-5
    assert sorted(os.listdir()) == sorted([name, 'source.pth'])


@formats
def test_the_file_holds_the_weights_and_nothing_else(convert, name):
    everything = torch.randn(3, 100_000)
    state = randomized(GFNetPyramid(PYRAMID, img_size=32, num_classes=5)).state_dict()
    state['head.bias'] = everything[1, :5]  # a part of something large
    torch.save(official(state), 'source.pth')
    convert('source.pth', name)
    written = read_state_dict(name)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())
    weights = sum(value.numel() * value.element_size() for value in state.values())
    assert Path(name).stat().st_size < weights + 500 * len(state)
    if name.endswith('.pth'):
        assert torch.load(name, weights_only=True).keys() == {'state_dict'}
    else:
        assert safetensors.torch.load_file(name).keys() == state.keys()


@formats
def test_timm_and_mmengine_take_the_file(convert, name):
    source = randomized(GFNetPyramid(PYRAMID, img_size=32, num_classes=5))
    torch.save(official(source.state_dict()), 'source.pth')
    convert('source.pth', name)
    model = GFNetPyramid(PYRAMID, img_size=32, num_classes=5).eval()
    timm.models.load_checkpoint(model, name, strict=True)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), source(x))
    if name.endswith('.pth'):
        model = GFNetPyramid(PYRAMID, img_size=32, num_classes=5).eval()
        mmengine.runner.load_checkpoint(model, name, strict=True)
        assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    ('network', 'arch', 'arguments'),
    [
        (GFNetPyramid, PYRAMID, {'num_classes': 5}),
        (GFNetPyramid, PYRAMID, {}),
        (GFNetPyramid, PYRAMID, {'out_indices': (0, 2)}),
        (GFNetPyramid, PYRAMID, {'img_size': (36, 52), 'in_channels': 1}),
        (GFNetPyramid, {**PYRAMID, 'layer_scale_init_value': None}, {'img_size': 100}),
        (GFNetPyramid, {**PYRAMID, 'patch_size': 2}, {}),
        (GFNet, PATCHES, {'num_classes': 5}),
        (GFNet, PATCHES, {'out_indices': (0, 2)}),
        (GFNet, {**PATCHES, 'layer_scale_init_value': 1e-3}, {'img_size': (50, 20)}),
    ],
    ids=str,
)
def test_every_network_is_recognized(convert, network, arch, arguments):
    arguments = {'img_size': 64, **arguments}
    source = randomized(network(arch, **arguments))
    torch.save(segmentor(source.state_dict()), 'source.pth')
    said = convert('source.pth', 'clean.pth')
    assert network.__name__ in said
    assert 'grid {}x{}'.format(*source.grid) in said
    model = network(arch, **arguments)
    model.load_state_dict(torch.load('clean.pth')['state_dict'])
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))


def test_an_official_name_is_taken(convert, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    state = GFNet('ti', num_classes=1000).state_dict()
    torch.save(official(state), folder / 'gfnet-ti.pth')
    said = convert('gfnet-ti', 'clean.pth')
    assert 'GFNet ti (' in said and 'grid 14x14' in said and '1000 classes' in said
    assert read_state_dict('clean.pth').keys() == state.keys()


# What the tool refuses


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def changed(**changes) -> dict[str, Tensor]:
    state = GFNetPyramid(PYRAMID, img_size=32, num_classes=5).state_dict()
    for key, value in changes.items():
        key = key.replace('__', '.')
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


REFUSED = {
    'malicious': ({'model': changed(), 'args': Malicious()}, 'not safe to read.*posix.mkdir'),
    'of_another_model': (nn.Linear(3, 4).state_dict(), 'no weights of a GFNet'),
    'without_weights': ({'epoch': 3}, 'holds no state dict'),
    'without_positions': (changed(pos_embed=None), 'lacks pos_embed'),
    'without_a_bias': (changed(blocks__1__1__norm2__bias=None), r'lacks blocks\.1\.1\.norm2\.bias'),
    'without_a_norm': (changed(norm__bias=None), r'lacks norm\.bias'),
    'with_more': (changed(cls_token=torch.zeros(4)), 'has unexpected weights cls_token'),
    'flat': (changed(patch_embed__0__proj__weight=torch.zeros(4)), 'shapes are those of no GFNet'),
    'gridless': (changed(pos_embed=torch.zeros(1, 3, 4)), 'shapes are those of no GFNet'),
    'of_another_shape': (changed(pos_embed=torch.zeros(1, 72, 4)), 'blocks.* of shape'),
    'not_finite': (changed(head__bias=torch.full([5], torch.nan)), 'not finite'),
}


@pytest.mark.parametrize(('content', 'reason'), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize('there_before', [True, False])
def test_what_is_refused_writes_nothing(convert, content, reason, there_before):
    torch.save(content, 'source.pth')
    if there_before:
        Path('clean.pth').write_text('valuable')
    with pytest.raises(ValueError, match=rf'CheckpointError: source\.pth.*{reason}'):
        convert('source.pth', 'clean.pth', '--force')
    assert sorted(os.listdir()) == (['clean.pth'] if there_before else []) + ['source.pth']
    assert not there_before or Path('clean.pth').read_text() == 'valuable'


def test_the_source_is_never_replaced(convert):
    torch.save(changed(), 'source.pth')
    before = Path('source.pth').read_bytes()
    for options in ([], ['--force']):
        with pytest.raises(ValueError, match=r'source\.pth is the source: choose another name'):
            convert('source.pth', './source.pth', *options)
    assert Path('source.pth').read_bytes() == before
    convert('source.pth', 'new/folder/clean.pth')
    assert read_state_dict('new/folder/clean.pth')


def test_a_missing_source_is_named(convert):
    with pytest.raises(ValueError, match=r'no checkpoint at none\.pth: give a path.*gfnet-h-s'):
        convert('none.pth', 'clean.pth')


def test_nothing_is_overwritten_without_being_told(convert):
    torch.save(changed(), 'source.pth')
    Path('clean.pth').write_text('valuable')
    with pytest.raises(ValueError, match=r'clean\.pth exists: .*--force'):
        convert('source.pth', 'clean.pth')
    assert Path('clean.pth').read_text() == 'valuable'
    convert('source.pth', 'clean.pth', '--force')
    assert read_state_dict('clean.pth')


def test_a_target_that_cannot_be_written_is_named(convert):
    torch.save(changed(), 'source.pth')
    Path('clean.pth').write_text('valuable')
    Path(f'clean.pth.{socket.gethostname()}.partial').symlink_to('/dev/full')
    with pytest.raises(ValueError, match=r'No space left on device: .clean\.pth'):
        convert('source.pth', 'clean.pth', '--force')
    assert Path('clean.pth').read_text() == 'valuable'
    assert sorted(os.listdir()) == ['clean.pth', 'source.pth']


def test_what_is_read_back_otherwise_is_not_kept(convert, monkeypatch):
    save = torch.save
    save(changed(), 'source.pth')
    monkeypatch.setattr(
        torch,
        'save',
        lambda content, file: save(
            {'state_dict': {key: value + 1 for key, value in content['state_dict'].items()}}, file
        ),
    )
    with pytest.raises(ValueError, match=r'read back: .clean\.pth'):
        convert('source.pth', 'clean.pth')
    assert os.listdir() == ['source.pth']
