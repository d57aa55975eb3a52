"""300 epochs of ImageNet and 10 of cooldown: the official recipe, which is DeiT's.

AdamW with weight decay 0.05 and gradients clipped to a norm of 1. The learning rate is 5e-4 for 512
images and proportional to the batch: 1e-3 for 8 GPUs with 128 images each. After a linear warm-up
over 5 epochs from 1e-6, a cosine over 300 epochs falls to 1e-5. The authors train in mixed
precision: `--amp`.

The released training loop stops after the cosine, without the cooldown, and is one epoch behind its
schedule. `train_cfg.max_epochs=300` stops there, too.
"""

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    # One learning rate for all layers. Norms, biases, LayerScale and position embedding have no
    # weight decay, as in timm.
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)
auto_scale_lr = dict(enable=True, base_batch_size=512)
param_scheduler = [
    dict(type='WarmupCosineLR', t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=310, val_interval=1)
