"""Write the GFNet of a checkpoint to a clean file: `python tools/convert_checkpoint.py SRC DST`."""

import argparse

from gfnet_dense.models.convert import convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Write the GFNet of a checkpoint to a file of its own, after a forward pass.'
    )
    parser.add_argument(
        'src',
        help="an official file or its name, for example gfnet-h-s, or this project's checkpoint of "
        'a classifier, segmentor or detector',
    )
    parser.add_argument('dst', help='the file to write; a name in .safetensors makes it one')
    parser.add_argument('--force', action='store_true', help='overwrite DST where it exists')
    args = parser.parse_args()
    try:
        print(f'{args.dst}: {convert_checkpoint(args.src, args.dst, overwrite=args.force)}')
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
