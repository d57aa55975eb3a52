"""RetinaNet on a hierarchical GFNet, for COCO.

mmdetection's RetinaNet with another backbone. Leaves set the size of the backbone, its drop path
and weights and, unless they are those of h-s and h-b, the channels.
"""

_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='GFNetPyramid',
        arch='h-s',
        # COCO images differ in size. Filters and position embedding stay at the pretraining size
        # and are resized for each batch, 'bilinear' by default, as the authors do.
        img_size=224,
        # Strides 8, 16 and 32, which the neck starts from. Stage 1 has no output norm then.
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
# mmdetection's settings for RetinaNet, used with tta_pipeline.
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
