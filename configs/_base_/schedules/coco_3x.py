"""Swin's 3x schedule of COCO detectors: 36 epochs at batch 16, 264k iterations.

AdamW with learning rate 1e-4 and weight decay 0.05. A linear warm-up over 500 iterations, a tenth
of the rate after epoch 27 and again after epoch 33.
"""

_base_ = './coco_1x.py'

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)
