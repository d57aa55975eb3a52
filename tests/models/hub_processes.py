"""Processes that want the same official weights: hub_processes.py together|takeover ADDRESS.

together: four of one process group load them. takeover: one is killed while it downloads them and
another one waits for it.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator

import torch

from gfnet_dense.models import GFNet, hub
from gfnet_dense.models.gfnet import ISOTROPIC, Architecture


def load() -> None:
    try:
        from gfnet_dense.openmmlab import GFNet as Backbone
    except ImportError:  # the core alone
        GFNet('nano', img_size=512, num_classes=0).load_pretrained('gfnet-nano')
    else:
        init_cfg = dict(type='Pretrained', checkpoint='gfnet-nano')
        Backbone('nano', img_size=512, init_cfg=init_cfg).init_weights()
    print('loaded by a process\n', end='', flush=True)


def load_in_group(rank: int) -> None:
    store = f'file://{os.environ["TORCH_HOME"]}.store'
    torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=4)
    torch.distributed.barrier()
    load()
    torch.distributed.destroy_process_group()


def together() -> None:
    workers = [processes.Process(target=load_in_group, args=(rank,)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def takeover() -> None:
    downloading, waiting = processes.Event(), processes.Event()
    read = hub._read

    def read_and_tell(*args: str) -> Iterator[bytes]:
        for piece in read(*args):
            yield piece
            downloading.set()

    def notice(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith('waiting for another process'):
            waiting.set()
        return True

    hub._read = read_and_tell
    hub._logger.addFilter(notice)
    hub._logger.setLevel(logging.INFO)
    first, second = processes.Process(target=load), processes.Process(target=load)
    first.start()
    assert downloading.wait(60)
    second.start()
    assert waiting.wait(60)
    first.kill()
    second.join()
    assert second.exitcode == 0


if __name__ == '__main__':
    mode, address = sys.argv[1:]
    hub.ADDRESSES = tuple(f'{address}/{place}/{{}}' for place in ('first', 'second'))
    hub.OFFICIAL_WEIGHTS['gfnet-nano'] = 'one', 'two'
    ISOTROPIC['nano'] = Architecture(embed_dims=8, depths=2, patch_size=16)
    processes = multiprocessing.get_context('fork')  # they need not import everything again
    {'together': together, 'takeover': takeover}[mode]()
