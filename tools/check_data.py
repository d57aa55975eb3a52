"""Check the data of a config without training: `python tools/check_data.py CONFIG`."""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

from gfnet_dense.data import check_data, plot_reports
from gfnet_dense.openmmlab import find_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Check the data of a config.')
    parser.add_argument('config', help="path of a config, or the name of one of gfnet_dense's")
    parser.add_argument(
        '--plot', metavar='FILE.png', help='draw classes, sizes, boxes and samples with labels'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='values to change in the config',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = Config.fromfile(find_config(args.config))
    config.merge_from_dict(args.cfg_options or {})
    reports = check_data(config)
    print(*reports, sep='\n')
    if args.plot:
        print(f'pictures: {plot_reports(reports, Path(args.plot))}')
    faults = sum(len(report.faults) for report in reports)
    print(f'{faults} faults')
    sys.exit(min(faults, 1))


if __name__ == '__main__':
    main()
