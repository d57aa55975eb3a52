"""UperNet with a very small GFNet on the embedded digits: minutes on two CPU cores.

It shows that an installation or a change works. It says nothing about ADE20K.
"""

_base_ = [
    './_base_/models/upernet_gfnet_h.py',
    './_base_/datasets/digits.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        _delete_=True,  # a dict cannot replace the name of the base's arch otherwise
        type='GFNetPyramid',
        arch=dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 4, 2), layer_scale_init_value=1e-2),
        img_size=64,
        drop_path_rate=0.05,
    ),
    # Without mmseg's init_cfg the classifiers start as torch makes them. mmseg makes them so small
    # (standard deviation 0.01) that a run this short is spent on answering background.
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=11, init_cfg=None),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=11, init_cfg=None),
)

# 600 iterations of 32 are 6.4 epochs of the 3,000 scenes.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=600),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600, val_interval=300)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=100))
auto_scale_lr = dict(enable=False, base_batch_size=32)
