"""Mask R-CNN on a hierarchical GFNet, for COCO.

mmdetection's Mask R-CNN with another backbone. Leaves name the size of the backbone, its drop path
and weights and, where they differ from those of h-s and h-b, the channels.
"""

_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='GFNetPyramid',
        arch='h-s',
        # COCO images are all of different sizes: position embedding and filters stay on the grid
        # of the pretraining and are resized to that of each batch, by the backbone's default,
        # 'bilinear', as the authors run them.
        img_size=224,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
