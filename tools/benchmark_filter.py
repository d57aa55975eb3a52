"""Time the backends of the global filter against its definition.

    python tools/benchmark_filter.py [--sizes 14x14x384 28x28x192]
    python tools/benchmark_filter.py --against FOLDER ...
    python tools/benchmark_filter.py --device cuda --all

Contenders take turns, so that all of them share the noise of the machine. Each figure is the time
of the baseline over that of the contender in the same turn: median and quartiles over the turns.
Above 1 the contender is faster. The baseline leaves its result in memory channel by channel, where
backends leave theirs in the layout of the map; 'contiguous' is the baseline followed by the copy to
that layout. With --against, the filters of other checkouts of this repository take part.

Every ratio is followed by the least memory traffic of the operator over its time, in per cent of
the rate of a copy on the same device. On a GPU the turns replay CUDA graphs, which excludes the
time to launch kernels, and the peak memory of a run beyond its inputs comes last.
"""

import argparse
import importlib.util
import itertools
import re
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

# The stages of GFNet-H-S at 224, then larger maps for dense prediction.
SIZES = ['7x7x768', '14x14x384', '28x28x192', '56x56x96', '64x64x192', '128x128x96', '100x168x192']
SWEEP = [f'{n}x{n}x96' for n in (*range(4, 33), *range(36, 68, 4), *range(72, 201, 16), 199, 200)]

# The stages at 512, then sizes of every class, each of which compiles kernels of its own.
GPU_SIZES = ['128x128x96', '64x64x192', '32x32x384', '16x16x768']
GPU_SWEEP = ['7x7x768', '14x14x384', '25x42x384', '28x28x192', '50x84x192', '56x56x96']
GPU_SWEEP += ['67x67x96', '100x168x96', '200x200x96', '200x334x96']


def filter_of(checkout: Path) -> Operator:
    """Return the filter of another checkout, which runs its backend 'auto'."""
    package = checkout / 'gfnet_dense' / 'spectral'
    # A name of Python's, which becomes a part of the names of operators.
    name = re.sub(r'\W', '_', f'spectral_of_{checkout.resolve().name}')
    spec = importlib.util.spec_from_file_location(name, package / '__init__.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.global_filter


def contenders(x: Tensor) -> dict[str, Operator]:
    """Return the operators by name that support maps like `x`."""

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
    model = GFNetPyramid('h-s', img_size=512, num_classes=0).to(device)
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
            loss = model(images).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {name: lambda name=name: step(name) for name in names}


def captured(run: Run) -> Run:
    """Return a function that replays a run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm up: FFT plans, matrices, compiled kernels
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> object:
        graph.replay()
        return run  # which keeps what the graph reads

    return replay


def peak(run: Run, device: str) -> float:
    """Return the peak memory that a run allocates on a GPU, in MB."""
    run()  # fills caches
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def moved(x: Tensor, weight: Tensor, backward: bool) -> int:
    """Return the least bytes to move: x, weight and y; backward g, x, weight and gradients too."""
    forward = 2 * x.nbytes + weight.nbytes
    return forward + 3 * x.nbytes + 2 * weight.nbytes if backward else forward


def copy_rate(device: str) -> float:
    """Return the bytes per second that a copy of 256 MB reads and writes."""
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
    parser.add_argument('--batch', nargs='+', type=int, help='default: 8, on a GPU 16')
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
        help='other checkouts of this repository to compare with',
    )
    parser.add_argument('--repeats', type=int, default=9, help='number of turns, at least 2')
    parser.add_argument('--seconds', type=float, default=0.05, help='shortest length of a turn')
    args = parser.parse_args()
    on_gpu = args.device.startswith('cuda')
    args.dtype = args.dtype or ('bfloat16' if on_gpu else 'float32')
    args.batch = args.batch or [16 if on_gpu else 8]
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
    print(f'{machine(device)}; {args.dtype}')
    if on_gpu:
        torch.cuda.set_device(device)
    rate = copy_rate(device)
    print('Speed relative to the baseline: median over the turns (quartiles)')
    memory = ', and peak memory in MB' if on_gpu else ''
    print(f'Then per cent of the rate of a copy ({rate / 1e9:.0f} GB/s){memory}')
    names = ' | '.join(list(operators)[1:])
    print('\n| B x H x W x C | pass | baseline ms |', names, '|')
    print('|---|---|---|' + '---|' * (len(operators) - 1))
    sizes = args.sizes + ((GPU_SWEEP if on_gpu else SWEEP) if args.all else [])
    for batch, size in itertools.product(args.batch, sizes):
        height, width, channels = parse_size(size)
        x = torch.randn(batch, height, width, channels, device=device).to(dtype)
        weight = torch.randn(height, width // 2 + 1, channels, 2, device=device)
        for backward in (False, True):
            tasks = {name: task(f, x, weight, backward) for name, f in operators.items()}
            peaks = {}
            if on_gpu:
                peaks = {name: f', {peak(run, device):.0f}' for name, run in tasks.items()}
                tasks = {name: captured(run) for name, run in tasks.items()}
            times = measure(tasks, args.repeats, args.seconds, device)
            details = {}
            for name in tasks:
                reached = moved(x, weight, backward) / statistics.median(times[name])
                details[name] = f', {100 * reached / rate:.0f} %{peaks.get(name, "")}'
            label = 'forward + backward' if backward else 'forward'
            print_row(f'{batch}x{size} | {label}', times, details)
    if on_gpu and args.all:
        steps = training_steps(list(operators), device)
        details = {name: f', {peak(step, device):.0f} MB' for name, step in steps.items()}
        times = measure(steps, args.repeats, args.seconds, device)
        print_row('GFNet-H-S, 16 x 512 x 512, bfloat16 | training step', times, details)


if __name__ == '__main__':
    main()
