"""Predict from images and videos: `python tools/predict.py CONFIG CHECKPOINT INPUT --out DIR`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('predict'))
