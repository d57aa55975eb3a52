"""80k iterations at batch 16, 63 epochs of ADE20K: the Semantic FPN recipe of PVT.

AdamW with learning rate 1e-4 (equally: 2e-4 at batch 32 for 40k), poly of power 0.9, no warm-up.
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
    dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=80_000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80_000, val_interval=8_000)
auto_scale_lr = dict(enable=False, base_batch_size=16)
