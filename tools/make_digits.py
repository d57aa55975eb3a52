"""Write the embedded data set, digits on photographs, in the layouts of ADE20K and COCO.

With --scans, write the digits alone, as an image folder for classification. A folder that already
holds the data with the same parameters is left unchanged.
"""

import argparse
from pathlib import Path

from gfnet_dense.demo import preview_digits, write_digit_scans, write_digits

SCENES = Path('data/digits')
SCANS = Path('data/digit_scans')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        'root',
        nargs='?',
        type=Path,
        default=SCENES,
        help=f'folder to write; with --scans the default is {SCANS}',
    )
    parser.add_argument(
        '--scans', action='store_true', help='write the scans alone; allows no other option'
    )
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
    parser.add_argument(
        '--seed', type=int, default=0, metavar='N', help='seed of the random numbers'
    )
    parser.add_argument('--preview', type=Path, metavar='PNG', help='also draw the first scenes')
    args = vars(parser.parse_args())

    root, scans = args.pop('root'), args.pop('scans')
    if scans and (given := [name for name in args if args[name] != parser.get_default(name)]):
        parser.error(f'--{given[0].replace("_", "-")} is for scenes: leave it, or --scans')
    if scans and root == SCENES:
        root = SCANS
    preview = args.pop('preview')
    try:
        if scans:
            write_digit_scans(root)
            print(f'{root}: {len(list(root.glob("*/*/*.png")))} scans in train/ and val/')
            return
        write_digits(root, **args)
        print(
            f'{root}: {args["num_training"]} training and {args["num_validation"]} validation '
            f'scenes of {args["image_size"]}x{args["image_size"]} pixels'
        )
        if preview:
            print(f'{preview_digits(root, preview)}: the first scenes, with their labels')
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
