"""Cascade Mask R-CNN with GFNet-H-Ti on COCO."""

_base_ = [
    './_base_/models/cascade_mask_rcnn_gfnet_h.py',
    './_base_/datasets/coco_instance_multiscale.py',
    './_base_/schedules/coco_3x.py',
    './_base_/mmdet_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-ti',
        # Within the field's 0.2 (Swin-T) to 0.7 (HorNet-B) for 3x schedules; not tuned.
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-ti'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
