"""Evaluate a checkpoint on the test data of a config: `python tools/test.py CONFIG CHECKPOINT`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('test'))
