"""Weights in the networks of OpenMMLab: other outputs, `init_cfg`, checkpoints of mmengine."""

import io
import logging
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub, history_buffer
from mmengine.model import BaseModule, PretrainedInit
from timm.models import group_parameters
from torch import Tensor, nn
from weights import (
    PATCHES,
    PYRAMID,
    assert_equal_states,
    file_of,
    from_file,
    is_hierarchical,
    narrow,
    official_content,
    on_meta,
    randomized,
    saved,
)

from gfnet_dense.models.checkpoint import CheckpointError, adapt_state_dict, read_state_dict
from gfnet_dense.models.gfnet import HIERARCHICAL, ISOTROPIC
from gfnet_dense.openmmlab import GFNet, GFNetPyramid, backbones
from gfnet_dense.openmmlab.layer_decay import layer_ids
from gfnet_dense.serialization import load_file

networks = pytest.mark.parametrize(
    ('network', 'arch', 'final'),
    [(GFNetPyramid, PYRAMID, 'norm3'), (GFNet, PATCHES, 'norm2')],
    ids=['GFNetPyramid', 'GFNet'],
)


def test_the_log_of_a_run_says_what_was_loaded_resized_and_left(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(backbones, 'print_log', lambda message, **_: said.append(message))
    source = GFNetPyramid(PYRAMID, img_size=32, num_classes=5)
    path = saved(official_content(source), tmp_path)
    core = logging.getLogger('gfnet_dense')
    before = core.level, core.propagate, list(core.handlers)
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(path)}
    GFNetPyramid(PYRAMID, img_size=64, init_cfg=init_cfg).init_weights()
    assert (core.level, core.propagate, core.handlers) == before
    said = '\n'.join(said)
    assert str(path) in said
    assert 'pos_embed' in said
    assert 'blocks.1.1.filter.complex_weight' in said
    assert '(8, 8)' in said
    assert '(16, 16)' in said
    assert 'bilinear' in said
    for name in ('norm0.weight', 'norm1.bias', 'norm2.weight', 'head.weight', 'head.bias'):
        assert name in said
    assert 'norm3' not in said


def test_a_training_checkpoint_of_mmengine(tmp_path):
    """With the history of its metrics, which is more than tensors and plain values."""
    hub = MessageHub('test_a_training_checkpoint_of_mmengine')
    hub.update_scalar('loss', 0.5)
    hub.update_scalar('loss', torch.tensor(0.25))
    model = randomized(GFNetPyramid(PYRAMID, img_size=32))
    content = {'state_dict': model.state_dict(), 'message_hub': hub.state_dict(), 'meta': {}}
    assert_equal_states(read_state_dict(saved(content, tmp_path)), model.state_dict())


@networks
def test_the_final_norm_of_a_classifier_feeds_the_last_map_and_back(network, arch, final):
    classifier = randomized(network(arch, img_size=32, num_classes=5))
    backbone = randomized(network(arch, img_size=32))
    state, _ = adapt_state_dict(classifier.state_dict(), backbone)
    assert torch.equal(state[f'{final}.weight'], classifier.norm.weight)
    assert torch.equal(state[f'{final}.bias'], classifier.norm.bias)
    assert not any(key.startswith(('head.', 'norm.')) for key in state)
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(key.startswith(('norm0', 'norm1', 'norm2')) for key in missing)

    x = torch.randn(2, 3, 32, 32)
    pooled = backbone(x)[-1].mean((2, 3))
    torch.testing.assert_close(classifier.head(pooled), classifier(x))

    again = randomized(network(arch, img_size=32, num_classes=5))
    state, _ = adapt_state_dict(backbone.state_dict(), again)
    assert set(again.state_dict()) - set(state) == {'head.weight', 'head.bias'}
    again.load_state_dict(state, strict=False)
    torch.testing.assert_close(again.head(pooled), again(x))


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3,), (0, 2), (1,), (0,)])
@pytest.mark.parametrize('num_classes', [0, 5])
def test_every_selection_of_stages_takes_a_whole_network(out_indices, num_classes):
    source = randomized(GFNetPyramid(PYRAMID, img_size=32, num_classes=num_classes))
    model = randomized(GFNetPyramid(PYRAMID, img_size=32, out_indices=out_indices))
    state, _ = adapt_state_dict(source.state_dict(), model)
    model.load_state_dict(state, strict=False)
    whole = randomized(GFNetPyramid(PYRAMID, img_size=32))
    whole.load_state_dict(
        adapt_state_dict(source.state_dict(), whole)[0] | model_norms(model), strict=False
    )
    x = torch.randn(1, 3, 40, 32)
    for y, i in zip(model(x), out_indices, strict=True):
        assert torch.equal(y, whole(x)[i])
    if num_classes == 0:
        assert set(model.state_dict()) == set(state)


