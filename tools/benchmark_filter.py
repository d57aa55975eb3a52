"""Time the backends of the global filter against the operator as its definition reads.

    python tools/benchmark_filter.py [--sizes 14x14x384 28x28x192] [--device cuda --dtype bfloat16]

Contenders take turns, so that whatever else the machine does meets all of them. Each figure is the
median over the turns of the time of the baseline divided by that of the contender in the same
turn, with the spread between the quartiles: above 1 the contender is the faster one.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gfnet_dense.spectral import BACKENDS, global_filter

Size = tuple[int, int, int]
Operator = Callable[[Tensor, Tensor], Tensor]

# The stages of GFNet-H-S at 224, then larger maps of dense prediction.
SIZES = ['7x7x768', '14x14x384', '28x28x192', '56x56x96', '64x64x192', '128x128x96', '100x168x192']
SWEEP = [f'{n}x{n}x96' for n in (*range(4, 33), *range(36, 68, 4), *range(72, 201, 16), 199, 200)]


def baseline(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the operator by its definition, with the gradients that autograd finds for it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft2(x.to(dtype), dim=(1, 2), norm='ortho')
    spectrum = spectrum * torch.view_as_complex(weight)
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm='ortho').to(x.dtype)


def contenders() -> dict[str, Operator]:
    def by(backend: str) -> Operator:
        return lambda x, weight: global_filter(x, weight, backend)

    return {'baseline': baseline, **{backend: by(backend) for backend in BACKENDS}}


def task(operator: Operator, x: Tensor, weight: Tensor, backward: bool) -> Callable[[], object]:
    if backward:
        x, weight = (t.detach().requires_grad_() for t in (x, weight))
        g = torch.randn_like(x)
        return lambda: torch.autograd.grad(operator(x, weight), (x, weight), g)
    return torch.no_grad()(lambda: operator(x, weight))


def seconds(run: Callable[[], object], count: int, device: str) -> float:
    """Return the time of one run, the mean of `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def measure(
    tasks: dict[str, Callable[[], object]], repeats: int, least: float, device: str
) -> dict[str, list[float]]:
    """Time all tasks in `repeats` turns each, of `least` seconds or one run, what is longer."""
    counts = {}
    for name, run in tasks.items():
        seconds(run, 1, device)  # plans, matrices, memory
        counts[name] = max(1, round(least / seconds(run, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, run in tasks.items():
            times[name].append(seconds(run, counts[name], device))
    return times


def ratio(times: dict[str, list[float]], name: str) -> str:
    ratios = [b / t for b, t in zip(times['baseline'], times[name], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return f'{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})'


def machine(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return f'{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads'


def parse_size(text: str) -> Size:
    height, width, channels = map(int, text.split('x'))
    return height, width, channels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time the backends of the global filter.')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--dtype', default='float32', choices=['float64', 'float32', 'bfloat16', 'float16']
    )
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--sizes', nargs='+', default=SIZES, metavar='HxWxC')
    parser.add_argument(
        '--all', action='store_true', help='add a sweep of square maps from 4 to 200 cells a side'
    )
    parser.add_argument('--repeats', type=int, default=9, help='turns of each contender, 2 or more')
    parser.add_argument('--seconds', type=float, default=0.05, help='the least length of a turn')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    print(f'{machine(args.device)}; torch {torch.__version__}; {args.dtype}, batch {args.batch}')
    print('Times as fast as the baseline: median of the turns (quartiles)\n')
    names = list(contenders())[1:]
    print('| H x W x C | pass | baseline ms |', ' | '.join(names), '|')
    print('|---|---|---|' + '---|' * len(names))
    for size in args.sizes + (SWEEP if args.all else []):
        height, width, channels = parse_size(size)
        x = torch.randn(args.batch, height, width, channels, device=args.device)
        x = x.to(getattr(torch, args.dtype))
        weight = torch.randn(height, width // 2 + 1, channels, 2, device=args.device)
        for backward in (False, True):
            tasks = {name: task(f, x, weight, backward) for name, f in contenders().items()}
            times = measure(tasks, args.repeats, args.seconds, args.device)
            label = 'forward + backward' if backward else 'forward'
            milliseconds = 1000 * statistics.median(times['baseline'])
            ratios = ' | '.join(ratio(times, name) for name in names)
            print(f'| {size} | {label} | {milliseconds:.2f} | {ratios} |', flush=True)


if __name__ == '__main__':
    main()
