"""Handwritten digits as an image folder; `tools/make_digits.py --scans` writes it.

1,433 scans for training and 364 for validation, of 8x8 pixels, enlarged to 64x64.
"""

data_root = '{{$DIGIT_SCANS_ROOT:data/digit_scans}}'

# No flip: a mirrored digit is another digit, or none.
train_transform = dict(
    is_training=True,
    input_size=64,
    scale=(0.6, 1.0),
    hflip=0.0,
    color_jitter=None,
    interpolation='bicubic',
)
test_transform = dict(input_size=64, crop_pct=1.0, interpolation='bicubic')

train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root=data_root,
        split='train',
        num_classes=10,
        transform=train_transform,
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root=data_root,
        split='val',
        num_classes=10,
        transform=test_transform,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
