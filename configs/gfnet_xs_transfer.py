"""GFNet-XS finetuned on any folder of images in the layout of ImageNet.

    TRANSFER_ROOT=data/flowers TRANSFER_CLASSES=102 python tools/train.py gfnet_xs_transfer

Learning rate, weight decay and epochs are those of the official command for CIFAR, Flowers-102 and
Stanford Cars, on 8 GPUs with 64 images each. Other values are those of ImageNet.
"""

_base_ = [
    './_base_/models/image_classifier.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/classification_runtime.py',
]

data_root = '{{$TRANSFER_ROOT:data/transfer}}'
num_classes = int('{{$TRANSFER_CLASSES:102}}')

model = dict(
    backbone=dict(
        num_classes=num_classes,
        # The official code finetunes in evaluation mode, which switches drop path off.
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-xs'),
    ),
)
dataset = dict(data_root=data_root, num_classes=num_classes)
train_dataloader = dict(batch_size=64, dataset=dataset)
val_dataloader = dict(batch_size=64, dataset=dataset)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='WarmupCosineLR', t_initial=1000, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6),
]
train_cfg = dict(max_epochs=1000, val_interval=10)
default_hooks = dict(checkpoint=dict(interval=10))
