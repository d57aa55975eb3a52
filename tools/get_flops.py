"""Count the multiply-accumulates and parameters of a model: `python tools/get_flops.py NAME`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('flops'))
