"""12 epochs at batch 16, 88k iterations of COCO: mmdetection's 1x schedule, with AdamW.

The learning rate and weight decay of PVT and PoolFormer for RetinaNet, 1e-4 both; warm-up over 500
iterations, steps by 10 after epochs 8 and 11. Mask R-CNN has twice the learning rate in them.
"""

_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    # The same learning rate everywhere; weight decay spares what it does in all our configs.
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)
