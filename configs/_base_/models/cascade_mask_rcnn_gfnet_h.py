"""Cascade Mask R-CNN on a hierarchical GFNet, for COCO.

mmdetection's Cascade Mask R-CNN with another backbone, and with the box heads of Swin, PVT v2,
ConvNeXt and HorNet: four convolutions and one linear layer, SyncBN, GIoU loss. Leaves set the size
of the backbone, its drop path and weights and, unless they are those of h-s and h-b, the channels.
"""

_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

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
    roi_head=dict(
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=target_stds,
                ),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for target_stds in (
                [0.1, 0.1, 0.2, 0.2],
                [0.05, 0.05, 0.1, 0.1],
                [0.033, 0.033, 0.067, 0.067],
            )
        ],
    ),
)
