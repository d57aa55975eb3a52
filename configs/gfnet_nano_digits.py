"""A very small GFNet on handwritten digits: minutes on two CPU cores.

It shows that an installation or a change works, and is what upernet_gfnet_nano_digits.py can start
from. It says nothing about ImageNet.
"""

_base_ = [
    './_base_/models/image_classifier.py',
    './_base_/datasets/digit_scans.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/classification_runtime.py',
]

model = dict(
    data_preprocessor=dict(mixup=None),  # in a run this short it costs more than it brings
    backbone=dict(
        _delete_=True,  # a dict cannot replace the name of the base's arch otherwise
        type='GFNetPyramid',
        arch=dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 4, 2), layer_scale_init_value=1e-2),
        img_size=64,
        num_classes=10,
        drop_path_rate=0.05,
    ),
)

# 6 epochs of 44 batches.
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=32)
param_scheduler = [
    dict(type='WarmupCosineLR', t_initial=6, lr_min=1e-5, warmup_t=1, warmup_lr_init=5e-4),
]
train_cfg = dict(max_epochs=6)
default_hooks = dict(logger=dict(interval=11))
