"""Check the data of a config without training: `python tools/check_data.py CONFIG`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('check-data'))
