"""Export a trained model and prove it equal: `python tools/export.py CONFIG CHECKPOINT OUT`."""

import argparse

from gfnet_dense.inference.export import export


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Export a trained model to one file and compare the file with PyTorch.',
        epilog='python tools/export.py fpn_gfnet_h_s_ade20k latest.pth model.onnx --shape 512 512',
    )
    parser.add_argument('config', help="path of a config, or the name of one of gfnet_dense's")
    parser.add_argument('checkpoint', help='the weights to export')
    parser.add_argument('out', help='the file, ending in .onnx or .pt2')
    parser.add_argument(
        '--shape',
        dest='shapes',
        nargs=2,
        type=int,
        action='append',
        required=True,
        metavar=('H', 'W'),
        help='size of the images in pixels; several times for a file of each size',
    )
    parser.add_argument(
        '--batch',
        type=lambda text: None if text == 'dynamic' else int(text),
        default=1,
        metavar='N|dynamic',
        help='images of a call, by default 1',
    )
    outputs = parser.add_mutually_exclusive_group()
    precisions = parser.add_mutually_exclusive_group()
    for group, name, option, value, text in (
        (outputs, 'output', '--raw', 'raw', 'what the last layer computes, not resized'),
        (outputs, 'output', '--labels', 'labels', 'indices of classes in place of logits'),
        (outputs, 'output', '--features', 'features', 'the maps of the backbone alone'),
        (precisions, 'precision', '--half', 'float16', 'weights in float16'),
        (precisions, 'precision', '--int8', 'int8', 'convolutions and linear layers in int8'),
    ):
        group.add_argument(option, action='store_const', dest=name, const=value, help=text)
    parser.set_defaults(output='logits', precision='float32')
    parser.add_argument(
        '--images',
        nargs='+',
        default=(),
        help="images to compare on, by default the config's test images, else a photograph",
    )
    parser.add_argument(
        '--num-images', type=int, default=8, help='how many test images, by default 8'
    )
    return parser.parse_args()


if __name__ == '__main__':
    print(*export(**vars(parse_args())), sep='\n')
