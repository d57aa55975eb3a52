"""A run of milliseconds an iteration, with randomness everywhere, for tests of what runs it."""

import itertools
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import loops
from mmengine.structures import BaseDataElement
from torch import nn

_numbers = itertools.count()

# Before each epoch mmengine waits two seconds, against a deadlock of older versions of torch.
loops.time = SimpleNamespace(sleep=lambda seconds: None)
# A DataLoader that is garbage may lose its queues before it ends its workers. It then waits this
# long for each of them, by default five seconds.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2


@DATASETS.register_module()
class ToyData(BaseDataset):
    """Numbers with noise from each of the generators that augmentations draw from."""

    def load_data_list(self) -> list[dict]:
        """Make up 22 samples, which no batch or process divides."""
        return [dict(img_path=f'{i:02}.jpg', value=i / 22) for i in range(22)]

    def prepare_data(self, idx: int) -> dict:
        """Return a sample, for training with noise."""
        info = self.get_data_info(idx)
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        noise = [0.0] * 3 if self.test_mode else noise
        inputs = torch.tensor([info['value'], *noise])
        return dict(inputs=inputs, data_samples=BaseDataElement(metainfo=info))


@MODELS.register_module()
class ToyModel(BaseModel):
    """Two layers with dropout; its loss is not finite in the iterations of `broken`."""

    def __init__(self, broken: tuple[int, ...] = (), norm: bool = False) -> None:
        super().__init__()
        self.broken, self.iterations = broken, 0
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, inputs: list, data_samples: list, mode: str = 'tensor') -> dict | list:
        """Return a loss, or samples with a prediction."""
        inputs = torch.stack(list(inputs))
        if mode == 'loss':
            self.iterations += 1
            if self.iterations in self.broken:
                inputs = inputs * float('nan')
        outputs = self.layers(self.norm(inputs))
        if mode == 'loss':
            return dict(loss=(outputs - 1).square().mean())
        for sample, output in zip(data_samples, outputs, strict=True):
            sample.output = output
        return data_samples


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Mean output."""

    def process(self, data_batch: dict, data_samples: list[dict]) -> None:
        """Note the outputs."""
        self.results += [sample['output'].item() for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        """Return their mean."""
        return dict(mean=float(np.mean(results)), number=len(results))


@HOOKS.register_module()
class LossesHook(Hook):
    """Write each iteration's loss and learning rate, and do something in one of them."""

    priority = 'NORMAL'
    then = None  # (iteration, function)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Write a line."""
        n = runner.iter + 1
        names = ' '.join(sample.img_path for sample in data_batch['data_samples'])
        rate = runner.optim_wrapper.get_lr()['lr'][0]
        with open(Path(runner.work_dir) / f'losses{runner.rank}', 'a') as file:
            file.write(f'{n} {outputs["loss"].item()!r} {rate!r} {names}\n')
        if self.then and self.then[0] == n:
            self.then[1]()


@HOOKS.register_module()
class DieHook(Hook):
    """Make one process of a run die in an iteration, and note the time in the file `died`."""

    def __init__(self, rank: int, iteration: int, killed: bool) -> None:
        self.rank, self.iteration, self.killed = rank, iteration, killed

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Die."""
        if (runner.rank, runner.iter + 1) == (self.rank, self.iteration):
            (Path(runner.work_dir) / 'died').write_text(repr(time.time()))
            if self.killed:  # as the kernel kills a process that takes too much memory
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError('an error of one process')


def toy_config(
    work_dir: Path, by_epoch: bool = False, workers: int = 0, broken: tuple[int, ...] = ()
) -> Config:
    """Return the config of 12 iterations, or of 4 epochs of 3, 8 samples each."""
    loader = dict(num_workers=workers, persistent_workers=workers > 0)
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    if by_epoch:
        loop = dict(type='EpochBasedTrainLoop', max_epochs=4, val_interval=4)
    else:
        loop = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=12)
    return Config(
        dict(
            default_scope='mmengine',
            work_dir=str(work_dir),
            # mmengine's own name is the second, so runs of one second would share a log.
            experiment_name=f'{Path(work_dir).name}_{next(_numbers)}',
            model=dict(type='ToyModel', broken=broken),
            train_dataloader=dict(
                batch_size=8,
                sampler=dict(type=sampler, shuffle=True),
                dataset=dict(type='ToyData'),
                **loader,
            ),
            train_cfg=loop,
            optim_wrapper=dict(
                type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1)
            ),
            param_scheduler=dict(
                type='CosineAnnealingLR',
                T_max=12,
                by_epoch=by_epoch,
                convert_to_iter_based=by_epoch,
            ),
            val_dataloader=dict(
                batch_size=3,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(type='ToyData', test_mode=True),
            ),
            val_cfg=dict(type='ValLoop'),
            val_evaluator=dict(type='ToyMetric'),
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook',
                    by_epoch=by_epoch,
                    interval=1 if by_epoch else 3,
                    max_keep_ckpts=1,
                ),
            ),
            custom_hooks=[dict(type='LossesHook')],
            visualizer=None,
            log_level='WARNING',
        )
    )


def losses(work_dir: Path, rank: int = 0) -> dict[int, tuple[str, ...]]:
    """Return what was written: by iteration, loss, learning rate and names; of the last attempt."""
    lines = (Path(work_dir) / f'losses{rank}').read_text().splitlines()
    return {int(line.split()[0]): tuple(line.split()[1:]) for line in lines}
