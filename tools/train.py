"""Train the model of a config: `python tools/train.py CONFIG`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('train'))
