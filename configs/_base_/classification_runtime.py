"""The runtime of classification, with checkpoints by epoch."""

_base_ = './runtime.py'

default_scope = 'mmengine'

default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(interval=1, save_best='accuracy/top1'),
)
# The official recipe keeps no moving average of the weights. To keep one with timm's decay of
# 0.99996, add dict(type='EMAHook', momentum=4e-5); the average is then evaluated and saved.
custom_hooks = []
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
