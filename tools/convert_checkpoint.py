"""Write the GFNet of a checkpoint to a clean file: `python tools/convert_checkpoint.py SRC DST`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('convert'))
