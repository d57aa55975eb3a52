"""30 epochs of finetuning at 384 with a constant learning rate, after the official command.

The learning rate is 5e-6 for 512 images, 8 GPUs with 64 images each, after a warm-up over 5 epochs
from 1e-6. The floor is 5e-6, too, so the cosine is flat. Other values are those of training at 224.
"""

_base_ = './imagenet_300e.py'

optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = [
    dict(type='WarmupCosineLR', t_initial=30, lr_min=5e-6, warmup_t=5, warmup_lr_init=1e-6),
]
train_cfg = dict(max_epochs=30)
