"""ImageNet-1K: 1,281,167 training and 50,000 validation images, 1,000 classes.

The folder has train/CLASS/*.JPEG and val/CLASS/*.JPEG. timm augments the images as in the official
code. Evaluation resizes the shorter side to 256 and crops the central 224. Training stops at a file
that is not an image and names it.
"""

data_root = '{{$IMAGENET_ROOT:data/imagenet}}'
num_classes = 1000

# timm applies RandAugment instead of colour jitter where both are set.
train_transform = dict(
    is_training=True,
    input_size=224,
    auto_augment='rand-m9-mstd0.5-inc1',
    color_jitter=0.4,
    interpolation='bicubic',
)
test_transform = dict(input_size=224, crop_pct=0.875, interpolation='bicubic')

# With 8 GPUs, 128 images each give the recipe's batch of 1024.
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    # The recipe has no repeated augmentation; type='RepeatAugSampler' switches it on.
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root=data_root,
        split='train',
        num_classes=num_classes,
        transform=train_transform,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageFolder',
        data_root=data_root,
        split='val',
        num_classes=num_classes,
        transform=test_transform,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
