"""The embedded digits data set, in the layout of ADE20K; `tools/make_digits.py` writes it."""

data_root = '{{$DIGITS_ROOT:data/digits}}'
metainfo = dict(
    classes=(
        'background', 'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight',
        'nine',
    ),
    palette=[
        (56, 56, 56), (224, 40, 48), (36, 160, 60), (250, 216, 40), (40, 96, 224), (248, 136, 24),
        (136, 48, 176), (64, 220, 232), (240, 72, 208), (150, 96, 48), (172, 232, 128),
    ],
)  # fmt: skip

# OpenCV keeps the upper 8 bits of 16-bit images. Pillow would clip them to white.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # No flip: a mirrored digit is another digit, or none. No photometric distortion: the scenes
    # vary in contrast already, and so short a run loses more than it gains.
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
