"""Evaluate a checkpoint on the test data of a config: `python tools/test.py CONFIG CHECKPOINT`."""

import argparse
import os

from mmengine.config import DictAction

from gfnet_dense.openmmlab import evaluate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Evaluate a checkpoint.')
    parser.add_argument('config', help="path of a config, or the name of one of gfnet_dense's")
    parser.add_argument('checkpoint', help='the weights to evaluate')
    parser.add_argument('--work-dir', help='folder for the log')
    parser.add_argument(
        '--out',
        help='a .pkl file for all predictions, or a folder for predicted label maps as PNG',
    )
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument(
        '--tta', action='store_true', help='average over scales and flips of the image'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='values to change in the config',
    )
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    del args.local_rank
    return args


if __name__ == '__main__':
    evaluate(**vars(parse_args()))
