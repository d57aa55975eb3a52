"""160k iterations at batch 16, 127 epochs of ADE20K.

As ConvNeXt and HorNet train UperNet: AdamW with learning rate 1e-4 and weight decay 0.05, linear
warm-up over 1,500 iterations from 1e-6 of it, then linear (poly of power 1) to 0. The learning rate
decays by 0.9 per layer over as many layers as theirs. The layers here are runs of blocks of equal
length; theirs follow the stages. Not tuned for GFNet.
"""

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    # Six layers, as for ConvNeXt-T. Leaves with deeper backbones set more.
    paramwise_cfg=dict(decay_rate=0.9, num_layers=6),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160_000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160_000, val_interval=16_000)
auto_scale_lr = dict(enable=False, base_batch_size=16)
