"""Check and measure everything on an NVIDIA GPU: `python tools/gpu_report.py --out DIR`.

    python tools/gpu_report.py --out DIR --part 2 --minutes 5
    python tools/gpu_report.py --out DIR --part 3 --minutes 9 --only '512 |' --only compiled
    python tools/gpu_report.py --out DIR --render > tables.md

Part 1 checks the backends of the filter against float64, part 2 times them, part 3 times backbones,
part 4 trains segmentors through tools/train.py. The first three need torch and timm alone.
It runs from a checkout, whose tests hold the oracle.

Every row is appended to DIR/results.jsonl as soon as it is measured. A row that fails keeps its
error, and the run goes on. Rows that DIR holds already are not measured again, so the same command
continues a run that was cut off. --rehearse runs everything on a CPU, in tiny sizes; its emulation
of a GPU needs g++.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import benchmark_filter as bench  # noqa: E402
import filter_oracle as oracle  # noqa: E402
from benchmark_model import inference, official, training_step  # noqa: E402

from gfnet_dense.benchmark import machine, measure, speedup  # noqa: E402
from gfnet_dense.models import GFNetPyramid, cuda, fused_block  # noqa: E402
from gfnet_dense.models.gfnet import Block  # noqa: E402
from gfnet_dense.spectral import global_filter, unsupported_reason  # noqa: E402

Cell = dict[str, Any]  # figures by unit, or the text of an error under 'failed'
Run = Callable[[], object]

MINUTES = {1: 2.0, 2: 2.0, 3: 3.0, 4: 4.0}
GRACE = 30.0  # seconds after the minutes of a part until it is ended
BROKEN = 3  # exit status of a part whose CUDA context is lost

COCO_SIZES = ['200x334x96', '100x168x192', '50x84x384']
STAGES_224 = ['56x56x96', '28x28x192', '14x14x384', '7x7x768']
ITERATIONS = 40  # of a training

# The operators of a training step, by what they belong to; the first pattern that fits counts.
SHARES = {
    'kernels of blocks': r'FusedBlock',
    'filter': r'fft|gfnet_dense|Filter|aten::bmm',
    'norms': r'norm',
    'residuals': r'addcmul',
    'MLP': r'aten::(addmm|mm|gelu)',
    'copies': r'aten::(copy_|clone|cat)',
    'optimizer': r'foreach|adam',
    'other': r'',
}

# Tables: the title, and what the lines are labelled with.
CORRECT = ('Largest error, in units of the largest value of float64', 'H x W x C | dtype | mode')
BLOCKS = ('The same of a block of the network, all gradients', 'H x W x C | dtype')
FILTER = ('The filter, batch 16', 'H x W x C | dtype | pass | launch')
BLOCK_TIMES = ('A block and its parts, bfloat16, batch 16', 'H x W x C | part | pass | launch')
BACKBONES = ('Backbones, bfloat16 autocast', 'side | batch | pass | mode')
PROFILE = ('Shares of a training step, bfloat16 autocast', 'backbone')
PRODUCT = ('UperNet on generated images, through tools/train.py', 'run')


class Row(NamedTuple):
    """A measurement: the table, the line and the columns of its cells, and what fills them."""

    table: tuple[str, str]
    label: str
    columns: tuple[str, ...]
    measure: Callable[[], dict[str, Cell]]


class Setting(NamedTuple):
    """Where rows are measured, and how long."""

    device: str
    turns: int
    seconds: float
    compiler: str
    rehearse: bool


GPU = Setting('cuda', 7, 0.02, 'inductor', False)
CPU = Setting('cpu', 2, 0.0, 'aot_eager', True)

# An option of timm: under autocast layer norms take and return 16 bits, and round their parameters.
# Compilers fuse the casts around the others.
FAST_NORM = ', fast norm'

PASSES = {'training step': training_step, 'inference': inference}


# Part 1: correct


def correctness(at: Setting) -> Iterator[Row]:
    """Check all backends for eager and replayed runs, then compiled ones for some sizes."""
    dtypes = ['bfloat16', 'float16', 'float32']
    sizes = [*bench.GPU_SIZES, *bench.GPU_SWEEP, '13x9x40', '65x63x3']
    some = ['64x64x192', '14x14x384', '100x168x96']
    if at.rehearse:
        sizes, some = ['3x2x2'], ['3x2x2']
    for mode, few in (('eager', sizes), ('compiled', some)):
        if mode == 'compiled':
            yield from blocks_correctness(at, dtypes)
        for dtype, size in itertools.product(dtypes, few):
            for backend in ('fused', 'dense', 'fft')[dtype == 'float32' :]:
                run = functools.partial(check, at, backend, dtype, size, mode)
                yield Row(CORRECT, f'{size} | {dtype} | {mode}', (backend,), run)


def blocks_correctness(at: Setting, dtypes: list[str]) -> Iterator[Row]:
    """Check blocks as one function, with the kernels of norms and residual."""
    sizes = ['3x2x4'] if at.rehearse else ['56x56x96', '33x21x192', '7x7x768', '9x8x1000']
    for dtype, size in itertools.product(dtypes, sizes):
        if at.rehearse and dtype == 'float16':  # which needs a GPU
            continue
        run = functools.partial(check_block, at, dtype, size)
        yield Row(BLOCKS, f'{size} | {dtype}', ('block',), run)


@functools.lru_cache(maxsize=1)
def case_of(size: str, dtype: torch.dtype, device: str) -> tuple[oracle.Case, list[Tensor]]:
    """Return inputs, and result and gradients of them in float64."""
    torch.manual_seed(0)
    height, width, channels = bench.parse_size(size)
    case = oracle.random_case((height, width), dtype, 3, channels, device)
    return case, oracle.expected(*case)


def check(at: Setting, backend: str, dtype: str, size: str, mode: str) -> dict[str, Cell]:
    """Return the largest error of a backend: result and both gradients, in outputs of NaN."""
    case, truth = case_of(size, getattr(torch, dtype), at.device)
    if reason := unsupported_reason(case.x, backend):
        raise ValueError(f'{backend} does not take it: {reason}')

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, backend)

    if mode == 'compiled':
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend=at.compiler)
    run = functools.partial(oracle.result_and_gradients, function)
    results = {'first': run(*case), 'second': run(*case)}
    if not all(map(torch.equal, *results.values())):
        raise AssertionError('a second run gives another result')
    if mode == 'eager':
        x, g = (t.detach().movedim(-1, 1).contiguous().movedim(1, -1) for t in (case.x, case.g))
        weight = case.weight.detach().repeat_interleave(2, dim=1)[:, ::2]
        results['non-contiguous'] = run(x, weight, g)
        if at.device == 'cuda':
            made = []
            replay = bench.captured(lambda: made.append(run(*case)))
            for tensor in made[-1]:
                tensor.fill_(torch.nan)
            replay()
            results['CUDA graph'] = made[-1]
    largest, allowed = 0.0, oracle.ERRORS[case.x.dtype]
    for how, actual in results.items():
        for what, a, e in zip(('result', 'dx', 'dweight'), actual, truth, strict=True):
            error = ((a.double().cpu() - e).abs().max() / e.abs().max()).item()
            if not error <= allowed:
                raise AssertionError(f'{how} {what}: error {error:.1e}, allowed {allowed:.0e}')
            largest = max(largest, error)
    return {backend: {'': largest}}


def make_block(size: str, device: str) -> Block:
    """Return a block with parameters that all matter."""
    height, width, channels = bench.parse_size(size)
    block = Block(channels, (height, width), 'bilinear', 'auto', 0.0, 1.0).to(device)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def check_block(at: Setting, dtype: str, size: str) -> dict[str, Cell]:
    """Return the largest error of a block: result and all gradients, in outputs of NaN."""
    torch.manual_seed(0)
    height, width, channels = bench.parse_size(size)
    x, g = torch.randn(2, 3, height, width, channels, device=at.device)
    block, half = make_block(size, at.device), getattr(torch, dtype)

    def run(block: Block, x: Tensor, g: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        with torch.autocast(at.device, half, half != torch.float32 and x.dtype != torch.float64):
            y = block(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], g)]

    with torch.no_grad():
        if fused_block.run(block, x) is None:
            raise AssertionError('the block runs layer by layer')
    # So it does in float64.
    truth = run(copy.deepcopy(block).double(), x.double(), g.double())
    results = {'first': run(block, x, g), 'second': run(block, x, g)}
    if not all(map(torch.equal, *results.values())):
        raise AssertionError('a second run gives another result')
    if at.device == 'cuda':
        made = []
        replay = bench.captured(lambda: made.append(run(block, x, g)))
        for tensor in made[-1]:
            tensor.fill_(torch.nan)
        replay()
        results['CUDA graph'] = made[-1]
    # Several roundings add up.
    allowed = 10 * oracle.ERRORS[half]
    errors = [
        ((a.double() - e).abs().max() / e.abs().max()).item()
        for actual in results.values()
        for a, e in zip(actual, truth, strict=True)
    ]
    if not all(error <= allowed for error in errors):
        raise AssertionError(f'error {max(errors):.1e}, allowed {allowed:.0e}')
    return {'block': {'': max(errors)}}


# Parts 2 and 3: times


def in_turns(
    makers: dict[str, Callable[[], Run]],
    at: Setting,
    figures: Callable[[float], Cell],
    graph: bool = False,
) -> dict[str, Cell]:
    """Time what takes turns, relative to the first; what fails does not take part."""
    runs, cells = {}, {}
    for name, make in makers.items():
        try:
            run = make()
            cells[name] = {} if at.rehearse else {'MB': bench.peak(run, at.device)}
            run()
            runs[name] = bench.captured(run) if graph else run
        except Exception as error:
            cells[name] = failure(error)
    times = measure(runs, at.turns, at.seconds, at.device)
    baseline = next(iter(makers))
    for name in runs:
        seconds = statistics.median(times[name])
        ratio = {'x': speedup(times, name, baseline)} if baseline in runs else {}
        cells[name] = {'ms': 1000 * seconds, **ratio, **figures(seconds), **cells[name]}
    return cells


def filters(at: Setting, dtype: str) -> Iterator[Row]:
    """Time the backends of the filter, the stages at 512 first."""
    sizes = [*bench.GPU_SIZES, *STAGES_224, *COCO_SIZES]
    launches = ['eager', 'CUDA graph']
    if at.rehearse:
        sizes, launches = ['3x2x2'], ['eager']
    passes = ('forward', 'forward + backward')
    for size, what, launch in itertools.product(sizes, passes, launches):
        names = ('baseline', 'fft', 'dense') + ('fused',) * (dtype == 'bfloat16')
        run = functools.partial(time_filter, at, size, dtype, what, launch, names)
        yield Row(FILTER, f'{size} | {dtype} | {what} | {launch}', names, run)


def blocks(at: Setting) -> Iterator[Row]:
    """Time a block and its parts in training, by torch alone and by our kernels."""
    sizes = ['3x2x4'] if at.rehearse else [*bench.GPU_SIZES, *STAGES_224]
    launches = ['eager'] if at.rehearse else ['CUDA graph', 'eager']
    parts = {'block': block_tasks, 'norm': norm_tasks, 'residual': residual_tasks}
    for launch, (part, tasks), size in itertools.product(launches, parts.items(), sizes):
        run = functools.partial(time_part, at, tasks, size, launch)
        label = f'{size} | {part} | forward + backward | {launch}'
        yield Row(BLOCK_TIMES, label, ('torch', 'ours'), run)


def time_part(at: Setting, tasks: Any, size: str, launch: str) -> dict[str, Cell]:
    shape = 1 if at.rehearse else 16, *bench.parse_size(size)
    x, g = torch.randn(2, *shape, device=at.device)
    runs = {
        name: lambda f=f: torch.autocast(at.device, torch.bfloat16)(f)
        for name, f in tasks(at, size, x, g).items()
    }
    return in_turns(runs, at, lambda seconds: {}, launch == 'CUDA graph')


def block_tasks(at: Setting, size: str, x: Tensor, g: Tensor) -> dict[str, Run]:
    block = make_block(size, at.device)
    by_torch = official(nn.Sequential(copy.deepcopy(block)))
    x.requires_grad_()

    def step(block: nn.Module) -> object:
        return torch.autograd.grad(block(x), [x, *block.parameters()], g)

    return {'torch': lambda: step(by_torch), 'ours': lambda: step(block)}


def norm_tasks(at: Setting, size: str, x: Tensor, g: Tensor) -> dict[str, Run]:
    norm, half = make_block(size, at.device).norm1, g.bfloat16()
    x.requires_grad_()

    def by_torch() -> object:
        y = norm(x).bfloat16()
        return torch.autograd.grad(y, [x, *norm.parameters()], half)

    @torch.no_grad()
    def by_kernels() -> object:
        _, statistics = cuda.normalize(x, norm.weight, norm.bias, norm.eps, torch.bfloat16)
        sums = cuda.new_sums(x, 2)
        return cuda.normalize_backward(half, x, norm.weight, statistics, None, sums, 0), sums.sum(0)

    return {'torch': by_torch, 'ours': by_kernels}


def residual_tasks(at: Setting, size: str, x: Tensor, g: Tensor) -> dict[str, Run]:
    scale, y = torch.ones(x.shape[-1], device=at.device), g.bfloat16()
    inputs = [t.requires_grad_() for t in (x, scale, y)]

    def by_torch() -> object:
        return torch.autograd.grad(torch.addcmul(*inputs), inputs, g)

    @torch.no_grad()
    def by_kernels() -> object:
        sums = cuda.new_sums(x, 2)
        cuda.add_scaled(x, scale, None, y)
        return cuda.add_scaled_backward(g, scale, None, y, sums, 0), sums.sum(0)

    return {'torch': by_torch, 'ours': by_kernels}


_copy_rate = functools.cache(bench.copy_rate)


def time_filter(
    at: Setting, size: str, dtype: str, what: str, launch: str, names: tuple[str, ...]
) -> dict[str, Cell]:
    height, width, channels = bench.parse_size(size)
    backward, batch = what != 'forward', 1 if at.rehearse else 16
    x = torch.randn(batch, height, width, channels, device=at.device).to(getattr(torch, dtype))
    weight = torch.randn(height, width // 2 + 1, channels, 2, device=at.device)
    operators = bench.contenders(x)
    makers = {name: lambda n=name: bench.task(operators[n], x, weight, backward) for name in names}
    rate = _copy_rate(at.device)

    def figures(seconds: float) -> Cell:
        return {'% of a copy': 100 * bench.moved(x, weight, backward) / seconds / rate}

    return in_turns(makers, at, figures, launch == 'CUDA graph')


def networks(at: Setting, side: int) -> dict[str, Callable[[], nn.Module]]:
    """Return constructors of backbones by name; the first is the baseline."""

    def gfnet(arch: str | dict[str, Any]) -> Callable[[], nn.Module]:
        return lambda: GFNetPyramid(arch, img_size=side, num_classes=0)

    def other(name: str, **sized: int) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, num_classes=0, **sized)

    def fast_norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def make_with_fast_norm() -> nn.Module:
            timm.layers.set_fast_norm(True)
            try:
                return make()
            finally:
                timm.layers.set_fast_norm(False)

        return make_with_fast_norm

    if at.rehearse:
        tiny = gfnet(dict(embed_dims=(4, 4, 4, 4), depths=(1, 1, 1, 1)))
        baseline = {'GFNet, official form': lambda: official(tiny())}
        return {'GFNet': tiny, **baseline, f'GFNet{FAST_NORM}': fast_norm(tiny)}
    return {
        'GFNet-H-S': gfnet('h-s'),
        'GFNet-H-S, official form': lambda: official(gfnet('h-s')()),
        'ConvNeXt-T': other('convnext_tiny'),
        'Swin-T': other('swin_tiny_patch4_window7_224', img_size=side),
        'GFNet-H-Ti': gfnet('h-ti'),
        'GFNet-H-B': gfnet('h-b'),
        'PoolFormerV2-S24': other('poolformerv2_s24'),
        'DeiT-S': other('deit_small_patch16_224', img_size=side),
        f'GFNet-H-S{FAST_NORM}': fast_norm(gfnet('h-s')),
        f'ConvNeXt-T{FAST_NORM}': fast_norm(other('convnext_tiny')),
    }


def backbones(at: Setting) -> Iterator[Row]:
    """Time backbones: all in turns, then compiled ones, each in turns with the eager baseline."""
    sides = ((32, 1),) if at.rehearse else ((512, 16), (224, 64))
    names = tuple(networks(at, 0))
    cases = [(side, batch, what) for side, batch in sides for what in PASSES]
    for case in cases:
        run = functools.partial(time_backbones, at, *case, names)
        yield Row(BACKBONES, '{} | {} | {} | eager'.format(*case), names, run)
    run = functools.partial(profile, at, *sides[0])
    yield Row(PROFILE, '{0}, {2} of {1}x{1}'.format(names[0], *sides[0]), tuple(SHARES), run)
    compiled = names[:1] if at.rehearse else [n for n in names if not n.endswith(FAST_NORM)]
    for case, name in itertools.product(cases, compiled):
        run = functools.partial(time_backbones, at, *case, (name,), compiled=True)
        yield Row(BACKBONES, '{} | {} | {} | compiled'.format(*case), (name,), run)


def time_backbones(
    at: Setting, side: int, batch: int, what: str, names: tuple[str, ...], compiled: bool = False
) -> dict[str, Cell]:
    x = torch.randn(batch, 3, side, side, device=at.device)
    made = networks(at, side)

    def maker(name: str, compiled: bool = False) -> Callable[[], Run]:
        def make() -> Run:
            with torch.device(at.device):
                model = made[name]()
            model = torch.compile(model, backend=at.compiler) if compiled else model
            return PASSES[what](model, x, torch.bfloat16)

        return make

    makers = {name: maker(name, compiled) for name in names}
    if compiled:
        torch.compiler.reset()
        makers = {'eager baseline': maker(next(iter(made))), **makers}
    return in_turns(makers, at, lambda seconds: {'images/s': batch / seconds})


def profile(at: Setting, side: int, batch: int) -> dict[str, Cell]:
    """Return the shares of a training step of the baseline that its kinds of operators take."""
    x = torch.randn(batch, 3, side, side, device=at.device)
    make, *_ = networks(at, side).values()
    with torch.device(at.device):
        model = make()
    run = training_step(model, x, torch.bfloat16)
    run()
    with torch.profiler.profile(acc_events=True) as profiler:
        run()
    kind = 'cpu' if at.rehearse else 'device'
    totals = dict.fromkeys(SHARES, 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # operators, not their kernels
            name = next(name for name, pattern in SHARES.items() if re.search(pattern, event.key))
            totals[name] += getattr(event, f'self_{kind}_time_total')
    return {name: {'%': 100 * t / sum(totals.values())} for name, t in totals.items()}


# Part 4: the product


def products(at: Setting) -> Iterator[Row]:
    """Train UperNet under torchrun: every run is what a user types, with few iterations."""
    convnext = dict(model_name='convnext_tiny')
    # Its 'getter' returns maps with channels first.
    swin = dict(model_name='swin_tiny_patch4_window7_224', feature_cls='getter', img_size=512)
    if at.rehearse:
        convnext.update(depths=(1, 1, 1, 1), dims=_widths(at))
        swin.update(depths=(1, 1, 1, 1), embed_dim=_widths(at)[0], img_size=64)
    bfloat = ['--amp=bfloat16']
    for name, arguments, options in (
        ('GFNet-H-S', bfloat, {}),
        ('Swin-T', bfloat, dict(backbone=swin)),
        ('ConvNeXt-T', bfloat, dict(backbone=convnext)),
        ('GFNet-H-S, SIGTERM and --resume', bfloat, dict(interrupt=True)),
        ('GFNet-H-S, no guard of steps', bfloat, dict(durable=dict(non_finite_guard=False))),
        ('GFNet-H-S, no data checks', bfloat, dict(durable=dict(data_checks=False))),
        ('GFNet-H-S', ['--amp=float16'], {}),
        ('GFNet-H-S', [*bfloat, '--compile'], {}),
    )[: -3 if at.rehearse else None]:  # not what repeats code or needs a GPU
        run = functools.partial(train, at, arguments, **options)
        yield Row(PRODUCT, ' '.join([name, *arguments]), ('training',), run)


def _widths(at: Setting) -> list[int]:
    """Return the channels of the stages of Swin and ConvNeXt."""
    return [(24 if at.rehearse else 96) * 2**stage for stage in range(4)]


def train(
    at: Setting,
    arguments: list[str],
    backbone: dict | None = None,
    durable: dict | None = None,
    interrupt: bool = False,
) -> dict[str, Cell]:
    """Train, evaluate at the end, and return what the log says about the second half."""
    iterations, batch = (4, 2) if at.rehearse else (ITERATIONS, 16)
    with tempfile.TemporaryDirectory() as folder:
        config, work_dir = Path(folder, 'config.py'), Path(folder, 'work')
        write_images(Path(folder), (64, 64) if at.rehearse else (683, 512))
        make_config(at, Path(folder), iterations, batch, backbone, durable or {}).dump(config)
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
        command += ['--nproc_per_node=1', str(ROOT / 'tools' / 'train.py'), str(config)]
        command += ['--launcher=pytorch', '--work-dir', str(work_dir), *arguments]
        start = time.perf_counter()
        resumed = {}
        if interrupt:
            stop(command, work_dir)
            resumed = {'iterations before SIGTERM': len(steps(work_dir))}
            command.append('--resume')
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(reason(ended.stdout + ended.stderr))
        log = steps(work_dir)
        if [line['step'] for line in log] != list(range(1, iterations + 1)):
            raise AssertionError(f'iterations are {[line["step"] for line in log]}')
        if not (miou := re.findall(r'mIoU: (\d+\.\d+)', ended.stdout)):
            raise AssertionError('no evaluation')
        half = log[iterations // 2 :]
        seconds = statistics.median(line['time'] for line in half)
        figures = {
            'ms': 1000 * seconds,
            'images/s': batch / seconds,
            'ms for data': 1000 * statistics.median(line['data_time'] for line in half),
            'MB': max(line.get('memory', 0) for line in half),
            's in all': time.perf_counter() - start,
            'loss': half[-1]['loss'],
            'mIoU': float(miou[-1]),
        }
        return {'training': figures | resumed}


def stop(command: list[str], work_dir: Path) -> None:
    """Start a training, interrupt it after some iterations and wait for its checkpoint."""
    with tempfile.TemporaryFile('w+') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and not steps(work_dir):
            time.sleep(0.1)
        process.terminate()
        process.wait()
        output.seek(0)
        if not (work_dir / 'interrupted.pth').exists():
            raise AssertionError(f'no checkpoint after SIGTERM: {reason(output.read())}')


def steps(work_dir: Path) -> list[dict]:
    """Return the iterations of the log, of all attempts."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    found = [json.loads(line) for line in lines if line.endswith('\n')]
    return [line for line in found if 'loss' in line]


