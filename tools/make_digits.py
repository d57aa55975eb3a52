"""Write the embedded data set: handwritten digits on photographs, laid out as ADE20K and COCO.

A folder that holds it already, with the same parameters, is left as it is.
"""

import argparse
from pathlib import Path

from gfnet_dense.data import preview_digits, write_digits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('root', nargs='?', type=Path, default=Path('data/digits'), help='folder')
    parser.add_argument(
        '--num-training', type=int, default=3000, metavar='N', help='training scenes'
    )
    parser.add_argument(
        '--num-validation', type=int, default=500, metavar='N', help='validation scenes'
    )
    parser.add_argument(
        '--image-size', type=int, default=64, metavar='N', help='height and width in pixels'
    )
    parser.add_argument(
        '--digits-per-image',
        type=int,
        nargs=2,
        default=(1, 2),
        metavar=('LO', 'HI'),
        help='fewest and most digits in a scene',
    )
    parser.add_argument(
        '--digit-height',
        type=int,
        nargs=2,
        default=(26, 46),
        metavar=('LO', 'HI'),
        help='lowest and highest digit in pixels',
    )
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed of the scenes')
    parser.add_argument('--preview', type=Path, metavar='PNG', help='picture of the first scenes')
    args = vars(parser.parse_args())

    root, preview = args.pop('root'), args.pop('preview')
    try:
        write_digits(root, **args)
        print(
            f'{root}: {args["num_training"]} training and {args["num_validation"]} validation '
            f'scenes of {args["image_size"]}x{args["image_size"]} pixels'
        )
        if preview:
            print(f'{preview_digits(root, preview)}: the first of them, with their labels')
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