def model_norms(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if key.startswith('norm')}


def test_a_selection_of_blocks_takes_a_whole_network():
    source = randomized(GFNet(PATCHES, img_size=32, num_classes=5))
    model = GFNet(PATCHES, img_size=32, out_indices=[0, 1])
    state, notes = adapt_state_dict(source.state_dict(), model)
    assert not any(key.startswith(('blocks.2.', 'norm')) for key in state)
    assert 'blocks.2.mlp.fc1.weight' in ' '.join(notes)
    assert all(key in state for key in model.state_dict() if not key.startswith('norm'))


def test_a_part_takes_a_part_and_no_whole_takes_one():
    part = randomized(GFNetPyramid(PYRAMID, img_size=32, out_indices=[0, 1]))
    twin = GFNetPyramid(PYRAMID, img_size=32, out_indices=[0, 1])
    state, notes = adapt_state_dict(part.state_dict(), twin)
    assert_equal_states(state, part.state_dict())
    assert notes == []
    with pytest.raises(CheckpointError, match=r'\(4, 6\).*\(4, 6, 8, 10\)'):
        adapt_state_dict(part.state_dict(), GFNetPyramid(PYRAMID, img_size=32))


@networks
def test_the_backbone_of_a_segmentor(tmp_path, network, arch, final):
    backbone = randomized(network(arch, img_size=32))
    content = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    content['decode_head.conv_seg.weight'] = torch.zeros(2, 3)
    content['decode_head.blocks.0.norm1.weight'] = torch.zeros(7)
    content['norm.weight'] = torch.zeros(9)
    model = network(arch, img_size=32)
    model.load_pretrained(saved({'state_dict': content, 'meta': {}}, tmp_path))
    assert_equal_states(model.state_dict(), backbone.state_dict())


@pytest.mark.parametrize('out_indices', [None, (0, 1)])
@pytest.mark.parametrize('key', ['blocks.0.0.attn.qkv.weight', 'cls_token', 'patch_embed.0.x'])
def test_weights_that_no_gfnet_has_are_refused(key, out_indices):
    source = GFNetPyramid(PYRAMID, img_size=32, num_classes=5).state_dict()
    source[key] = torch.zeros(3)
    model = GFNetPyramid(PYRAMID, img_size=32, out_indices=out_indices)
    with pytest.raises(CheckpointError, match=key):
        adapt_state_dict(source, model)


def test_attributes_of_trusted_types_lead_nowhere(tmp_path):
    """mmengine trusts getattr, by which a file could reach eval and make HistoryBuffer call it."""
    trap, path = tmp_path / 'executed', tmp_path / 'weights.pth'

    def text(value: str) -> bytes:
        return b'X' + struct.pack('<I', len(value)) + value.encode()

    def attribute(owner: bytes, name: str) -> bytes:
        return get + owner + text(name) + b'\x86R'

    get, buffer = b'cbuiltins\ngetattr\n', b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    names = attribute(attribute(buffer, '__init__'), '__globals__')
    evaluate = attribute(attribute(get, '__self__'), 'eval')
    call = buffer + text(f"__import__('os').mkdir({str(trap)!r})") + text('None') + b'\x86R'
    payload = b'\x80\x02' + names + text('len') + evaluate + b's' + call + b'.'
    with (
        zipfile.ZipFile(io.BytesIO(file_of({'pos_embed': torch.zeros(1, 4, 4)}))) as source,
        zipfile.ZipFile(path, 'w') as target,
    ):
        for name in source.namelist():
            target.writestr(name, payload if name.endswith('data.pkl') else source.read(name))
    try:
        with pytest.raises(CheckpointError, match='safe'):
            read_state_dict(path)
        assert not trap.exists()
    finally:
        vars(history_buffer).pop('len', None)


