"""The 1x schedule of COCO detectors with AdamW: 12 epochs at batch 16, 88k iterations.

Learning rate and weight decay are those of PVT and PoolFormer for RetinaNet, 1e-4 both. Epochs,
warm-up and steps are mmdetection's `schedule_1x`: a linear warm-up over 500 iterations, a tenth of
the rate after epoch 8 and again after epoch 11.
"""

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    # One learning rate for all layers. Norms, biases, LayerScale and position embedding have no
    # weight decay, as in all our configs.
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)
