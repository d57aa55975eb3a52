"""mmengine's runner with fault tolerance."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_distributed, master_only
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner, load_state_dict
from torch import nn
from torch.utils.data import DataLoader

from gfnet_dense.data.build import explained_evaluator
from gfnet_dense.data.errors import DataError, join_first
from gfnet_dense.serialization import (
    CheckpointError,
    check_finite,
    load_file,
    plain_keys,
    write_whole,
)

from .checkpoints import latest_checkpoint, local_file
from .data_checks import CheckDataHook, checked, explain_error
from .interrupts import InterruptHook, init_worker
from .non_finite import NonFiniteLossHook, use_fused_adam
from .optimizers import accumulated_batches
from .ranks import AverageBuffersHook, on_main_process
from .resumable import ExactResumeHook, ValidationOnResumeHook, resumable
from .summary import RunSummaryHook, show_on_console, unwrapped
from .switches import Switches
from .work_dir import lock_work_dir, make_work_dir


@RUNNERS.register_module(name=['DurableRunner', 'GFNetRunner'])
class DurableRunner(Runner):
    """mmengine's runner with fault tolerance.

    It takes the arguments of :class:`mmengine.runner.Runner`. The key `durable` of its config
    switches parts off; :class:`Switches` says what they do. When training fails, the log says in
    which iteration and from which checkpoint to continue.

    Raises:
        ValueError: If `durable` has unknown keys.
        WorkDirError: If the work directory cannot be written to; in training, if it is in use or
            holds another run.
        DataError: In training and tests, if data are missing or not what the config says.
        CheckpointError: If a checkpoint cannot be read or does not fit.
        NonFiniteLossError: In training, if the loss is NaN or infinite too many times in a row.
    """

    # Training may start from weights without heads. Tests and resumed runs need all weights.
    _strict = False
    _train_dataloader: Any  # has no public name before the loop is built

    def __init__(
        self,
        model: nn.Module | dict[str, Any],
        work_dir: str,
        *args: Any,
        load_from: str | None = None,
        resume: bool = False,
        randomness: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.switches = Switches.from_config((kwargs.get('cfg') or {}).get('durable'))
        if self.switches.work_dir_lock:
            make_work_dir(work_dir)
        load_from = local_file(load_from) if load_from else load_from
        randomness = dict(randomness or dict(seed=None))
        if resume and self.switches.exact_resume:
            load_from = load_from or str(latest_checkpoint(work_dir) or '') or None
            if load_from:
                # The order of the data follows from the seed, and mmengine builds the data before
                # it reads the checkpoint.
                meta = load_file(load_from, mmap=True).get('meta', {})
                randomness['seed'] = meta.get('seed', randomness.get('seed'))
        self._resumed = (load_from or latest_checkpoint(work_dir)) if resume else None
        own = dict(load_from=load_from, resume=resume, randomness=randomness)
        super().__init__(model, work_dir, *args, **own, **kwargs)
        show_on_console(self.logger, overview=False)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build a logger that leaves environment, config and hooks to the log file."""
        logger = super().build_logger(*args, **kwargs)
        if self.switches.summary:
            show_on_console(logger, overview=True)
        return logger

    def train(self) -> nn.Module:
        """Train; if that fails, log the iteration and the checkpoint to continue from."""
        try:
            with ExitStack() as stack:
                if self.switches.work_dir_lock:
                    lock = lock_work_dir(self.work_dir, self._resumed)
                    on_main_process(lambda: stack.enter_context(lock))
                return super().train()
        except Exception as e:
            error = explain_error(e) if self.switches.data_checks else e
            begun = self.message_hub.get_info('iter') is not None
            at = f' in iteration {self.iter + 1}' if begun else ''
            last = latest_checkpoint(self.work_dir)
            kept = f'\nThe last checkpoint is {last}; --resume continues from it.' if last else ''
            if not getattr(e, 'said_elsewhere', False):
                self.logger.error(f'training ended{at}: {type(error).__name__}: {error}{kept}')
            if error is e:
                raise
            raise error from e
        finally:
            for hook in self.hooks:
                if isinstance(hook, InterruptHook):
                    hook.release()

    def test(self) -> dict[str, float]:
        """Test the model with weights that all fit."""
        self._strict = True
        return super().test()

    def val(self) -> dict[str, float]:
        """Validate the model with weights that all fit."""
        self._strict = True
        return super().val()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint whose weights all fit."""
        self._strict = True
        super().resume(filename, *args, **kwargs)

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module\.', ''),),
    ) -> dict[str, Any]:
        """Load a checkpoint; a URL is downloaded first.

        Raises:
            OSError: If there is no such file, or it cannot be downloaded.
            CheckpointError: If it is not safe to read or does not hold the backbone.
            RuntimeError: If weights are missing or left over, in a test or a resumed run.
        """
        if not self.switches.safe_loading:
            return super().load_checkpoint(filename, map_location, strict, [*revise_keys])
        # mmengine's own loading turns its safety off for a file that fails it. The file is read
        # once: a second reader could take the same bytes for something else.
        filename = local_file(filename)
        checkpoint = load_file(filename)
        strict = strict or self._strict
        if 'state_dict' not in checkpoint:  # weights alone, or an official file
            under_model = isinstance(checkpoint.get('model'), Mapping)
            checkpoint = dict(state_dict=checkpoint['model'] if under_model else checkpoint)
        if not strict:
            self._check_backbone(checkpoint, filename)
        checkpoint['state_dict'] = plain_keys(checkpoint['state_dict'])
        check_finite(checkpoint['state_dict'], filename)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        state = checkpoint['state_dict']
        for pattern, replacement in revise_keys:
            for key in list(state):
                state[re.sub(pattern, replacement, key)] = state.pop(key)
        load_state_dict(unwrapped(self.model), state, strict, self.logger)
        self._has_loaded = True  # or mmengine loads `load_from` over it
        self.logger.info(f'loaded {filename}')
        return checkpoint

    def _check_backbone(self, content: Mapping[str, Any], filename: str) -> None:
        """Check that a checkpoint holds the backbone, whatever its heads are.

        For a model without a backbone, at least one weight must fit.
        """
        found = plain_keys(content['state_dict'])
        own = unwrapped(self.model).state_dict()
        backbone = {key: own[key] for key in own if key.startswith('backbone.')}
        own = backbone or own
        lacking = [
            key
            for key, value in own.items()
            if key not in found or getattr(found[key], 'shape', None) != value.shape
        ]
        if lacking and (backbone or len(lacking) == len(own)):
            raise CheckpointError(
                f'{filename} lacks {len(lacking)} of {len(own)} weights of this model or has them '
                f'in other shapes: {join_first(lacking)}. Name the weights of a backbone alone, '
                'official ones too, in the init_cfg of the backbone'
            )

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint as mmengine does; a local file is written whole or not at all."""
        remote = kwargs.get('backend_args') or '://' in str(out_dir)
        if remote or not self.switches.checkpoints:
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        path = Path(out_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with write_whole(path) as file:  # mmengine opens it again, by name
                partial = Path(file.name)
                super().save_checkpoint(str(partial.parent), partial.name, *args, **kwargs)
        except OSError as e:
            raise OSError(
                e.errno,
                f'{e.strerror}: {path} could not be written; older checkpoints are kept. Make '
                'room, then continue with --resume',
            ) from e

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Start gloo on machines without a GPU, where mmengine would ask for one."""
        if self._several_on_cpu and self.launcher == 'pytorch' and not is_distributed():
            seconds = env_cfg.get('dist_cfg', {}).get('timeout', 1800)
            torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Wrap the model for several processes.

        On CPUs this leaves out what needs a GPU: SyncBN, which becomes BN, and the device id that
        mmengine passes.
        """
        options = dict(model_wrapper_cfg or {})
        wrapper = options.pop('type', 'MMDistributedDataParallel')
        if not self._several_on_cpu or wrapper != 'MMDistributedDataParallel':
            return super().wrap_model(model_wrapper_cfg, model)
        options.setdefault('broadcast_buffers', False)
        options.setdefault('find_unused_parameters', self.cfg.get('find_unused_parameters', False))
        return MMDistributedDataParallel(revert_sync_batchnorm(model), **options)

    @property
    def _several_on_cpu(self) -> bool:
        return self.switches.cpu_processes and self.distributed and not torch.cuda.is_available()

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """Build the loop as mmengine does, over data that can be resumed."""
        if self.switches.exact_resume and isinstance(self._train_dataloader, Mapping):
            self._train_dataloader = resumable(self._train_dataloader, self.seed)
        return super().build_train_loop(loop)

    # Not static, as mmengine's own is: the switches are those of the runner.
    def build_dataloader(
        self, dataloader: DataLoader[Any] | dict[str, Any], *args: Any, **kwargs: Any
    ) -> DataLoader[Any]:
        """Build a dataloader as mmengine does, with checks of its data.

        All processes have to call this.

        Raises:
            DataError: If the data are missing or do not fill a batch.
        """
        if not isinstance(dataloader, Mapping):
            return dataloader
        if self.switches.data_checks:
            dataloader = checked(dataloader)
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        if self.switches.interrupts:
            loader.worker_init_fn = partial(init_worker, loader.worker_init_fn)
        if self.switches.data_checks and len(loader) == 0:
            raise DataError(
                f'{len(loader.dataset)} images do not fill a batch in each process: lower '
                'batch_size of the dataloader, or set drop_last=False'
            )
        return loader

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """Build an evaluator as mmengine does; the error of a faulty annotation file names it."""
        with explained_evaluator(evaluator) if self.switches.data_checks else nullcontext():
            return super().build_evaluator(evaluator)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Build an optimizer wrapper; on a GPU, Adam and AdamW get kernels that can skip a step."""
        if self.switches.non_finite_guard and torch.cuda.is_available():
            optim_wrapper = use_fused_adam(optim_wrapper)
        return super().build_optim_wrapper(optim_wrapper)

    def scale_lr(
        self, optim_wrapper: OptimWrapper, auto_scale_lr: dict[str, Any] | None = None
    ) -> None:
        """Scale the learning rate by the total batch, accumulated batches included."""
        if self.switches.scale_accumulated_lr and auto_scale_lr and auto_scale_lr.get('enable'):
            base = auto_scale_lr['base_batch_size'] / accumulated_batches(optim_wrapper)
            auto_scale_lr = dict(auto_scale_lr, base_batch_size=base)
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Register hooks as mmengine does, and those of the parts that are on."""
        on = self.switches
        default_hooks = dict(default_hooks or {})
        checkpoint = default_hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        is_default = isinstance(checkpoint, Mapping) and checkpoint['type'] == 'CheckpointHook'
        if on.checkpoints and is_default:
            default_hooks['checkpoint'] = dict(checkpoint, type='DurableCheckpointHook')
        super().register_hooks(default_hooks, custom_hooks)
        # A hook in the config has options of its own, such as patience.
        configured = any(isinstance(hook, NonFiniteLossHook) for hook in self.hooks)
        for hook, is_on in (
            (ExactResumeHook, on.exact_resume),
            (ValidationOnResumeHook, on.exact_resume),
            (CheckDataHook, on.data_checks),
            (InterruptHook, on.interrupts),
            (NonFiniteLossHook, on.non_finite_guard and not configured),
            (AverageBuffersHook, self._several_on_cpu),
            (RunSummaryHook, on.summary),
        ):
            if is_on:
                self.register_hook(hook())


GFNetRunner = DurableRunner  # the name in earlier configs and scripts
