"""RetinaNet with GFNet-H-S on COCO."""

_base_ = [
    './_base_/models/retinanet_gfnet_h.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-s',
        # As in its ImageNet training, and as Swin-T on COCO.
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-s'),
    ),
)
