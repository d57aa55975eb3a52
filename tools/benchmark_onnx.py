"""Time exported filters in ONNX Runtime: `python tools/benchmark_onnx.py [--sizes 14x14x384]`.

What 'dense' becomes when it is exported, matrix products, beside the `DFT` operators that the
definition of the filter becomes. Needs onnx, onnxscript and onnxruntime.
"""

import argparse
import io
from collections.abc import Callable

import onnxruntime
import torch
from torch import Tensor

from gfnet_dense.benchmark import machine, measure, milliseconds, speedup
from gfnet_dense.models import GlobalFilter
from gfnet_dense.spectral.reference import reference_filter

SIZES = ['7x7x768', '14x14x384', '28x28x192', '56x56x96']


class PlainFilter(GlobalFilter):
    """The layer as everyone writes it."""

    def forward(self, x: Tensor) -> Tensor:
        """Filter a map of shape `(B, H, W, C)`."""
        return reference_filter(x, self.complex_weight)


def exported(layer: GlobalFilter, x: Tensor) -> Callable[[], object]:
    """Return what runs a layer, once exported, on a map."""
    program = torch.onnx.export(layer.eval(), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=['CPUExecutionProvider']
    )
    (name,) = (value.name for value in session.get_inputs())
    return lambda: session.run(None, {name: x.numpy()})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time exported filters in ONNX Runtime.')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--sizes', nargs='+', metavar='HxWxC', default=SIZES)
    parser.add_argument('--repeats', type=int, default=7, help='turns of each contender, 2 or more')
    parser.add_argument('--seconds', type=float, default=0.2, help='the least length of a turn')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    print(f'{machine("cpu")}; onnxruntime {onnxruntime.__version__}; float32, batch {args.batch}')
    print('Times as fast as the DFT operators: median of the turns (quartiles)\n')
    print('| H x W x C | DFT operators ms | dense ms | ratio |\n|---|---|---|---|')
    for size in args.sizes:
        height, width, channels = map(int, size.split('x'))
        x = torch.randn(args.batch, height, width, channels)
        layers = {'plain': PlainFilter, 'dense': GlobalFilter}
        tasks = {
            name: exported(layer(channels, (height, width)), x) for name, layer in layers.items()
        }
        times = measure(tasks, args.repeats, args.seconds, 'cpu')
        cells = [milliseconds(times, name) for name in layers]
        print(f'| {size} | {" | ".join(cells)} | {speedup(times, "dense", "plain")} |', flush=True)


if __name__ == '__main__':
    main()
