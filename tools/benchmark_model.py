"""Time whole backbones: `python tools/benchmark_model.py [--compile | --scaling | ...]`.

By default, GFNet-H-S as it is, with the filter computed by its definition (the baseline of all
ratios), and two networks of timm of its size. With --scaling, the time of a pixel as images grow.
With --resizing, what it costs that images of COCO are seldom two alike. With --profile, which
operators take the time of GFNet-H-S, or of a config's model.
"""

import argparse
import functools
from collections.abc import Callable

import timm
import torch
from timm.layers import LayerNorm
from torch import nn

from gfnet_dense.benchmark import machine, measure, milliseconds, speedup
from gfnet_dense.models import GFNetPyramid, GlobalFilter
from gfnet_dense.models.gfnet import Block
from gfnet_dense.spectral import global_filter
from gfnet_dense.spectral.reference import reference_filter

SIDES = (64, 128, 256, 512, 1024)


def plain(model: nn.Module) -> nn.Module:
    """Compute the filters of a model by their definition."""
    for module in model.modules():
        if isinstance(module, GlobalFilter):
            module.forward = lambda x, m=module: reference_filter(x, m.spectrum(x.shape[1:3]))
    return model


def official(model: nn.Module) -> nn.Module:
    """Compute the blocks of a model as the official code does, with torch's operators alone."""

    def forward(x: torch.Tensor, block: Block) -> torch.Tensor:
        y = LayerNorm.forward(block.norm1, x)
        y = LayerNorm.forward(block.norm2, reference_filter(y, block.filter.spectrum(y.shape[1:3])))
        y = block.mlp(y)
        return x + block.drop_path(y if block.gamma is None else block.gamma * y)

    for module in model.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(forward, block=module)
    return model


# Autocast is entered for each forward, as in a training loop: it casts the weights anew.


def inference(
    model: nn.Module, x: torch.Tensor, amp: torch.dtype | None = None
) -> Callable[[], object]:
    model.eval()

    @torch.no_grad()
    def run() -> object:
        with torch.autocast(x.device.type, amp, amp is not None):
            return model(x)

    return run


