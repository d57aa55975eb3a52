"""A very small GFNet on handwritten digits: minutes on two CPU cores.

It shows that an installation or a change works. upernet_gfnet_nano_digits.py can start from its
weights. It says nothing about ImageNet.
"""

_base_ = [
    './_base_/models/image_classifier.py',
    './_base_/models/gfnet_nano.py',
    './_base_/datasets/digit_scans.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/classification_runtime.py',
]

model = dict(
    data_preprocessor=dict(mixup=None),  # so short a run loses more than it gains
    # The nano backbone replaces the one of the base as a whole.
    backbone=dict(_delete_=True, **_base_.nano_backbone, num_classes=10),
)

# 6 epochs of 44 batches.
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=32)
param_scheduler = [
    dict(type='WarmupCosineLR', t_initial=6, lr_min=1e-5, warmup_t=1, warmup_lr_init=5e-4),
]
train_cfg = dict(max_epochs=6)
default_hooks = dict(logger=dict(interval=11))
