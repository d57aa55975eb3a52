"""Export a trained model: `python tools/export.py CONFIG CHECKPOINT OUT.onnx --shape H W`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('export'))
