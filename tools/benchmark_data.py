"""Time the training data of a config beside the training step that consumes it.

    python tools/benchmark_data.py gfnet_h_s_imagenet [--batches 50]

Both are measured alone, for one process, in images per second: loading that is the slower one holds
training up. More workers (`--cfg-options train_dataloader.num_workers=16`) or faster disks help.
"""

import argparse
import copy
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from gfnet_dense.durable import DurableRunner
from gfnet_dense.openmmlab import find_config

WARM_UP_STEPS = 3


def build_runner(config: str, options: dict[str, Any], work_dir: str) -> Runner:
    cfg = Config.fromfile(find_config(config))
    cfg.merge_from_dict(options)
    cfg.work_dir = work_dir
    cfg.log_level = 'WARNING'
    return DurableRunner.from_cfg(cfg)


def endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def loading_rate(loader: DataLoader, batches: int) -> float:
    """Return images per second of the loader."""
    stream = endless(loader)
    # Until workers run and what they had loaded in advance is consumed.
    in_advance = loader.num_workers * (loader.prefetch_factor or 0)
    for _ in itertools.islice(stream, in_advance + 1):
        pass
    start = time.perf_counter()
    images = sum(len(batch['inputs']) for batch in itertools.islice(stream, batches))
    return images / (time.perf_counter() - start)


def training_rate(runner: Runner, batch: Any, steps: int) -> float:
    """Return images per second of the training step, on a batch that is there."""
    optimizer = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    runner.model.train()
    seconds = 0.0
    for step in range(WARM_UP_STEPS + steps):
        data = copy.deepcopy(batch)  # some models change it
        start = time.perf_counter()
        runner.model.train_step(data, optimizer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step >= WARM_UP_STEPS:
            seconds += time.perf_counter() - start
    return steps * len(batch['inputs']) / seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Time the training data of a config beside the training step.'
    )
    parser.add_argument('config', help="path of a config, or the name of one of gfnet_dense's")
    parser.add_argument('--batches', type=int, default=50, help='how many to load and time')
    parser.add_argument('--steps', type=int, default=20, help='how many training steps to time')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='values to change in the config',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with TemporaryDirectory() as work_dir:
        runner = build_runner(args.config, args.cfg_options, work_dir)
        loader = runner.train_dataloader
        device = next(runner.model.parameters()).device
        where = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
        batch = next(iter(loader))
        print(
            f'{Path(args.config).stem}: batches of {len(batch["inputs"])}, {loader.num_workers} '
            f'workers, {os.cpu_count()} cores; {where}, {torch.get_num_threads()} threads'
        )
        loading = loading_rate(loader, args.batches)
        print(f'data alone           {loading:9.1f} images/s', flush=True)
        training = training_rate(runner, batch, args.steps)
        print(f'training step alone  {training:9.1f} images/s')
        print(f'The data is {loading / training:.2f} times as fast as the training step.')


if __name__ == '__main__':
    main()
