"""Files that people really have, into networks of other outputs and grids; and bad files."""

import os
import pickle
import traceback
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from weights import (
    PATCHES,
    PYRAMID,
    assert_equal_states,
    file_of,
    official_content,
    randomized,
    saved,
)

from gfnet_dense.models import GFNet, GFNetPyramid
from gfnet_dense.models.checkpoint import (
    CheckpointError,
    adapt_state_dict,
    read_state_dict,
)
from gfnet_dense.spectral import RESIZE_METHODS, resize_position_embedding, resize_spectrum

networks = pytest.mark.parametrize(
    ('network', 'arch'),
    [(GFNetPyramid, PYRAMID), (GFNet, PATCHES)],
    ids=['GFNetPyramid', 'GFNet'],
)


# Files


def official(model: nn.Module) -> object:
    return official_content(model)


def of_mmengine(model: nn.Module) -> object:
    return {
        'meta': {'epoch': 1, 'iter': 100, 'cfg': 'model = dict()', 'seed': 0},
        'state_dict': model.state_dict(),
        'message_hub': {'log_scalars': {}},
        'optimizer': torch.optim.SGD(model.parameters()).state_dict(),
    }


def plain(model: nn.Module) -> object:
    return model.state_dict()


def plain_dict(model: nn.Module) -> object:
    return dict(model.state_dict())


layouts = pytest.mark.parametrize('layout', [official, of_mmengine, plain, plain_dict])


@layouts
@pytest.mark.parametrize('zipped', [True, False])
def test_reads_the_weights_of_every_layout(tmp_path, layout, zipped):
    model = randomized(GFNetPyramid(PYRAMID, img_size=32, num_classes=5))
    path = saved(layout(model), tmp_path, _use_new_zipfile_serialization=zipped)
    for name in (path, str(path)):
        state = read_state_dict(name)
        assert type(state) is dict
        assert_equal_states(state, model.state_dict())


@networks
@layouts
def test_loads_every_layout(tmp_path, network, arch, layout):
    source = randomized(network(arch, img_size=32, num_classes=5))
    path = saved(layout(source), tmp_path)
    model = network(arch, img_size=32, num_classes=5)
    assert model.load_pretrained(path) is None
    assert_equal_states(model.state_dict(), source.state_dict())


def test_logs_what_was_loaded_resized_and_left(tmp_path, caplog):
    source = GFNetPyramid(PYRAMID, img_size=32, num_classes=5)
    path = saved(official_content(source), tmp_path)
    with caplog.at_level('INFO', logger='gfnet_dense'):
        GFNetPyramid(PYRAMID, img_size=64, num_classes=7).load_pretrained(path)
    said = '\n'.join(caplog.messages)
    assert str(path) in said
    assert 'resized from grid (8, 8) to (16, 16), bicubic: pos_embed' in said
    assert 'blocks.1.1.filter.complex_weight' in said
    assert 'newly initialised: head.weight, head.bias' in said
    assert 'norm' not in said.partition('newly initialised')[2]


def test_numbers_of_numpy_1(tmp_path):
    """Which named its functions otherwise, in files from before 2024."""
    model = randomized(GFNetPyramid(PYRAMID, img_size=32))
    content = official_content(model) | {'best': np.float64(80.1), 'history': np.ones(3)}
    path = saved(content, tmp_path)
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    (pickled,) = (name for name in records if name.endswith('data.pkl'))
    assert records[pickled].count(b'numpy._core.') == 2
    records[pickled] = records[pickled].replace(b'numpy._core.', b'numpy.core.')
    with zipfile.ZipFile(path, 'w') as target:
        for name, record in records.items():
            target.writestr(name, record)
    assert_equal_states(read_state_dict(path), model.state_dict())


# Outputs


@networks
def test_a_head_of_other_classes_is_left_out(network, arch):
    source = randomized(network(arch, img_size=32, num_classes=5))
    model = randomized(network(arch, img_size=32, num_classes=7))
    state, notes = adapt_state_dict(source.state_dict(), model)
    assert set(model.state_dict()) - set(state) == {'head.weight', 'head.bias'}
    assert 'head.weight' in ' '.join(notes)
    model.load_state_dict(state, strict=False)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_the_state_and_the_model_are_left_alone():
    source = randomized(GFNetPyramid(PYRAMID, img_size=32, num_classes=5))
    model = GFNetPyramid(PYRAMID, img_size=64)
    state = OrderedDict(source.state_dict())
    before = {key: value.clone() for key, value in state.items()}
    own = {key: value.clone() for key, value in model.state_dict().items()}
    adapt_state_dict(state, model)
    assert_equal_states(state, before)
    assert_equal_states(model.state_dict(), own)


