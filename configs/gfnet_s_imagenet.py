"""GFNet-S on ImageNet."""

_base_ = [
    './_base_/models/image_classifier.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='s'))