def reason(output: str) -> str:
    """Return the last error that a command printed."""
    lines = output.strip().splitlines() or ['no output']
    return next((x for x in reversed(lines) if re.search(r'\w+Error: \S', x)), lines[-1])


def write_images(root: Path, size: tuple[int, int]) -> None:
    """Write images in the layout of ADE20K, of its median size, with ten of its labels."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, number in (('training', 32), ('validation', 4)):
        images, labels = (root / kind / split for kind in ('images', 'annotations'))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(number):
            image = Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8))
            image.resize(size, Image.Resampling.BICUBIC).save(images / f'{i}.jpg')
            label = Image.fromarray(random.integers(1, 11, (8, 8), np.uint8))
            label.resize(size, Image.Resampling.NEAREST).save(labels / f'{i}.png')


def make_config(
    at: Setting, data: Path, iterations: int, batch: int, backbone: dict | None, durable: dict
) -> Any:
    """Return a config of the project for these data, with few iterations."""
    from mmengine.config import Config

    name = 'upernet_gfnet_nano_digits' if at.rehearse else 'upernet_gfnet_h_s_ade20k'
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    workers = 0 if at.rehearse else min(12, os.cpu_count() or 1)
    for use in ('train', 'val', 'test'):
        loader = config[f'{use}_dataloader']
        loader.dataset.data_root = str(data)
        loader.update(num_workers=workers, persistent_workers=workers > 0)
    config.train_dataloader.batch_size = batch
    config.train_cfg.update(max_iters=iterations, val_interval=iterations)
    config.default_hooks.logger.interval = 1
    config.log_processor.window_size = 1
    # Layer decay asks the backbone for its layers, which those of timm do not know.
    config.optim_wrapper.pop('constructor', None)
    config.optim_wrapper.pop('paramwise_cfg', None)
    config.durable = durable
    config.model.backbone.init_cfg = None
    if backbone:
        config.model.backbone = dict(
            type='TIMMBackbone', pretrained=False, drop_path_rate=0.3, **backbone
        )
        config.model.decode_head.in_channels = _widths(at)
        config.model.auxiliary_head.in_channels = _widths(at)[2]
    return config


# Running and rendering


def times_of_operators(at: Setting) -> Iterator[Row]:
    """Time filters and blocks: what trainings with autocast use first."""
    yield from filters(at, 'bfloat16')
    yield from blocks(at)
    yield from filters(at, 'float32')


PARTS = {1: correctness, 2: times_of_operators, 3: backbones, 4: products}


def failure(error: Exception) -> Cell:
    text = f'{type(error).__name__}: {error}'
    return {'failed': textwrap.shorten(text, 300, placeholder=' ...')}


def read(out: Path) -> list[dict]:
    file = out / 'results.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def name_of(row: Row) -> str:
    return ' | '.join((row.label, *row.columns))


def run_rows(part: int, at: Setting, out: Path, deadline: float, only: Sequence[str] = ()) -> int:
    """Measure rows of a part until a deadline; return the exit status of the process."""
    where = f'{"rehearsal on " * at.rehearse}{machine(at.device)}; timm {timm.__version__}'
    done = {(row['table'], row['label'], *row['cells']) for row in read(out)}
    kernels: contextlib.AbstractContextManager = contextlib.nullcontext()
    if at.rehearse:
        from emulated_cuda import emulation

        kernels = emulation()
    with (out / 'results.jsonl').open('a') as file, kernels:
        chosen = [row for row in PARTS[part](at) if all(text in name_of(row) for text in only)]
        if not chosen:
            print(f'part {part}: no row holds {" and ".join(map(repr, only))}', flush=True)
        for row in chosen:
            if (row.table[0], row.label, *row.columns) in done:
                continue
            if time.time() > deadline:
                print(f'part {part}: out of time before {row.label}', flush=True)
                return 0
            try:
                cells = row.measure()
            except Exception as error:
                cells = dict.fromkeys(row.columns, failure(error))
            cells = {column: cells[column] for column in row.columns}
            line = dict(part=part, table=row.table[0], label=row.label, cells=cells, where=where)
            print(json.dumps(line), file=file, flush=True)
            for column, cell in cells.items():
                print(f'{row.label} | {column}: {format_cell(cell)}', flush=True)
            if not at.rehearse:
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    return BROKEN
    return 0


def run_part(part: int, minutes: float, out: Path, rehearse: bool, only: Sequence[str]) -> None:
    """Measure a part in a process of its own, again in a new one if its CUDA context is lost."""
    deadline = time.time() + 60 * minutes
    command = [sys.executable, __file__, '--part', str(part), '--out', str(out)]
    command += ['--deadline', str(deadline), *['--rehearse'] * rehearse]
    command += [f'--only={text}' for text in only]
    paths = [str(ROOT), os.environ.get('PYTHONPATH')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    status = BROKEN
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        environment['TMPDIR'] = scratch
        while status == BROKEN:
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            try:
                status = process.wait(deadline + GRACE - time.time())
            except subprocess.TimeoutExpired:
                status = 'ended, its time is over'
            finally:
                end(process)
    print(f'part {part}: {status or "done"}', flush=True)


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its processes, too
        for _ in range(100):
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def format_cell(cell: Cell) -> str:
    """Return figures with their units, or an error."""
    if 'failed' in cell:
        return f'failed: {cell["failed"]}'.replace('|', '/')
    figures = (
        f'{v if isinstance(v, str) else format(v, ".3g")} {unit}' for unit, v in cell.items()
    )
    return ', '.join(figure.strip() for figure in figures)


def render(at: Setting, rows: list[dict]) -> str:
    """Return all tables in Markdown; a row that was not measured says so."""
    cells = {
        (row['table'], row['label'], column): format_cell(cell)
        for row in rows
        for column, cell in row['cells'].items()
    }
    text = ['; '.join(dict.fromkeys(row['where'] for row in rows)) or 'not measured']
    planned = [row for part in PARTS.values() for row in part(at)]
    for table in dict.fromkeys(row.table for row in planned):
        lines = [row for row in planned if row.table == table]
        columns = dict.fromkeys(column for row in lines for column in row.columns)
        labels = {row.label: set() for row in lines}
        for row in lines:
            labels[row.label] |= set(row.columns)
        heading = f'| {table[1]} | {" | ".join(columns)} |'
        text += [f'\n### {table[0]}\n', heading, '|---' * (heading.count('|') - 1) + '|']
        for label, asked in labels.items():
            values = (
                cells.get((table[0], label, column), 'not measured') if column in asked else ''
                for column in columns
            )
            text.append(f'| {label} | {" | ".join(values)} |')
    return '\n'.join(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Check and measure everything on a GPU.')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='for results.jsonl')
    parser.add_argument('--part', type=int, choices=PARTS, help='by default all in this order')
    parser.add_argument('--minutes', type=float, help='of each part; by default 2, 2, 3 and 4')
    parser.add_argument(
        '--only', action='append', default=[], metavar='TEXT', help='rows that hold all such texts'
    )
    parser.add_argument('--rehearse', action='store_true', help='on a CPU, in tiny sizes')
    parser.add_argument('--render', action='store_true', help='print the tables, measure nothing')
    parser.add_argument('--deadline', type=float, help=argparse.SUPPRESS)  # of a part's process
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    at = CPU if args.rehearse else GPU
    args.out.mkdir(parents=True, exist_ok=True)
    if args.render:
        print(render(at, read(args.out)))
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print('There is no GPU here: --rehearse runs everything on a CPU.', file=sys.stderr)
        return 1
    if args.deadline:
        # Part 1 fills what `empty` returns with NaN.
        torch.use_deterministic_algorithms(args.part == 1, warn_only=True)
        return run_rows(args.part, at, args.out, args.deadline, args.only)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for part in [args.part] if args.part else PARTS:
        run_part(part, args.minutes or MINUTES[part], args.out, args.rehearse, args.only)
    return int(any('failed' in cell for row in read(args.out) for cell in row['cells'].values()))


if __name__ == '__main__':
    sys.exit(main())