def training_step(
    model: nn.Module, x: torch.Tensor, amp: torch.dtype | None = None
) -> Callable[[], object]:
    model.train()
    # As in trainings, where the runner chooses so.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=x.is_cuda)

    def run() -> None:
        with torch.autocast(x.device.type, amp, amp is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def images(args: argparse.Namespace) -> torch.Tensor:
    return torch.randn(args.batch, 3, *args.size, device=args.device)


def compare(args: argparse.Namespace) -> None:
    """Print GFNet-H-S beside networks of its size."""
    size = tuple(args.size)
    swin = dict(img_size=size, num_classes=0)
    models = {
        'GFNet-H-S, filter by its definition': plain(GFNetPyramid('h-s', num_classes=0)),
        'GFNet-H-S': GFNetPyramid('h-s', num_classes=0),
        'GFNet-H-S, compiled': torch.compile(GFNetPyramid('h-s', num_classes=0)),
        'Swin-T (timm)': timm.create_model('swin_tiny_patch4_window7_224', **swin),
        'ConvNeXt-T (timm)': timm.create_model('convnext_tiny', num_classes=0),
    }
    if not args.compile:
        del models['GFNet-H-S, compiled']
    x = images(args)
    baseline, *_ = models
    what = f'{size[0]}x{size[1]}, batch {args.batch}, {args.amp or "float32"}'
    print(f'{what}: times as fast as the baseline, median (quartiles)\n')
    print('| backbone | inference | ms | training step | ms |\n|---|---|---|---|---|')
    columns = []
    for kind in (inference, training_step):
        amp = getattr(torch, args.amp) if args.amp else None
        tasks = {name: kind(model.to(args.device), x, amp) for name, model in models.items()}
        columns.append(measure(tasks, args.repeats, args.seconds, args.device))
    for name in models:
        cells = [f'{speedup(t, name, baseline)} | {milliseconds(t, name)}' for t in columns]
        print(f'| {name} | {" | ".join(cells)} |')


def scale(args: argparse.Namespace) -> None:
    """Print nanoseconds a pixel of the image, as images grow."""
    filter_weights = {side: torch.randn(side, side // 2 + 1, 96, 2) for side in SIDES}
    gfnet = GFNetPyramid('h-s', num_classes=0)

    def vit(side: int) -> nn.Module:
        return timm.create_model('vit_small_patch16_224', num_classes=0, img_size=side)

    def swin(side: int) -> nn.Module:
        return timm.create_model('swin_tiny_patch4_window7_224', num_classes=0, img_size=side)

    print('Nanoseconds a pixel, batch 1, inference; the filter alone on a map of that many cells')
    print('and 96 channels\n')
    print('| side | filter | GFNet-H-S | Swin-T (timm) | ViT-S/16 (timm) |\n|---|---|---|---|---|')
    for side in SIDES:
        x = torch.randn(1, 3, side, side, device=args.device)
        cells = torch.randn(1, side, side, 96, device=args.device)
        weight = filter_weights[side].to(args.device)
        tasks = {
            'filter': torch.no_grad()(lambda c=cells, w=weight: global_filter(c, w)),
            'gfnet': inference(gfnet.to(args.device), x),
            'swin': inference(swin(side).to(args.device), x),
            'vit': inference(vit(side).to(args.device), x),
        }
        times = measure(tasks, args.repeats, args.seconds, args.device)
        row = (f'{1e6 * float(milliseconds(times, name)) / side**2:.0f}' for name in tasks)
        print(f'| {side} | {" | ".join(row)} |', flush=True)


def compare_resizing(args: argparse.Namespace) -> None:
    """Print what filters cost that are resized in every forward, for an image of 800x1333."""
    size = 800, 1333
    models = {
        'made for it': GFNetPyramid('h-s', img_size=size, num_classes=0).to(args.device),
        'resized': GFNetPyramid('h-s', num_classes=0).to(args.device),
    }
    x = torch.randn(1, 3, *size, device=args.device)
    print(f'GFNet-H-S, batch 1 of {size[0]}x{size[1]}: times as fast as with filters made for it\n')
    print('| pass | filters made for it, ms | resized from the 224 grid, ms | ratio |')
    print('|---|---|---|---|')
    # Resized filters are kept in evaluation, so a forward of another size each is one in training.
    for label, kind in (('forward', inference), ('training step', training_step)):
        tasks = {name: kind(model, x) for name, model in models.items()}
        models['resized'].train()
        times = measure(tasks, args.repeats, args.seconds, args.device)
        first, second = (milliseconds(times, name) for name in models)
        print(f'| {label} | {first} | {second} | {speedup(times, "resized", "made for it")} |')


def profile(args: argparse.Namespace) -> None:
    """Print the operators that take most time: of inference and, of GFNet-H-S, of a training step.

    Of a config's model, also what part of inference its backbone takes.
    """
    model: nn.Module = GFNetPyramid('h-s', num_classes=0)
    if args.config:
        # Everything else needs torch and timm alone.
        from mmengine.config import Config
        from mmengine.registry import MODELS

        from gfnet_dense.openmmlab import find_config

        config = Config.fromfile(find_config(args.config))
        with MODELS.switch_scope_and_registry(config.get('default_scope')) as registry:
            model = registry.build(config.model)
    model, x = model.to(args.device), images(args)
    tasks = {'whole': inference(model, x)}
    if args.config:
        tasks['backbone'] = inference(model.backbone, x)
    times = measure(tasks, args.repeats, args.seconds, args.device)
    print(', '.join(f'{name} {milliseconds(times, name)} ms' for name in tasks))
    time = 'cuda' if args.device.startswith('cuda') else 'cpu'
    for kind in (inference,) if args.config else (inference, training_step):
        task = kind(model, x)
        task()  # warms up
        with torch.profiler.profile(acc_events=True) as profiler:
            for _ in range(args.repeats):
                task()
        print(f'{kind.__name__}:')
        print(profiler.key_averages().table(f'self_{time}_time_total', row_limit=12))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time whole backbones.')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, nargs=2, default=(224, 224), metavar=('H', 'W'))
    parser.add_argument('--amp', choices=('bfloat16', 'float16'), help='run under autocast')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--compile', action='store_true', help='add the compiled backbone')
    what.add_argument('--scaling', action='store_true', help='time a pixel as images grow')
    what.add_argument('--resizing', action='store_true', help='time filters of another grid')
    what.add_argument('--profile', action='store_true', help='list the operators that take time')
    parser.add_argument('--config', help='with --profile, of this segmentor or one-stage detector')
    parser.add_argument('--repeats', type=int, default=7, help='turns of each contender, 2 or more')
    parser.add_argument('--seconds', type=float, default=0.2, help='the least length of a turn')
    args = parser.parse_args()
    if args.config and not args.profile:
        parser.error('--config needs --profile')
    return args


def main() -> None:
    args = parse_args()
    print(f'{machine(args.device)}; timm {timm.__version__}\n')
    what = 'scaling', 'resizing', 'profile'
    tasks = dict(zip(what, (scale, compare_resizing, profile), strict=True))
    next((task for name, task in tasks.items() if vars(args)[name]), compare)(args)


if __name__ == '__main__':
    main()
