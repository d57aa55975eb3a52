"""RetinaNet on a hierarchical GFNet, for COCO.

mmdetection's RetinaNet with another backbone. Leaves name the size of the backbone, its drop path
and weights and, where they differ from those of h-s and h-b, the channels.
"""

_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='GFNetPyramid',
        arch='h-s',
        # COCO images are all of different sizes: position embedding and filters stay on the grid
        # of the pretraining and are resized to that of each batch, by the backbone's default,
        # 'bilinear', as the authors run them.
        img_size=224,
        # The strides 8, 16 and 32 that the neck starts from; stage 1 needs no norm of its own.
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
# As mmdetection tests RetinaNet, see tta_pipeline.
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
