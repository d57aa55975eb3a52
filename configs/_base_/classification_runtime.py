"""What every classification run has: registration, logging, checkpoints."""

custom_imports = dict(imports=['gfnet_dense'], allow_failed_imports=False)
default_scope = 'mmengine'

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2, save_best='accuracy/top1'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
# Off in the recipe. A moving average of the weights, with timm's decay of 0.99996, is
# dict(type='EMAHook', momentum=4e-5): what is evaluated and saved is then the average.
custom_hooks = []
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='Visualizer', vis_backends=vis_backends, name='visualizer')

val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

log_level = 'INFO'
load_from = None
resume = False
