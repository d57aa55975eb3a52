"""300 epochs of ImageNet and 10 of cooldown: the official recipe, which is DeiT's.

AdamW with weight decay 0.05, gradients clipped to a norm of 1, learning rate 5e-4 for 512 images
and in proportion to the batch: 1e-3 for the 1,024 of 8 GPUs with 128 each. A cosine over 300
epochs, begun with a linear warm-up over 5 epochs from 1e-6, falls to 1e-5. The authors train in
mixed precision: `--amp`.

The released loop ends with the cosine, without the cooldown, and runs one epoch behind its
schedule. `train_cfg.max_epochs=300` ends there, too.
"""

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    # The same learning rate everywhere; no weight decay for norms, biases, LayerScale and position
    # embedding, as in timm.
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)
auto_scale_lr = dict(enable=True, base_batch_size=512)
param_scheduler = [
    dict(type='WarmupCosineLR', t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=310, val_interval=1)
