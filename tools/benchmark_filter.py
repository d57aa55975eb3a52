"""Time the backends of the global filter against the operator as its definition reads.

    python tools/benchmark_filter.py [--sizes 14x14x384 28x28x192]
    python tools/benchmark_filter.py --against FOLDER ...
    python tools/benchmark_filter.py --device cuda --all

Contenders take turns, so that whatever else the machine does meets all of them. Each figure is the
median over the turns of the time of the baseline divided by that of the contender in the same
turn, with the spread between the quartiles: above 1 the contender is the faster one. The first,
'contiguous', is the baseline and the copy that it leaves to whatever follows: its result lies in
memory channel by channel, where that of a backend lies as the map does. With --against, the filters
of other checkouts of this repository take turns, too: what a change gained.

On a GPU the turns replay CUDA graphs, which leaves out the time to launch kernels, and every ratio
has two figures beside it: the memory that the operator cannot but move, over the time, in per cent
of what a copy on the same device reaches; and the most memory that a run took beyond its inputs.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gfnet_dense.benchmark import Times, machine, measure, milliseconds, speedup
from gfnet_dense.models import GFNetPyramid, GlobalFilter
from gfnet_dense.spectral import BACKENDS, global_filter, unsupported_reason
from gfnet_dense.spectral.reference import reference_filter

Size = tuple[int, int, int]
Operator = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[], object]

# The stages of GFNet-H-S at 224, then larger maps of dense prediction.
SIZES = ['7x7x768', '14x14x384', '28x28x192', '56x56x96', '64x64x192', '128x128x96', '100x168x192']
SWEEP = [f'{n}x{n}x96' for n in (*range(4, 33), *range(36, 68, 4), *range(72, 201, 16), 199, 200)]

# The stages at 512, and some of every class of sizes: each compiles kernels of its own.
GPU_SIZES = ['128x128x96', '64x64x192', '32x32x384', '16x16x768']
GPU_SWEEP = ['7x7x768', '14x14x384', '25x42x384', '28x28x192', '50x84x192', '56x56x96']
GPU_SWEEP += ['67x67x96', '100x168x96', '200x200x96', '200x334x96']


def filter_of(checkout: Path) -> Operator:
    """Return the filter of another checkout, as its 'auto' computes it."""
    package = checkout / 'gfnet_dense' / 'spectral'
    name = f'spectral_of_{checkout.resolve().name}'
    spec = importlib.util.spec_from_file_location(name, package / '__init__.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.global_filter


def contenders(x: Tensor) -> dict[str, Operator]:
    """Return the operators by name, those that maps like `x` are for."""

    def by(backend: str) -> Operator:
        return lambda x, weight: global_filter(x, weight, backend)

    names = [name for name in BACKENDS if unsupported_reason(x, name) is None]
    return {
        'baseline': reference_filter,
        'contiguous': lambda x, weight: reference_filter(x, weight).contiguous(),
        **{name: by(name) for name in names},
    }


def task(operator: Operator, x: Tensor, weight: Tensor, backward: bool) -> Run:
    if backward:
        x, weight = (t.detach().requires_grad_() for t in (x, weight))
        g = torch.randn_like(x)
        return lambda: torch.autograd.grad(operator(x, weight), (x, weight), g)
    return torch.no_grad()(lambda: operator(x, weight))


def training_steps(names: list[str], device: str) -> dict[str, Run]:
    """Return training steps of GFNet-H-S, batch 16 of 512 x 512 pixels, under autocast."""
    images = torch.randn(16, 3, 512, 512, device=device)
    model = GFNetPyramid('h-s', img_size=512, drop_path_rate=0.0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    layers = [layer for layer in model.modules() if isinstance(layer, GlobalFilter)]

    def step(name: str) -> None:
        for layer in layers:
            if name == 'baseline':
                layer.forward = lambda x, layer=layer: reference_filter(x, layer.complex_weight)
            else:
                layer.__dict__.pop('forward', None)
                layer.backend = name
        with torch.autocast('cuda', torch.bfloat16):
            loss = sum(y.float().square().mean() for y in model(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {name: lambda name=name: step(name) for name in names}


def captured(run: Run) -> Run:
    """Return what replays a run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # plans, matrices, kernels that are compiled and tuned
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak(run: Run, device: str) -> float:
    """Return the most memory that a run takes on a GPU beyond what is there, in MB."""
    run()  # what is kept from run to run
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def moved(x: Tensor, weight: Tensor, backward: bool) -> int:
    """Return the bytes that have to be moved: x, weight and y; also g, x, weight and gradients."""
    forward = 2 * x.nbytes + weight.nbytes
    return forward + 3 * x.nbytes + 2 * weight.nbytes if backward else forward


