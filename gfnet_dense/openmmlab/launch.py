"""Training and evaluation from a config; the command line tools call these functions."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from gfnet_dense.durable.checkpoints import latest_checkpoint, local_file
from gfnet_dense.durable.runner import DurableRunner
from gfnet_dense.durable.summary import unwrapped
from gfnet_dense.serialization import CheckpointError, load_file

from .mixed_precision import use_mixed_precision

_PACKAGE = Path(__file__).parents[1]


def train(
    config: str | Path | Config,
    *,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: str | None = None,
    auto_scale_lr: bool = False,
    compiled: bool = False,
    seed: int | None = None,
    launcher: str = 'none',
    cfg_options: Mapping[str, Any] | None = None,
) -> Runner:
    """Train the model of a config and return the runner.

    Args:
        config: A config, its path, or the name of one of this project's.
        work_dir: Folder for checkpoints and logs; by default that of the config, else
            `work_dirs/NAME_OF_CONFIG`.
        resume: `'auto'` continues from the latest checkpoint of `work_dir`, a path from that
            checkpoint; None starts a new run.
        amp: `'float16'` or `'bfloat16'` for automatic mixed precision; on a CPU `'bfloat16'`.
        auto_scale_lr: Scale the learning rate by the total batch over the batch it is made for,
            the `auto_scale_lr` of the config.
        compiled: Run the backbone through :func:`torch.compile`. Checkpoints stay the same.
        seed: Seed of all random numbers.
        launcher: How the processes were started: none, pytorch, slurm or mpi.
        cfg_options: Values to change in the config, by dotted key.

    Raises:
        FileNotFoundError: If there is no such config, or nothing to resume from.
        ValueError: If the config does not have what an option needs.
        WorkDirError: If the work directory is in use, holds another run or cannot be written to.
        DataError: If the data are not there, or not what the config says.
        CheckpointError: If a checkpoint cannot be read or does not fit.
        NonFiniteLossError: If the loss is NaN or infinite too many times in a row.
    """
    cfg = _load(config, work_dir, launcher, cfg_options)
    if seed is not None:
        cfg.merge_from_dict({'randomness.seed': seed})
    if amp:
        use_mixed_precision(cfg, amp)
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(
                f'{cfg.filename} does not say what batch its learning rate is made for: set '
                'auto_scale_lr=dict(base_batch_size=...)'
            )
        cfg.auto_scale_lr.enable = True
    if cfg.get('resume') and not resume:  # as OpenMMLab's own tools have it
        resume = cfg.load_from or 'auto'
    if resume:
        _resume(cfg, resume)
    runner = _build(cfg)
    if compiled:
        model: Any = unwrapped(runner.model)
        if not hasattr(model, 'backbone'):
            raise ValueError(f'{type(model).__name__} has no backbone to compile: omit --compile')
        model.backbone.compile()  # in place, so that names in checkpoints stay
    runner.train()
    return runner


def _resume(cfg: Config, checkpoint: str) -> None:
    if checkpoint == 'auto':
        found = latest_checkpoint(cfg.work_dir)
        if found is None:
            raise FileNotFoundError(
                f'nothing to resume in {cfg.work_dir}: omit --resume to start anew'
            )
        checkpoint = str(found)
    checkpoint = local_file(checkpoint)
    content = load_file(checkpoint, mmap=True)
    if not isinstance(content, Mapping) or not {'meta', 'optimizer'} <= set(content):
        raise CheckpointError(
            f'{checkpoint} holds no run that could be resumed, no optimizer and no iteration: to '
            'start from its weights, name it as load_from in --cfg-options'
        )
    cfg.resume, cfg.load_from = True, checkpoint
    # All weights come from the checkpoint: the pretrained ones need not be there any more.
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None


def evaluate(
    config: str | Path | Config,
    checkpoint: str | Path,
    *,
    work_dir: str | None = None,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    launcher: str = 'none',
    cfg_options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Evaluate a checkpoint on the test data of a config and return the metrics.

    Args:
        config: As for :func:`train`.
        checkpoint: The weights to evaluate.
        work_dir: Folder for the log, as for :func:`train`.
        out: A `.pkl` file for all predictions, or a folder for predicted label maps as PNG, see
            :class:`LabelMaps`.
        show_dir: Folder for pictures of the predictions; they are in `vis_data/vis_image` there.
        tta: Average predictions over the `tta_pipeline` of the config.
        launcher: As for :func:`train`.
        cfg_options: As for :func:`train`.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ValueError: If the config does not have what an option needs.
    """
    cfg = _load(config, work_dir, launcher, cfg_options)
    checkpoint = local_file(checkpoint)
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f'no checkpoint at {checkpoint}')
    cfg.load_from = checkpoint
    if tta:
        missing = sorted({'tta_model', 'tta_pipeline'} - set(cfg))
        if missing:
            raise ValueError(f'{cfg.filename} has no {" and no ".join(missing)}: omit --tta')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
    if show_dir:
        if 'visualization' not in cfg.get('default_hooks', {}):
            raise ValueError(f'{cfg.filename} has no visualization hook in default_hooks')
        cfg.default_hooks.visualization.draw = True
        # By name mmengine would hand out the visualizer of an earlier evaluation.
        cfg.visualizer.update(save_dir=show_dir, name=show_dir)
    evaluators = cfg.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    if out and Path(out).suffix in ('.pkl', '.pickle'):
        # mmdetection's writes masks as RLE; as arrays those of COCO would not fit into memory.
        dump = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
        evaluators.append(dict(type=dump, out_file_path=out))
    elif out:
        if evaluators[0].type != 'IoUMetric':
            raise ValueError(f'predictions of this task are written to a .pkl file, not to {out}')
        if evaluators[0].get('format_only'):  # it would only write files
            del evaluators[0]
        data = cfg.test_dataloader.dataset
        prefix = (data.get('data_prefix') or {}).get('img_path') or ''
        evaluators.append(
            dict(type='LabelMaps', out_dir=out, root=str(Path(data.get('data_root') or '', prefix)))
        )
    cfg.test_evaluator = evaluators
    return _build(cfg).test()


def find_config(name: str | Path) -> Path:
    """Return the path of a config.

    `name` is a path, or the name of one of this project's configs, with or without `.py`.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(name)
    if path.suffix != '.py':
        path = path.with_name(f'{path.name}.py')
    if path.is_file():
        return path
    # A wheel carries the configs where OpenMMLab packages do, a checkout beside the package.
    folder = _PACKAGE / '.mim' / 'configs'
    if not folder.is_dir():
        folder = _PACKAGE.parent / 'configs'
    # Another folder in `name` is a mistake, not one of our names.
    if path.parent in (Path('.'), Path('configs')) and (folder / path.name).is_file():
        return folder / path.name
    known = ', '.join(sorted(path.stem for path in folder.glob('*.py')))
    raise FileNotFoundError(f'no config {name}; by name there are {known}')


def _load(
    config: str | Path | Config,
    work_dir: str | None,
    launcher: str,
    cfg_options: Mapping[str, Any] | None,
) -> Config:
    if isinstance(config, Config):
        cfg = copy.deepcopy(config)
    else:
        cfg = Config.fromfile(find_config(config))
    if cfg_options:
        cfg.merge_from_dict(dict(cfg_options))
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(cfg.filename or 'unnamed').stem)
    return cfg


def _build(cfg: Config) -> Runner:
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return DurableRunner.from_cfg(cfg)
