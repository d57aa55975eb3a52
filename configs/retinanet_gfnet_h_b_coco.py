"""RetinaNet with GFNet-H-B on COCO."""

_base_ = [
    './_base_/models/retinanet_gfnet_h.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-b',
        # As Swin-B on COCO. ImageNet training has 0.4, for 25 times as many epochs.
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-b'),
    ),
)
