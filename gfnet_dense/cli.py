"""The command line: `gfnet VERB ...`; the scripts in tools/ call the same verbs.

A verb is a function that adds its arguments to a parser and returns what runs them. Its docstring
is the help: a line that says what it does, then examples. The table VERBS names all of them.
"""

import argparse
import contextlib
import io
import logging
import os
import shlex
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Run = Callable[[argparse.Namespace], int | None]
Verb = Callable[[argparse.ArgumentParser], Run]

_LINE = 1000  # characters of an error message, in each of at most two lines


def main(verb: str | None = None) -> int:
    """Run a verb with the arguments of the process.

    Args:
        verb: One of :data:`VERBS`; by default the first argument.

    Returns:
        The exit status: 0; 1 after an error, which is printed; 130 after Ctrl-C; or what the verb
        returns.
    """
    arguments, prog = sys.argv[1:], None
    if verb is None:
        verb = _parse_verb(arguments[:1])
        arguments, prog = arguments[1:], f'gfnet {verb}'
    what, _, examples = (VERBS[verb].__doc__ or '').partition('\n')
    parser = argparse.ArgumentParser(
        prog=prog,
        description=what,
        epilog=textwrap.dedent(examples).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if verb != 'train':  # which saves a checkpoint when it is ended
        # A job that is ended removes its partial files, as after Ctrl-C.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run = VERBS[verb](parser)
        parser.add_argument('--debug', action='store_true', help='print the traceback of an error')
        args = parser.parse_args(arguments)
        del args.debug
        return run(args) or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as e:
        if '--debug' in arguments:
            raise
        if not getattr(e, 'said_elsewhere', False):  # by the first of several processes
            print(_describe(e), file=sys.stderr)
        return 1


def _parse_verb(arguments: list[str]) -> str:
    verbs = [f'  {name:<11} {(f.__doc__ or "").splitlines()[0]}' for name, f in VERBS.items()]
    parser = argparse.ArgumentParser(
        prog='gfnet',
        usage='gfnet VERB ...',
        description='Train GFNet for dense prediction, and use what was trained.',
        epilog='\n'.join(['verbs:', *verbs, '', 'gfnet VERB --help says how each is used.']),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('verb', choices=VERBS, metavar='VERB', help=argparse.SUPPRESS)
    verb: str = parser.parse_args(arguments).verb
    return verb


def _describe(error: Exception) -> str:
    """Return the kind and message of an error in at most two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    if len(lines) < 2 and not isinstance(error, OSError | ValueError | ImportError):
        lines.append('--debug prints the traceback.')
    text = '\n'.join(textwrap.shorten(line, _LINE, placeholder=' ...') for line in lines)
    return f'{type(error).__name__}: {text}'


# Arguments that several verbs share


def _add_config(parser: argparse.ArgumentParser, checkpoint: bool = False) -> None:
    parser.add_argument('config', help="path of a config, or the name of one of gfnet_dense's")
    if checkpoint:
        parser.add_argument('checkpoint', help='the trained weights')


def _add_cfg_options(parser: argparse.ArgumentParser) -> None:
    from mmengine.config import DictAction

    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='values to change in the config, such as train_dataloader.batch_size=4',
    )


def _add_launcher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how the processes of this run were started',
    )
    # torchrun may hand the rank over as an argument; mmengine reads it from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def _launched(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    del args.local_rank
    return vars(args)


def _class_names(text: str) -> list[str]:
    is_file = os.path.isfile(text)
    names = Path(text).read_text('utf-8-sig').splitlines() if is_file else text.split(',')
    return [name.strip() for name in names if name.strip()]


def _batch_size(text: str) -> int | None:
    try:
        return None if text == 'dynamic' else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or 'dynamic', but got {text!r}") from None


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drop what OpenMMLab and pycocotools print about themselves, which is for who trains."""
    from mmengine.logging import MMLogger

    # A logger keeps the stream that was standard output when it was made.
    consoles = [
        handler
        for handler in MMLogger.get_current_instance().handlers
        if not isinstance(handler, logging.FileHandler)
    ]
    levels = [handler.level for handler in consoles]
    warnings.filterwarnings('ignore', module=r'(mmcv|mmengine|mmseg|mmdet)\.')
    try:
        for handler in consoles:
            handler.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


# Verbs


def _train(parser: argparse.ArgumentParser) -> Run:
    """Train the model of a config.

    Examples:
      gfnet train upernet_gfnet_h_s_ade20k --auto-scale-lr
      gfnet train my_config.py --work-dir runs/mine --resume
    """
    _add_config(parser)
    parser.add_argument('--work-dir', metavar='DIR', help='folder for checkpoints and logs')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint, by default the latest of the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=('float16', 'bfloat16'),
        help='train with automatic mixed precision, by default in float16',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the total batch over the one it is made for',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        dest='compiled',
        help='run the backbone through torch.compile, which takes minutes to begin with',
    )
    parser.add_argument('--seed', type=int, metavar='N', help='seed of all random numbers')
    _add_cfg_options(parser)
    _add_launcher(parser)

    def run(args: argparse.Namespace) -> None:
        from gfnet_dense.openmmlab import train

        train(**_launched(args))

    return run


def _test(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a checkpoint on the test data of a config.

    Example:
      gfnet test upernet_gfnet_h_s_ade20k iter_160000.pth --tta
    """
    _add_config(parser, checkpoint=True)
    parser.add_argument('--work-dir', metavar='DIR', help='folder for the log')
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='a .pkl file for all predictions, or a folder for predicted label maps as PNG',
    )
    parser.add_argument('--show-dir', metavar='DIR', help='folder for pictures of the predictions')
    parser.add_argument(
        '--tta', action='store_true', help='average over scales and flips of the image'
    )
    _add_cfg_options(parser)
    _add_launcher(parser)

    def run(args: argparse.Namespace) -> None:
        from gfnet_dense.openmmlab import evaluate

        evaluate(**_launched(args))

    return run


def _predict(parser: argparse.ArgumentParser) -> Run:
    """Predict from images and videos, and write labels, tables and pictures.

    Examples:
      gfnet predict upernet_gfnet_h_s_ade20k iter_160000.pth photos/ --out results
      gfnet predict my_config.py best.pth map.tif --out results --tile 512
      find data -name '*.png' | gfnet predict my_config.py best.pth - --out results
    """
    _add_config(parser, checkpoint=True)
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='images, videos, folders, patterns; - reads paths from standard input',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the results')
    parser.add_argument('--batch', type=int, default=8, metavar='N', help='images at a time: 8')
    parser.add_argument('--device', help='such as cuda:1; by default a GPU if there is one')
    parser.add_argument(
        '--classes',
        type=_class_names,
        metavar='A,B|FILE',
        help='leave out all other classes; names with commas in a file, one a line',
    )
    parser.add_argument(
        '--opacity', type=float, default=0.5, metavar='X', help='of colours, 0 to 1: 0.5'
    )
    parser.add_argument('--tta', action='store_true', help='average over scales and flips')
    parser.add_argument(
        '--tile',
        nargs='?',
        type=int,
        const=0,
        metavar='SIDE',
        help="cut larger images into blended windows, by default of the training's size",
    )
    parser.add_argument(
        '--resume', action='store_true', help='leave out inputs whose results are there'
    )
    parser.add_argument(
        '--as-annotations',
        action='store_true',
        help="write labels in the coding of the config's annotations",
    )

    def run(args: argparse.Namespace) -> int:
        from gfnet_dense.inference import load, predict_files

        with _without_chatter():
            predictor = load(
                args.config,
                args.checkpoint,
                args.device,
                batch_size=args.batch,
                classes=args.classes,
                tta=args.tta,
                tile='auto' if args.tile == 0 else args.tile,
            )
        report = predict_files(
            predictor,
            args.inputs,
            args.out,
            opacity=args.opacity,
            as_annotations=args.as_annotations,
            resume=args.resume,
        )
        print(report)
        return 1 if report.failures else 0

    return run


def _check_data(parser: argparse.ArgumentParser) -> Run:
    """Check the data of a config without training.

    Example:
      gfnet check-data my_config.py --plot data.png
    """
    _add_config(parser)
    parser.add_argument(
        '--plot', metavar='FILE.png', help='draw classes, sizes, boxes and samples with labels'
    )
    _add_cfg_options(parser)

    def run(args: argparse.Namespace) -> int:
        from mmengine.config import Config

        from gfnet_dense.data import check_data, plot_reports
        from gfnet_dense.openmmlab import find_config

        config = Config.fromfile(find_config(args.config))
        config.merge_from_dict(args.cfg_options or {})
        with _without_chatter():
            reports = check_data(config)
        print(*reports, sep='\n')
        if args.plot:
            print(f'pictures: {plot_reports(reports, Path(args.plot))}')
        faults = sum(len(report.faults) for report in reports)
        print(f'{faults} faults')
        return min(faults, 1)

    return run


def _export(parser: argparse.ArgumentParser) -> Run:
    """Export a trained model to one file, which is compared with PyTorch before it appears.

    Examples:
      gfnet export upernet_gfnet_h_s_ade20k iter_160000.pth model.onnx --shape 512 512
      gfnet export my_config.py best.pth model.pt2 --shape 480 640 --labels --batch dynamic
    """
    _add_config(parser, checkpoint=True)
    parser.add_argument('out', metavar='OUT', help='the file, ending in .onnx or .pt2')
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
        type=_batch_size,
        default=1,
        metavar='N|dynamic',
        help='images of a call: 1',
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
        metavar='PATH',
        help="compare on these, by default on the config's test images, else on a photograph",
    )
    parser.add_argument(
        '--num-images', type=int, default=8, metavar='N', help='test images to compare on: 8'
    )

    def run(args: argparse.Namespace) -> None:
        from gfnet_dense.inference import export_model

        with _without_chatter():
            exported = export_model(**vars(args))
        print(*exported, sep='\n')

    return run


def _flops(parser: argparse.ArgumentParser) -> Run:
    """Count the multiply-accumulates and parameters of a model.

    Examples:
      gfnet flops upernet_gfnet_h_s_ade20k --shape 512 2048
      gfnet flops gfnet_h_s
    """
    parser.add_argument(
        'name', help="path of a config, name of one of gfnet_dense's, or name of a timm model"
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image, by default the one that the parameters are made for, '
        '800 1280 for detectors',
    )

    def run(args: argparse.Namespace) -> None:
        from gfnet_dense.openmmlab import measure_complexity

        print(measure_complexity(**vars(args)))

    return run


def _convert(parser: argparse.ArgumentParser) -> Run:
    """Write the GFNet of a checkpoint to a clean file of its own, after a forward pass.

    Examples:
      gfnet convert gfnet-h-s gfnet_h_s.safetensors
      gfnet convert iter_160000.pth backbone.pth
    """
    parser.add_argument(
        'src',
        help="an official file or its name, for example gfnet-h-s, or this project's checkpoint of "
        'a classifier, segmentor or detector',
    )
    parser.add_argument('dst', help='the file to write; a name in .safetensors makes it one')
    parser.add_argument('--force', action='store_true', help='overwrite DST where it exists')

    def run(args: argparse.Namespace) -> None:
        from gfnet_dense.models.convert import convert_checkpoint

        print(f'{args.dst}: {convert_checkpoint(args.src, args.dst, overwrite=args.force)}')

    return run


def _new(parser: argparse.ArgumentParser) -> Run:
    """Write a config for your own data, check the data, and say how to train.

    Examples:
      gfnet new cells --images cells/images --masks cells/masks --classes background,cell
      gfnet new trees --coco trees/annotations.json --images trees/photos --iterations 5000
      gfnet new flowers --images flowers   (a folder of images for each class)
    """
    from gfnet_dense.openmmlab.new_config import ARCHS, HEADS

    parser.add_argument('name', metavar='NAME', help='the config to write: NAME.py')
    parser.add_argument('--images', metavar='DIR', help='images, or a folder for each class')
    parser.add_argument('--masks', metavar='DIR', help='label maps: indices or colours')
    parser.add_argument('--coco', metavar='FILE', help="annotations in COCO's layout")
    parser.add_argument('--val-coco', metavar='FILE', help='COCO file of the validation images')
    parser.add_argument(
        '--classes',
        metavar='A,B|FILE',
        help='names of classes, or a file with one a line, such as "road 128 64 128"',
    )
    parser.add_argument(
        '--ignore',
        nargs='+',
        default=(),
        metavar='V',
        help='mask values without a class: 0 or 224,224,192',
    )
    heads = f'{", ".join(HEADS)}; default: chosen from the annotations'
    parser.add_argument('--head', choices=HEADS, metavar='HEAD', help=heads)
    archs = f'GFNet of size {", ".join(ARCHS)}; default: h-s'
    parser.add_argument('--arch', choices=ARCHS, metavar='ARCH', default='h-s', help=archs)
    parser.add_argument(
        '--weights',
        metavar='FILE|NAME',
        help='GFNet to start from, or none; default: official',
    )
    for option, text in (
        (
            '--crop',
            'side of training crops; images are resized to this shorter side',
        ),
        ('--batch', 'images of an iteration; default: what memory should hold'),
        ('--iterations', 'default: 100 epochs, at most 80,000 iterations'),
    ):
        parser.add_argument(option, type=_positive_int, metavar='N', help=text)
    parser.add_argument(
        '--force', action='store_true', help='overwrite NAME.py and the lists or links beside it'
    )

    def run(args: argparse.Namespace) -> int:
        from gfnet_dense.data import check_data
        from gfnet_dense.openmmlab import new_config

        with _without_chatter():
            written = new_config(**vars(args))
        print(written)
        with _without_chatter():
            reports = check_data(written.config)
        print(*reports, sep='\n')
        if faults := sum(len(report.faults) for report in reports):
            print(f'{faults} faults in the data: correct them, then train:')
        else:
            print('The data have no faults. Train:')
        work_dir = f'work_dirs/{written.path.stem}'
        print(f'  {shlex.join(["gfnet", "train", str(written.path), "--work-dir", work_dir])}')
        return min(faults, 1)

    return run


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text} is not a positive whole number')
    return int(text)


VERBS: dict[str, Verb] = {
    'train': _train,
    'test': _test,
    'predict': _predict,
    'export': _export,
    'new': _new,
    'check-data': _check_data,
    'flops': _flops,
    'convert': _convert,
}
