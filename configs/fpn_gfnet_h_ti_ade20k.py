"""Semantic FPN with GFNet-H-Ti on ADE20K."""

_base_ = [
    './_base_/models/fpn_gfnet_h.py',
    './_base_/datasets/ade20k_aligned.py',
    './_base_/schedules/ade20k_80k.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-ti',
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-ti'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
