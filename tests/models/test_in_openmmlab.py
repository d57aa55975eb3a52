"""The backbones inside segmentors and detectors that are not in configs/."""

import pytest
import torch
from mmengine.registry import init_default_scope

from gfnet_dense.models import GFNetPyramid

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
