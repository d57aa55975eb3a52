"""RetinaNet with a very small GFNet on the embedded digits: minutes on two CPU cores.

It shows that an installation or a change works. It says nothing about COCO.
"""

_base_ = [
    './_base_/models/retinanet_gfnet_h.py',
    './_base_/models/gfnet_nano.py',
    './_base_/datasets/digits_coco.py',
    './_base_/schedules/digits.py',
    './_base_/mmdet_runtime.py',
]

# Digits are 26 to 46 pixels high in scenes of 64: anchors of 16 to 102 pixels, and heads with a
# quarter of the usual channels and half of their convolutions.
model = dict(
    # The nano backbone replaces the one of the base as a whole.
    backbone=dict(_delete_=True, **_base_.nano_backbone, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 256], out_channels=64, num_outs=3),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        # Without norms the head learns too slowly for so short a run.
        norm_cfg=dict(type='GN', num_groups=8),
        num_classes=10,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
)

tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (48, 64, 80)],
            # It never flips. DetTTAModel asks every view whether it was flipped.
            [dict(type='RandomFlip', prob=0.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                        'flip_direction',
                    ),
                )
            ],
        ],
    ),
]  # fmt: skip

# 5 epochs of 188 iterations of 16 scenes.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=940),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=5, val_interval=5)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)