def copy_rate(device: str) -> float:
    """Return the bytes a second that copying on a GPU reads and writes."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure({'copy': lambda: target.copy_(source)}, 9, 0.05, device)
    return 2 * source.nbytes / statistics.median(times['copy'])


def parse_size(text: str) -> Size:
    height, width, channels = map(int, text.split('x'))
    return height, width, channels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time the backends of the global filter.')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--dtype',
        choices=['float64', 'float32', 'bfloat16', 'float16'],
        help='default: float32, on a GPU bfloat16',
    )
    parser.add_argument('--batch', type=int, help='default: 8, on a GPU 16')
    parser.add_argument(
        '--sizes',
        nargs='+',
        metavar='HxWxC',
        help='default: the stages of GFNet-H-S at 224 and larger ones; on a GPU those at 512',
    )
    parser.add_argument(
        '--all',
        action='store_true',
        help='add sizes up to 200 cells a side, and on a GPU training steps of GFNet-H-S',
    )
    parser.add_argument(
        '--against',
        nargs='+',
        type=Path,
        default=[],
        metavar='FOLDER',
        help='other checkouts of this repository, whose filters take part',
    )
    parser.add_argument('--repeats', type=int, default=9, help='turns of each contender, 2 or more')
    parser.add_argument('--seconds', type=float, default=0.05, help='the least length of a turn')
    args = parser.parse_args()
    on_gpu = args.device.startswith('cuda')
    args.dtype = args.dtype or ('bfloat16' if on_gpu else 'float32')
    args.batch = args.batch or (16 if on_gpu else 8)
    args.sizes = args.sizes or (GPU_SIZES if on_gpu else SIZES)
    return args


def print_row(label: str, times: Times, details: dict[str, str]) -> None:
    first, *others = times
    cells = [milliseconds(times, first), *(speedup(times, name, first) for name in others)]
    cells = [cell + details.get(name, '') for cell, name in zip(cells, times, strict=True)]
    print(f'| {label} |', ' | '.join(cells), '|', flush=True)


def main() -> None:
    args = parse_args()
    device, on_gpu = args.device, args.device.startswith('cuda')
    dtype = getattr(torch, args.dtype)
    operators = contenders(torch.empty(1, 1, 1, 1, device=device, dtype=dtype))
    operators |= {folder.resolve().name: filter_of(folder) for folder in args.against}
    print(f'{machine(device)}; {args.dtype}, batch {args.batch}')
    print('Times as fast as the baseline: median of the turns (quartiles)')
    if on_gpu:
        torch.cuda.set_device(device)
        rate = copy_rate(device)
        print(f'Then per cent of the rate of a copy, {rate / 1e9:.0f} GB/s, and peak memory in MB')
    names = ' | '.join(list(operators)[1:])
    print('\n| H x W x C | pass | baseline ms |', names, '|')
    print('|---|---|---|' + '---|' * (len(operators) - 1))
    for size in args.sizes + ((GPU_SWEEP if on_gpu else SWEEP) if args.all else []):
        height, width, channels = parse_size(size)
        x = torch.randn(args.batch, height, width, channels, device=device).to(dtype)
        weight = torch.randn(height, width // 2 + 1, channels, 2, device=device)
        for backward in (False, True):
            tasks = {name: task(f, x, weight, backward) for name, f in operators.items()}
            details = {}
            if on_gpu:
                peaks = {name: peak(run, device) for name, run in tasks.items()}
                tasks = {name: captured(run) for name, run in tasks.items()}
            times = measure(tasks, args.repeats, args.seconds, device)
            if on_gpu:
                for name in tasks:
                    reached = moved(x, weight, backward) / statistics.median(times[name])
                    details[name] = f', {100 * reached / rate:.0f} %, {peaks[name]:.0f}'
            label = 'forward + backward' if backward else 'forward'
            print_row(f'{size} | {label}', times, details)
    if on_gpu and args.all:
        steps = training_steps(list(operators), device)
        details = {name: f', {peak(step, device):.0f} MB' for name, step in steps.items()}
        times = measure(steps, args.repeats, args.seconds, device)
        print_row('GFNet-H-S, 16 x 512 x 512, bfloat16 | training step', times, details)


if __name__ == '__main__':
    main()
