"""Mask R-CNN with GFNet-H-Ti on COCO."""

_base_ = [
    './_base_/models/mask_rcnn_gfnet_h.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-ti',
        # As in its ImageNet training.
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-ti'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
# As in PVT and PoolFormer: twice the learning rate of RetinaNet.
optim_wrapper = dict(optimizer=dict(lr=2e-4))
