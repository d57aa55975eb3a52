"""GFNet-S on ImageNet at 384, from the weights of 224."""

_base_ = [
    './_base_/models/image_classifier_384.py',
    './_base_/datasets/imagenet_384.py',
    './_base_/schedules/imagenet_384_30e.py',
    './_base_/classification_runtime.py',
]

model = dict(
    backbone=dict(
        arch='s',
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-s'),
    ),
)