# Grids


@networks
@pytest.mark.parametrize('method', RESIZE_METHODS)
@pytest.mark.parametrize(
    ('old', 'new'),
    [
        (64, 96),
        (96, 64),
        ((36, 52), (52, 36)),
        ((36, 52), (100, 68)),
        ((100, 68), (20, 136)),
        ((17, 33), 64),
    ],
    ids=str,
)
def test_resized_weights_do_what_resizing_in_forward_does(network, arch, method, old, new):
    source = randomized(network(arch, img_size=old, filter_resize=method))
    model = network(arch, img_size=new, filter_resize=method).eval()
    state, notes = adapt_state_dict(source.state_dict(), model)
    model.load_state_dict(state)
    x = torch.randn(1, 3, *((new, new) if isinstance(new, int) else new))
    for a, b in zip(model(x), source(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert str(source.grid) in notes[0]
    assert str(model.grid) in notes[0]


def test_each_parameter_is_resized_from_its_own_grid():
    source = randomized(GFNetPyramid(PYRAMID, img_size=(36, 52)))
    model = GFNetPyramid(PYRAMID, img_size=(64, 40), filter_resize='spatial')
    state, _ = adapt_state_dict(source.state_dict(), model)
    old = [(9, 13), (5, 7), (3, 4), (2, 2)]
    new = [(16, 10), (8, 5), (4, 3), (2, 2)]
    for i in range(4):
        key = f'blocks.{i}.0.filter.complex_weight'
        expected = resize_spectrum(source.state_dict()[key], old[i], new[i], 'spatial')
        assert torch.equal(state[key], expected)
    expected = resize_position_embedding(source.pos_embed, old[0], new[0])
    assert torch.equal(state['pos_embed'], expected)


@networks
def test_the_same_grid_takes_the_very_values(network, arch):
    source = randomized(network(arch, img_size=(36, 52)))
    state, notes = adapt_state_dict(source.state_dict(), network(arch, img_size=(36, 52)))
    assert_equal_states(state, source.state_dict())
    assert notes == []


def test_published_sizes_from_224_to_512():
    with torch.device('meta'):
        source = GFNetPyramid('h-s', num_classes=1000).state_dict()
        model = GFNetPyramid('h-s', img_size=512)
    state, _ = adapt_state_dict(source, model)
    assert state['pos_embed'].shape == (1, 128 * 128, 96)
    widths = [(128, 65), (64, 33), (32, 17), (16, 9)]
    for stage, grid in enumerate(widths):
        weight = state[f'blocks.{stage}.0.filter.complex_weight']
        assert weight.shape == (*grid, 96 * 2**stage, 2)


# What does not fit


@pytest.mark.parametrize(
    ('network', 'held', 'wanted'),
    [(GFNetPyramid, 'h-s', 'h-ti'), (GFNetPyramid, 'h-s', 'h-b'), (GFNet, 's', 'xs')],
)
def test_another_size_is_refused_by_both_names(network, held, wanted):
    with torch.device('meta'):
        source, model = network(held, num_classes=1000).state_dict(), network(wanted)
    with pytest.raises(CheckpointError, match=rf'holds {held} \(.*model is {wanted} \('):
        adapt_state_dict(source, model)


def test_another_kind_is_refused():
    with torch.device('meta'):
        patches, pyramid = GFNet('ti'), GFNetPyramid('h-ti')
    with pytest.raises(CheckpointError, match=r'holds ti \(.*model is h-ti \('):
        adapt_state_dict(patches.state_dict(), pyramid)
    with pytest.raises(CheckpointError, match=r'holds h-ti \(.*model is ti \('):
        adapt_state_dict(pyramid.state_dict(), patches)


def test_a_size_without_a_name_is_described(tmp_path):
    source = GFNetPyramid({**PYRAMID, 'depths': (1, 1, 1, 1)}, img_size=32)
    path = saved(official_content(source), tmp_path)
    model = GFNetPyramid(PYRAMID, img_size=32)
    with pytest.raises(CheckpointError) as e:
        model.load_pretrained(path)
    assert str(path) in str(e.value)
    assert 'depths (1, 1, 1, 1)' in str(e.value)
    assert 'depths (1, 2, 1, 1)' in str(e.value)


@pytest.mark.parametrize(
    'key',
    ['pos_embed', 'patch_embed.0.proj.bias', 'blocks.1.1.mlp.fc2.weight', 'blocks.0.0.gamma'],
)
def test_missing_weights_are_named(key):
    model = GFNetPyramid(PYRAMID, img_size=32)
    state = model.state_dict()
    del state[key]
    with pytest.raises(CheckpointError, match=f'lacks {key}'):
        adapt_state_dict(state, model)


def test_missing_and_unknown_weights_are_all_listed():
    model = GFNetPyramid(PYRAMID, img_size=32)
    state = model.state_dict()
    for key in ('pos_embed', 'blocks.3.0.norm1.bias'):
        del state[key]
    unknown = ('cls_token', 'norm_pre.weight', 'norm.running_mean', 'head.0.weight', 'normal')
    state |= dict.fromkeys(unknown, torch.zeros(3))
    with pytest.raises(CheckpointError) as e:
        adapt_state_dict(state, model)
    lacking, _, holding = str(e.value).partition(';')
    assert lacking == 'lacks pos_embed, blocks.3.0.norm1.bias'
    assert all(key in holding for key in unknown)


def test_a_missing_filter_is_named():
    model = GFNetPyramid(PYRAMID, img_size=32)
    state = model.state_dict()
    del state['blocks.0.0.filter.complex_weight']
    with pytest.raises(CheckpointError, match=r'lacks blocks\.0\.0\.filter\.complex_weight'):
        adapt_state_dict(state, model)


@pytest.mark.parametrize(
    ('key', 'shape'),
    [
        ('blocks.1.1.mlp.fc2.weight', (6, 23)),
        ('patch_embed.0.proj.weight', (4, 1, 4, 4)),
        ('pos_embed', (1, 65, 4)),
        ('pos_embed', (1, 63, 4)),
        ('pos_embed', (1, 16, 4)),
        ('pos_embed', (1, 64, 5)),
        ('pos_embed', (64,)),
        ('blocks.0.0.filter.complex_weight', (8, 6, 4, 2)),
        ('blocks.0.0.filter.complex_weight', (0, 5, 4, 2)),
        ('blocks.0.0.filter.complex_weight', ()),
        ('blocks.1.1.filter.complex_weight', (5, 3, 6, 2)),
        ('blocks.3.0.filter.complex_weight', (1, 1, 10, 3)),
        ('blocks.0.0.norm1.weight', ()),
        ('blocks.0.0.norm1.weight', (5,)),
        ('norm3.weight', (3,)),
    ],
    ids=str,
)
@pytest.mark.parametrize('img_size', [32, 64])
def test_weights_of_another_shape_are_refused(key, shape, img_size):
    source = GFNetPyramid(PYRAMID, img_size=32).state_dict()
    source[key] = torch.zeros(shape)
    model = GFNetPyramid(PYRAMID, img_size=img_size)
    with pytest.raises(CheckpointError):
        adapt_state_dict(source, model)


def test_weights_of_another_model_are_refused(tmp_path):
    path = saved(nn.Linear(3, 4).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match='no weights of a GFNet'):
        GFNetPyramid(PYRAMID, img_size=32).load_pretrained(path)


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path):
    model = randomized(GFNetPyramid(PYRAMID, img_size=32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = GFNetPyramid(PYRAMID, img_size=32).state_dict()
    del state['blocks.3.0.mlp.fc2.weight']
    with pytest.raises(CheckpointError):
        model.load_pretrained(saved({'model': state}, tmp_path))
    assert_equal_states(model.state_dict(), before)


# Bad files


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('place', ['beside', 'as_weights', 'in_args', 'alone'])
def test_nothing_of_a_file_is_executed(tmp_path, place, zipped):
    trap = tmp_path / 'executed'
    content = official_content(GFNetPyramid(PYRAMID, img_size=32, num_classes=5))
    if place == 'beside':
        content['epoch'] = Malicious(trap)
    elif place == 'as_weights':
        content['model'] = Malicious(trap)
    elif place == 'in_args':
        content['args'].lr = Malicious(trap)
    else:
        content = Malicious(trap)
    path = saved(content, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r'not safe to read: it asks for \w+\.mkdir') as e:
        read_state_dict(path)
    assert 'weights_only' not in ''.join(traceback.format_exception(e.value))
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap was armed


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_pickle_that_torch_did_not_write(tmp_path):
    trap, path = tmp_path / 'executed', tmp_path / 'weights.pth'
    path.write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(CheckpointError):
        read_state_dict(path)
    assert not trap.exists()


def test_reading_leaves_the_trusted_globals_of_torch_alone(tmp_path):
    before = torch.serialization.get_safe_globals()
    read_state_dict(saved(official_content(GFNet(PATCHES, img_size=32)), tmp_path))
    assert set(torch.serialization.get_safe_globals()) == set(before)


ZIPPED = file_of({'model': {'pos_embed': torch.zeros(1, 4, 4)}})
LEGACY = file_of(
    {'model': {'pos_embed': torch.zeros(1, 4, 4)}}, _use_new_zipfile_serialization=False
)


NO_CHECKPOINTS = {
    'empty': b'',
    'blank': b'\n',
    'expired_link': b'<!DOCTYPE html><html><body>This share link has expired</body></html>',
    'json': b'{"error": "quota exceeded"}',
    'git_lfs_pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
    'start_of_a_zip': b'PK\x03\x04',
    'start_of_a_pickle': b'\x80\x02',
    'start_of_a_frame': b'\x80\x04\x95',
    'gzip': b'\x1f\x8b\x08\x00' + bytes(30),
    'png': b'\x89PNG\r\n\x1a\n' + bytes(30),
    'zeros': bytes(100),
    'foreign_pickle': pickle.dumps({'model': 'no weights'}),
    'bad_text': LEGACY.replace(b'pos_embed', b'\xff' * 9),
    'bad_stack': LEGACY[:200] + b'\x85R' * 50 + LEGACY[200:],
    **{f'zip_less_{n}': ZIPPED[:-n] for n in (1, 10, 500)},
    **{f'legacy_{n}_eighths': LEGACY[: len(LEGACY) * n // 8] for n in range(1, 8)},
}


@pytest.mark.parametrize('content', NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS.keys())
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='get the file again') as e:
        read_state_dict(path)
    assert str(path) in str(e.value)
    assert '\n' not in str(e.value)
    assert 'weights_only' not in ''.join(traceback.format_exception(e.value))


@pytest.mark.parametrize(
    'content',
    [
        torch.zeros(3),
        [torch.zeros(3)],
        {},
        {'model': {}},
        {'model': 'gfnet-h-s', 'epoch': 3},
        {'epoch': 3},
        {'weights': {'pos_embed': torch.zeros(3)}},
        {'model': {'pos_embed': [1.0, 2.0]}},
    ],
)
def test_what_holds_no_weights_is_refused(tmp_path, content):
    path = saved(content, tmp_path)
    with pytest.raises(CheckpointError) as e:
        read_state_dict(path)
    assert str(path) in str(e.value)


def test_keys_that_are_no_names_are_refused(tmp_path):
    path = saved({0: torch.zeros(3)}, tmp_path)
    with pytest.raises(CheckpointError):
        GFNetPyramid(PYRAMID, img_size=32).load_pretrained(path)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / 'weights.pth'
    for name in (path, str(path), tmp_path):
        with pytest.raises(FileNotFoundError) as e:
            GFNetPyramid(PYRAMID, img_size=32).load_pretrained(name)
        for part in (str(name), 'gfnet-h-s', 'github.com/raoyongming/GFNet', 'init_cfg'):
            assert part in str(e.value)
    for name in (path, tmp_path):
        with pytest.raises(OSError):
            read_state_dict(name)


# Official weights by name


@networks
def test_official_weights_are_found_by_name(tmp_path, monkeypatch, network, arch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    source = randomized(network(arch, img_size=32, num_classes=5))
    saved(official_content(source), folder).rename(folder / 'gfnet-h-ti.pth')
    model = network(arch, img_size=32, num_classes=5)
    model.load_pretrained('gfnet-h-ti')
    assert_equal_states(model.state_dict(), source.state_dict())


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = randomized(GFNetPyramid(PYRAMID, img_size=32))
    saved(source.state_dict(), tmp_path).rename(tmp_path / 'gfnet-h-s')
    model = GFNetPyramid(PYRAMID, img_size=32)
    model.load_pretrained('gfnet-h-s')
    assert_equal_states(model.state_dict(), source.state_dict())


# As a config names it


@pytest.mark.parametrize(
    'wrap',
    [
        'module.{}', '_orig_mod.{}', 'module._orig_mod.{}', '_orig_mod.module.{}',
        'module.backbone.{}', 'backbone._orig_mod.{}', '_fsdp_wrapped_module.backbone.{}',
        'backbone._fsdp_wrapped_module._orig_mod.{}',
    ],
)  # fmt: skip
def test_prefixes_of_wrappers_are_taken_off(tmp_path, wrap):
    model = GFNetPyramid(PYRAMID, img_size=32)
    state = GFNetPyramid(PYRAMID, img_size=32).state_dict()
    path = saved(
        {'state_dict': {wrap.format(key): value for key, value in state.items()}}, tmp_path
    )
    model.load_pretrained(path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
