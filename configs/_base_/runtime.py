"""The runtime of classification and segmentation: registration, hooks, loops, logging."""

custom_imports = dict(imports=['gfnet_dense'], allow_failed_imports=False)

env_cfg = dict(
    cudnn_benchmark=True,
    # OpenCV starts no threads of its own: those of all data loading processes would compete.
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
vis_backends = [dict(type='LocalVisBackend')]

val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

log_level = 'INFO'
load_from = None
resume = False