class Segmentor(BaseModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


@networks
def test_init_weights_loads_the_pretrained_file(tmp_path, network, arch, final):
    source = randomized(network(arch, img_size=32, num_classes=5))
    path = saved(official_content(source), tmp_path)
    model = network(arch, img_size=64, init_cfg={'type': 'Pretrained', 'checkpoint': str(path)})
    segmentor = Segmentor(model)
    segmentor.init_weights()
    bias = next(key for key in model.state_dict() if key.endswith('mlp.fc1.bias'))
    assert torch.equal(model.state_dict()[bias], source.state_dict()[bias])
    assert torch.equal(getattr(model, final).weight, source.norm.weight)
    assert model.is_init
    assert segmentor.is_init


@pytest.mark.parametrize('as_list', [False, True])
def test_init_weights_is_strict(tmp_path, as_list):
    source = GFNetPyramid({**PYRAMID, 'depths': (1, 1, 1, 1)}, img_size=32)
    path = saved(official_content(source), tmp_path)
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(path)}
    model = GFNetPyramid(PYRAMID, img_size=32, init_cfg=[init_cfg] if as_list else init_cfg)
    with pytest.raises(CheckpointError, match='depths'):
        model.init_weights()


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_init_weights_is_strict_however_it_is_named(tmp_path, kind):
    path = saved({'no': torch.zeros(3)}, tmp_path)
    model = GFNetPyramid(PYRAMID, img_size=32, init_cfg={'type': kind, 'checkpoint': str(path)})
    with pytest.raises(CheckpointError, match='no weights of a GFNet'):
        model.init_weights()


@pytest.mark.parametrize('fields', [{}, {'checkpoint': 'a.pth', 'prefix': 'student.'}])
def test_init_weights_refuses_what_it_would_ignore(fields):
    model = GFNetPyramid(PYRAMID, img_size=32, init_cfg={'type': 'Pretrained', **fields})
    with pytest.raises(ValueError, match='takes type and checkpoint alone'):
        model.init_weights()


@pytest.mark.parametrize('as_list', [False, True])
def test_init_weights_names_a_missing_file(tmp_path, as_list):
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'none.pth')}
    model = GFNetPyramid(PYRAMID, img_size=32, init_cfg=[init_cfg] if as_list else init_cfg)
    with pytest.raises(FileNotFoundError, match=r'none\.pth'):
        Segmentor(model).init_weights()


# Between timm models, classifiers and backbones

names = pytest.mark.parametrize(
    'name', [f'gfnet_{size.replace("-", "_")}' for size in HIERARCHICAL | ISOTROPIC]
)
one_of_each = pytest.mark.parametrize('name', ['gfnet_h_ti', 'gfnet_ti'])


def faces(name: str, state: dict[str, Tensor], folder: Path) -> dict[str, nn.Module]:
    """Load weights into a timm model, a classifier and a backbone, each in its own way."""
    path = folder / 'face.pth'
    torch.save(state, path)
    network = GFNetPyramid if is_hierarchical(name) else GFNet
    arch = dict(vars(narrow(name).arch))
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    loaded = {
        'timm': narrow(name, num_classes=9, **from_file(path)),
        'classifier': network(arch, img_size=32, num_classes=9, init_cfg=init_cfg),
        'backbone': network(arch, img_size=32, init_cfg=init_cfg),
    }
    for face in ('classifier', 'backbone'):
        loaded[face].init_weights()
    return {face: model.eval() for face, model in loaded.items()}


