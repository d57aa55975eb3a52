"""Train the model of a config: `python tools/train.py CONFIG`."""

import argparse
import os

from mmengine.config import DictAction

from gfnet_dense.openmmlab import train


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train the model of a config.')
    parser.add_argument('config', help="path of a config, or the name of one of gfnet_dense's")
    parser.add_argument('--work-dir', help='folder for checkpoints and logs')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint, by default the latest of the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=('float16', 'bfloat16'),
        help='train with automatic mixed precision, by default in float16',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the total batch over the one it is made for',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        dest='compiled',
        help='run the backbone through torch.compile, which takes minutes to begin with',
    )
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='values to change in the config, for example train_dataloader.batch_size=4',
    )
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    # torchrun may hand the rank over as an argument; mmengine reads it from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    del args.local_rank
    return args


if __name__ == '__main__':
    train(**vars(parse_args()))
