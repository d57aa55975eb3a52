"""The runtime of segmentation, with checkpoints by iteration."""

_base_ = './runtime.py'

default_scope = 'mmseg'

default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=8000, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'),
)
log_processor = dict(by_epoch=False)
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
tta_model = dict(type='SegTTAModel')
