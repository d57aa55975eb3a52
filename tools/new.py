"""Write a config for your own data: `python tools/new.py NAME --images DIR --masks DIR`."""

import sys

from gfnet_dense.cli import main

if __name__ == '__main__':
    sys.exit(main('new'))
