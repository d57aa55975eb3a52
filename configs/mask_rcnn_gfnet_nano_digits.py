"""Mask R-CNN with a very small GFNet on the embedded digits: minutes on two CPU cores.

It shows that an installation or a change works. It says nothing about COCO.
"""

_base_ = [
    './_base_/models/mask_rcnn_gfnet_h.py',
    './_base_/models/gfnet_nano.py',
    './_base_/datasets/digits_coco.py',
    './_base_/schedules/digits.py',
    './_base_/mmdet_runtime.py',
]


def with_masks(pipeline: list) -> list:
    return [
        dict(step, with_mask=True) if step.type == 'LoadAnnotations' else step for step in pipeline
    ]


train_pipeline = with_masks(_base_.train_pipeline)
test_pipeline = with_masks(_base_.test_pipeline)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator

# Digits are 26 to 46 pixels high in scenes of 64: anchors of 16 to 128 pixels, a few dozen
# proposals, and heads with a quarter of the usual channels.
model = dict(
    # The nano backbone replaces the one of the base as a whole.
    backbone=dict(_delete_=True, **_base_.nano_backbone),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=16)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)

# 3 epochs of 188 iterations of 16 scenes.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=564),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=3)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)
