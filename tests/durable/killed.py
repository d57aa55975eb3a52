"""Kill a run on the digits at twenty moments and resume it each time.

killed.py FOLDER: the digits are in DIGITS_ROOT. Runs end by SIGKILL, in turn at a random moment
and in the middle of writing a checkpoint. Each run is a fork, so that nothing is imported twenty
times.
"""

import gc
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmseg.utils import register_all_modules
from toy import LossesHook, losses

from gfnet_dense.durable import latest_checkpoint
from gfnet_dense.openmmlab import find_config, train

MOMENTS, INTERVAL = 20, 3


def config(work_dir: Path, iterations: int) -> Config:
    """Return a segmentor of the digits, as small as it gets."""
    cfg = Config.fromfile(find_config('upernet_gfnet_nano_digits'))
    cfg.work_dir = str(work_dir)
    cfg.model.backbone.arch = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    cfg.model.decode_head.update(in_channels=[8] * 4, channels=8)
    cfg.model.auxiliary_head.update(in_channels=8, channels=8)
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.train_cfg.max_iters = iterations
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.update(interval=INTERVAL, max_keep_ckpts=1, save_best=None)
    cfg.custom_hooks = [dict(type='LossesHook')]
    cfg.log_level = 'WARNING'
    return cfg


def killed(work_dir: Path, iterations: int, while_writing: bool) -> None:
    """Train in a fork, and kill it while it writes a checkpoint or soon after some iteration."""
    resume = 'auto' if latest_checkpoint(work_dir) else None
    last, part = random.randint(1, 2 if while_writing else 6), random.random()
    news, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(news)
        numbers = itertools.count(1)

        def put(self: LocalBackend, obj: bytes, filepath: str) -> None:
            """Write a file; of the last one write a part, and wait for the end."""
            if next(numbers) < last:
                put_whole(self, obj, filepath)
                return
            Path(filepath).write_bytes(obj[: int(part * len(obj))])
            os.write(tell, b'.')
            signal.pause()

        def after_train_iter(self: LossesHook, *args: object, **kwargs: object) -> None:
            note(self, *args, **kwargs)
            if next(numbers) == last:
                os.write(tell, b'.')

        if while_writing:
            put_whole, LocalBackend.put = LocalBackend.put, put
        else:
            note, LossesHook.after_train_iter = LossesHook.after_train_iter, after_train_iter
        train(config(work_dir, iterations), seed=0 if resume is None else None, resume=resume)
        os._exit(0)
    os.close(tell)
    assert os.read(news, 1), 'ended by itself'
    if not while_writing:
        time.sleep(random.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), 'ended before it was killed'
    os.close(news)


def main(folder: Path) -> None:
    """Hold what the killed run leaves against a run that nobody touched."""
    torch.set_num_threads(1)
    register_all_modules()  # imports what the forks would import
    gc.freeze()  # mmengine collects garbage for every data set
    random.seed(0)
    run, whole = folder / 'run', folder / 'whole'
    halves = 0
    for moment in range(MOMENTS):
        killed(run, iterations=500, while_writing=moment % 2 == 1)
        halves += len([*run.glob('*.partial')])
        done, found = max(losses(run)), latest_checkpoint(run)
        saved = int(found.stem.split('_')[1]) if found else 0
        # The iteration after the last one written down may be complete, too.
        assert done - saved <= INTERVAL, f'{done} iterations, {saved} saved'
        print(f'moment {moment}: iteration {done}, saved {saved}', flush=True)
    assert halves >= MOMENTS // 2, f'only {halves} kills hit a file that was being written'

    end = max(losses(run)) + INTERVAL + 2
    train(config(run, end), resume='auto')
    train(config(whole, end), seed=0)
    assert losses(run) == losses(whole)
    ours, theirs = (
        torch.load(latest_checkpoint(path), weights_only=False) for path in (run, whole)
    )
    assert ours['meta']['iter'] == theirs['meta']['iter'] == end
    for key, value in theirs['state_dict'].items():
        assert torch.equal(ours['state_dict'][key], value), key
    assert len([*run.glob('*.pth')]) == 1 and not [*run.glob('*.partial')]
    print(f'{end} iterations, killed {MOMENTS} times, equal an undisturbed run')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
