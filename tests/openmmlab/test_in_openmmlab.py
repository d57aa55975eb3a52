"""The backbones inside segmentors and detectors that are not in configs/."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope

from gfnet_dense.models.hub import DownloadError
from gfnet_dense.openmmlab import GFNetPyramid
from gfnet_dense.serialization import CheckpointError

NORM = dict(type='BN', requires_grad=True)
ISOTROPIC = dict(embed_dims=16, depths=4)
PYRAMID = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), layer_scale_init_value=1.0)


def segmentor(**parts) -> torch.nn.Module:
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    preprocessor = dict(type='SegDataPreProcessor', size=(64, 64))
    return MODELS.build(
        dict(
            type='EncoderDecoder',
            data_preprocessor=preprocessor,
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
            **parts,
        )
    )


@pytest.mark.parametrize('size', [(64, 64), (50, 83)])
def test_isotropic_maps_serve_a_head_over_a_pyramid(size):
    model = segmentor(
        backbone=dict(type='GFNet', arch=ISOTROPIC, img_size=64, out_indices=(0, 1, 2, 3)),
        neck=dict(type='Feature2Pyramid', embed_dim=16, rescales=[4, 2, 1, 0.5], norm_cfg=NORM),
        decode_head=dict(
            type='UPerHead',
            in_channels=[16] * 4,
            in_index=[0, 1, 2, 3],
            channels=8,
            num_classes=5,
            norm_cfg=NORM,
            align_corners=False,
        ),
    ).eval()
    images = torch.randn(2, 3, *size)
    maps = model.neck(model.backbone(images))
    cells = [-(-side // 16) for side in size]
    assert [tuple(m.shape[2:]) for m in maps] == [
        tuple(int(cell * scale) for cell in cells) for scale in (4, 2, 1, 0.5)
    ]
    logits = model.encode_decode(images, [dict(img_shape=size)] * 2)
    assert logits.shape == (2, 5, *size)


def test_a_detector_neck_takes_the_stages_it_names():
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    backbone = MODELS.build(
        dict(type='GFNetPyramid', arch=PYRAMID, img_size=64, out_indices=(1, 2, 3))
    )
    neck = MODELS.build(
        dict(type='FPN', in_channels=[16, 24, 32], out_channels=8, num_outs=5,
             add_extra_convs='on_input', start_level=0)
    )  # fmt: skip
    levels = neck(backbone(torch.randn(1, 3, 96, 160)))
    assert [tuple(m.shape[2:]) for m in levels] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    assert not any(name.startswith('norm0') for name, _ in backbone.named_parameters())


# Weights, as init_weights of a whole model loads them


def small_segmentor(**backbone) -> torch.nn.Module:
    head = dict(
        type='FCNHead', in_channels=32, channels=8, num_convs=1, concat_input=False, num_classes=5
    )
    return segmentor(backbone=dict(type='GFNetPyramid', arch=PYRAMID, **backbone), decode_head=head)


def small_detector(**backbone) -> torch.nn.Module:
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    return MODELS.build(
        dict(
            type='RetinaNet',
            backbone=dict(type='GFNetPyramid', arch=PYRAMID, **backbone),
            neck=dict(type='FPN', in_channels=[8, 16, 24, 32], out_channels=8, num_outs=5),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=2,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                anchor_generator=dict(
                    type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64]
                ),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
                loss_cls=dict(type='FocalLoss', use_sigmoid=True),
                loss_bbox=dict(type='L1Loss'),
            ),
        )
    )


def test_the_official_logits_survive_a_segmentors_checkpoint(golden, relative_error, tmp_path):
    numbers = golden('hierarchical')
    prefix = 'state_dict.'
    state = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
    torch.save({'model': state, 'epoch': 299}, tmp_path / 'official.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'official.pth'))
    model = small_segmentor(img_size=64, init_cfg=init_cfg)
    model.init_weights()
    saved = {'state_dict': model.state_dict(), 'meta': {'iter': 1}}
    torch.save(saved, tmp_path / 'iter_1.pth')

    classifier = GFNetPyramid(PYRAMID, img_size=64, num_classes=10).eval()
    classifier.load_pretrained(tmp_path / 'iter_1.pth')
    # All but the head, which a segmentor has not.
    classifier.head.load_state_dict({k: state[f'head.{k}'] for k in ('weight', 'bias')})
    assert relative_error(classifier(numbers['input']), numbers['logits']) < 1e-5


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize('build', [small_segmentor, small_detector])
@pytest.mark.parametrize(
    ('fault', 'error', 'message'),
    [
        ('missing', FileNotFoundError, 'no checkpoint at'),
        ('unreachable', DownloadError, 'gfnet-h-s cannot be downloaded'),
        ('truncated', CheckpointError, 'get the file again'),
        ('malicious', CheckpointError, r'asks for posix\.mkdir'),
        ('of_another_size', CheckpointError, r'holds h-ti \(.* the model is a hierarchical'),
        ('of_another_model', CheckpointError, 'no weights of a GFNet'),
        ('incomplete', CheckpointError, r'lacks blocks\.3\.0\.gamma'),
        ('with_a_prefix', ValueError, 'type and checkpoint alone'),
    ],
)
def test_no_fault_of_a_file_is_survived(tmp_path, monkeypatch, build, fault, error, message):
    """Neither mmseg nor mmdet swallows what GFNet raises, and training cannot begin."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    path = tmp_path / 'weights.pth'
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    state = GFNetPyramid(PYRAMID, img_size=64).state_dict()
    if fault == 'unreachable':
        init_cfg['checkpoint'] = 'gfnet-h-s'
    elif fault == 'truncated':
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == 'malicious':
        torch.save({'model': state, 'args': Malicious(tmp_path / 'executed')}, path)
    elif fault == 'of_another_size':
        with torch.device('meta'):
            other = GFNetPyramid('h-ti').state_dict()
        torch.save({key: torch.zeros(()).expand(value.shape) for key, value in other.items()}, path)
    elif fault == 'of_another_model':
        torch.save(torch.nn.Linear(3, 4).state_dict(), path)
    elif fault == 'incomplete':
        del state['blocks.3.0.gamma']
        torch.save(state, path)
    elif fault == 'with_a_prefix':
        torch.save({f'student.{key}': value for key, value in state.items()}, path)
        init_cfg['prefix'] = 'student'
    model = build(img_size=64, init_cfg=init_cfg)
    with pytest.raises(error, match=message):
        model.init_weights()
    assert not (tmp_path / 'executed').exists()


def test_mmcvs_operators_see_the_maps_as_they_are():
    """They take memory as it lies: a permuted map would give them the values of other places."""
    from mmcv.ops import RoIAlign
    from torchvision.ops import roi_align

    maps = GFNetPyramid(PYRAMID, img_size=64)(torch.randn(2, 3, 96, 160))
    boxes = torch.tensor([[0, 4.0, 8.0, 90.0, 60.0], [1, 30.0, 5.0, 150.0, 95.0]])
    for stride, features in zip((4, 8, 16, 32), maps, strict=True):
        ours = RoIAlign(7, 1 / stride, sampling_ratio=2)(features, boxes)
        expected = roi_align(features, boxes, 7, 1 / stride, sampling_ratio=2, aligned=True)
        torch.testing.assert_close(ours, expected)
