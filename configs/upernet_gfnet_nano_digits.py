"""UperNet with a very small GFNet on the embedded digits: minutes on two CPU cores.

It shows that an installation or a change works. It says nothing about ADE20K.
"""

_base_ = [
    './_base_/models/upernet_gfnet_h.py',
    './_base_/models/gfnet_nano.py',
    './_base_/datasets/digits.py',
    './_base_/schedules/digits.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    # The nano backbone replaces the one of the base as a whole.
    backbone=dict(_delete_=True, **_base_.nano_backbone),
    # init_cfg=None initialises the classifiers as torch does. mmseg's initial weights are so small
    # (standard deviation 0.01) that so short a run would only learn to predict background.
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=11, init_cfg=None),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=11, init_cfg=None),
)

# 600 iterations of 32 are 6.4 epochs of the 3,000 scenes.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=600),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600, val_interval=300)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=100))
auto_scale_lr = dict(enable=False, base_batch_size=32)
