"""Count the multiply-accumulates and parameters of a model: `python tools/get_flops.py NAME`.

NAME is a config, or a timm model such as gfnet_h_s.
"""

import argparse

from gfnet_dense.openmmlab import measure_complexity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Count the multiply-accumulates of a model.')
    parser.add_argument(
        'name', help="path of a config, name of one of gfnet_dense's, or name of a timm model"
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image, by default the one that the parameters are made for, '
        '800 1280 for detectors',
    )
    return parser.parse_args()


if __name__ == '__main__':
    print(measure_complexity(**vars(parse_args())))
