"""The embedded digits with boxes, in the layout of COCO; `tools/make_digits.py` writes them."""

_base_ = 'mmdet::_base_/datasets/coco_detection.py'

data_root = '{{$DIGITS_ROOT:data/digits}}'
metainfo = dict(
    classes=('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'),
    palette=[
        (224, 40, 48), (36, 160, 60), (250, 216, 40), (40, 96, 224), (248, 136, 24),
        (136, 48, 176), (64, 220, 232), (240, 72, 208), (150, 96, 48), (172, 232, 128),
    ],
)  # fmt: skip

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    # No flip: a mirrored digit is another digit, or none.
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # Scenes have this size. Other images are brought to it, and PackDetInputs needs a scale factor.
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_validation.json',
        data_prefix=dict(img='images/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_validation.json')
test_evaluator = val_evaluator
