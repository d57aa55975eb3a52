"""One training step on digits, in one process or, under torchrun, in several.

step.py OUT TOTAL_BATCH writes the state dict after the step.
"""

import os
import sys

import torch
from mmengine.config import Config

from gfnet_dense.openmmlab import find_config, train

out, total_batch = sys.argv[1], int(sys.argv[2])
world_size = int(os.environ.get('WORLD_SIZE', 1))

cfg = Config.fromfile(find_config('upernet_gfnet_nano_digits'))
cfg.work_dir = f'{out}.run'
cfg.merge_from_dict(
    {
        'train_cfg.max_iters': 1,
        'train_dataloader.batch_size': total_batch // world_size,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        # The processes together see the images that one process sees alone, in the same state.
        'train_dataloader.sampler.shuffle': False,
        'train_dataloader.dataset.pipeline': cfg.test_pipeline,
        'model.backbone.drop_path_rate': 0.0,
        'model.decode_head.dropout_ratio': 0.0,
        'model.auxiliary_head.dropout_ratio': 0.0,
        # Batch norm aside: its statistics are those of a process.
        'model.decode_head.norm_cfg': dict(_delete_=True, type='GN', num_groups=4),
        'model.auxiliary_head.norm_cfg': dict(_delete_=True, type='GN', num_groups=4),
        # A plain step: Adam's first one is the sign of the gradient, so it amplifies rounding.
        'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=0.5, weight_decay=0.05),
        'param_scheduler': [],
    }
)
cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
cfg.default_hooks.checkpoint.update(save_best=None, interval=-1, save_last=False)
runner = train(cfg, seed=0, launcher='none' if world_size == 1 else 'pytorch')
if runner.rank == 0:
    model = getattr(runner.model, 'module', runner.model)
    torch.save(model.state_dict(), out)
