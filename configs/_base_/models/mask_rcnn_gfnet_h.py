"""Mask R-CNN on a hierarchical GFNet, for COCO.

mmdetection's Mask R-CNN with another backbone. Leaves set the size of the backbone, its drop path
and weights and, unless they are those of h-s and h-b, the channels.
"""

_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='GFNetPyramid',
        arch='h-s',
        # COCO images differ in size. Filters and position embedding stay at the pretraining size
        # and are resized for each batch, 'bilinear' by default, as the authors do.
        img_size=224,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
