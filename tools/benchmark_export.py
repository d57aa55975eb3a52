"""Time exported classifiers: `python tools/benchmark_export.py [--models gfnet_h_s]`.

GFNet-H-S beside timm's ConvNeXt-T and Swin-T, in every precision that `gfnet export` has. Weights
are random, so differences from PyTorch say nothing about accuracy. Needs the extra `export`;
OpenVINO is timed where it is installed.
"""

import argparse

import numpy as np
import timm
import torch

import gfnet_dense  # noqa: F401  registers gfnet_h_s
from gfnet_dense.benchmark import machine
from gfnet_dense.inference.export import PRECISIONS
from gfnet_dense.inference.export.formats import quantized, runs_of, to_onnx
from gfnet_dense.inference.export.networks import Deployed
from gfnet_dense.inference.export.proof import Bound, photographs, prove, resized

MODELS = ['gfnet_h_s', 'convnext_tiny', 'swin_tiny_patch4_window7_224']


def classifier(name: str) -> Deployed:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, value in model.named_parameters():
        if key.endswith('gamma'):  # LayerScales, so small that blocks would compute nothing
            value.data.fill_(0.5)
    mean, std = ([255 * value for value in model.pretrained_cfg[key]] for key in ('mean', 'std'))
    return Deployed(model, lambda model, x, shape: (model(x),), ('logits',), mean, std).eval()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time exported classifiers.')
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--size', type=int, default=224)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    shape = args.size, args.size
    samples = photographs(8)
    images = [np.stack([resized(sample.image, shape)] * args.batch) for sample in samples]
    print(f'{machine("cpu")}; batch {args.batch}, {shape[0]}x{shape[1]} pixels\n')
    print('| model | precision | MB | runtime | ms | PyTorch ms | largest difference |')
    print('|---|---|---|---|---|---|---|')
    for name in args.models:
        reference = classifier(name)
        for precision in args.precisions:
            deployed = reference.fixed(shape, half=precision == 'float16')
            content = to_onnx(deployed, torch.from_numpy(images[0]), False, {})
            if precision == 'int8':
                content = quantized(content, images)
            runs, failures = runs_of(content, '.onnx')
            everything = Bound(float('inf'), 0.0)
            pytorch, *others = prove(reference, runs, samples, shape, args.batch, everything)
            for other in others:
                cells = (
                    name,
                    precision,
                    f'{len(content) / 1e6:.0f}',
                    other.runtime,
                    f'{other.milliseconds:.1f}',
                    f'{pytorch.milliseconds:.1f}',
                    f'{100 * other.difference("logits"):.2g}%',
                )
                print(f'| {" | ".join(cells)} |', flush=True)
            for runtime in failures:
                print(f'| {name} | {precision} | | {runtime} | cannot run it | | |', flush=True)


if __name__ == '__main__':
    main()