@pytest.mark.slow
@one_of_each
def test_a_checkpoint_moves_between_the_faces(tmp_path, name):
    source = narrow(name, num_classes=9).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + 0.5)
    x = torch.randn(1, 3, 32, 40)
    last = source.forward_features(x).permute(0, 3, 1, 2)
    first = faces(name, source.state_dict(), tmp_path)
    assert first['timm'].state_dict().keys() == first['classifier'].state_dict().keys()
    for face, model in first.items():
        # From each face on to each again.
        for other, again in faces(name, model.state_dict(), tmp_path).items():
            if other == 'backbone':
                assert torch.equal(again(x)[-1], last), face
            elif face == 'backbone':  # has no head to give
                features = again.forward_features(x)
                assert torch.equal(features.permute(0, 3, 1, 2), last), other
            else:
                assert torch.equal(again(x), source(x)), (face, other)


def run_file(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write what a run of tools/train.py saves: weights, and mmengine's logs and counters."""
    path, logs = folder / 'epoch_2.pth', HistoryBuffer(np.array([1.5, 1.2]), np.array([1, 1]))
    state = {f'backbone.{key}': value for key, value in state.items()}
    hub = dict(log_scalars=dict(loss=logs), runtime_info=dict(iter=np.int64(12)))
    torch.save(dict(meta=dict(epoch=2), state_dict=state, message_hub=hub), path)
    return path


@one_of_each
def test_the_checkpoint_of_a_run_becomes_a_timm_model(tmp_path, name):
    source, x = narrow(name, num_classes=9).eval(), torch.randn(1, 3, 32, 32)
    path = run_file(tmp_path, source.state_dict())
    model = narrow(name, num_classes=9, **from_file(path)).eval()
    assert torch.equal(model(x), source(x))
    model = narrow(name, num_classes=9).eval()
    model.load_state_dict(load_file(path)['state_dict'])
    assert torch.equal(model(x), source(x))
    # checkpoint_path is timm's own loading, which knows nothing of mmengine's logs, but of weights.
    with pytest.raises(RuntimeError, match='HistoryBuffer'):
        narrow(name, num_classes=9, checkpoint_path=path)
    torch.save({'state_dict': load_file(path)['state_dict']}, tmp_path / 'weights.pth')
    model = narrow(name, num_classes=9, checkpoint_path=tmp_path / 'weights.pth').eval()
    assert torch.equal(model(x), source(x))


@one_of_each
def test_faces_load_each_other_strictly_as_modules(name):
    model = narrow(name, num_classes=9)
    network = GFNetPyramid if is_hierarchical(name) else GFNet
    classifier = network(dict(vars(model.arch)), img_size=32, num_classes=9)
    classifier.load_state_dict(model.state_dict())
    model.load_state_dict(classifier.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), classifier.eval()(x))
    assert isinstance(classifier, type(model))


@names
def test_layers_of_group_matcher_are_those_of_layer_decay(name):
    model = on_meta(name)
    own = group_parameters(model, model.group_matcher(), reverse=True)
    expected = layer_ids(nn.ModuleDict({'backbone': model}))
    last = expected['backbone.head.weight']
    for key, layer in own.items():
        # timm counts the norm to the last block, dense prediction to what is new.
        assert layer == (last - 1 if key.startswith('norm.') else expected[f'backbone.{key}']), key
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    if is_hierarchical(name):
        stages = {
            0: 'pos_embed',
            1: 'blocks.0.2.gamma',
            2: 'patch_embed.1.proj.bias',
            5: 'head.bias',
        }
        assert {layer: coarse[key] for layer, key in stages.items()} == {i: i for i in stages}
        assert coarse['norm.weight'] == coarse['blocks.3.0.norm1.weight'] == 4
    else:
        assert coarse == own
