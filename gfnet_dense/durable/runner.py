"""mmengine's runner for long runs: safe with files, the same again when resumed, not silent."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce_params, is_distributed, master_only
from mmengine.hooks import Hook
from mmengine.model import (
    MMDistributedDataParallel,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn
from torch.utils.data import DataLoader

from gfnet_dense.data.checks import check_folders, check_heads, check_segmentation
from gfnet_dense.data.coco import check_coco
from gfnet_dense.data.errors import DataError
from gfnet_dense.serialization import CheckpointError, load_file, write_whole

from .checkpoints import SAMPLES_OF_EPOCH, InterruptHook, init_worker, latest_checkpoint
from .non_finite import NonFiniteLossHook
from .peers import watched_peers
from .portable import PortableCheckpointHook
from .resumable import ResumableBatchSampler, resumable, seed_random_numbers


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average running statistics over the processes after each iteration.

    On CPUs BN stands for SyncBN, and without this each process would evaluate a model of its own.
    """

    priority = 'ABOVE_NORMAL'  # before the hooks that save a checkpoint

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Average the floating buffers of the model."""
        buffers = [buffer for buffer in runner.model.buffers() if buffer.is_floating_point()]
        all_reduce_params(buffers, op='mean')


@HOOKS.register_module()
class SamePlaceHook(Hook):
    """Make a resumed run go on where, and as, the uninterrupted one would.

    mmengine restores weights, optimizer and schedules. This restores the place in the data, also
    within an epoch, and makes random numbers follow from seed, rank and iteration.
    """

    priority = 'LOW'  # after mmengine's hook that sets the epoch of the sampler

    def before_train_epoch(self, runner: Runner) -> None:
        """Skip what was trained on, without loading it."""
        loop = runner.train_loop
        batches = loop.dataloader.batch_sampler
        if not isinstance(batches, ResumableBatchSampler):  # a dataloader that came built
            return
        if isinstance(loop, IterBasedTrainLoop):
            epoch, batches.skip = 0, runner.iter
            if hasattr(batches.sampler, 'epoch'):  # not infinite
                epoch, batches.skip = divmod(runner.iter, len(batches))
                batches.sampler.set_epoch(epoch)
            loop.dataloader_iterator._epoch = epoch
            # mmengine's own skipping would load what it skips.
            loop.dataloader_iterator.skip_iter = lambda num_iters: None
        else:
            # In samples, for another batch or number of processes; 0 but for an interrupted epoch.
            samples = runner.message_hub.get_info(SAMPLES_OF_EPOCH, 0)
            batches.skip = samples // (batches.batch_size * runner.world_size)
            runner.message_hub.update_info(SAMPLES_OF_EPOCH, 0)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Seed the random numbers of the iteration."""
        seed_random_numbers(runner.seed, runner.rank, runner.iter)


@HOOKS.register_module()
class ValidationOnResumeHook(Hook):
    """Validate first if the run was ended where a validation was due.

    A checkpoint is saved before the validation of the same iteration.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Validate if that was not done yet."""
        if runner.val_loop is None or runner.iter == 0:
            return
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            done, last = runner.iter, runner.max_iters
        else:
            done, last = runner.epoch, runner.max_epochs
            if runner.message_hub.get_info(SAMPLES_OF_EPOCH, 0):  # within an epoch
                return
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
        if due and runner.message_hub.get_info('validated', None) != done:
            runner.val_loop.run()

    def before_val_epoch(self, runner: Runner) -> None:
        """Note what is validated; nothing is saved before that is done."""
        if isinstance(runner._train_loop, BaseLoop):
            by_iteration = isinstance(runner.train_loop, IterBasedTrainLoop)
            done = runner.iter if by_iteration else runner.epoch
            runner.message_hub.update_info('validated', done)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check the data, and that the model has their classes, before the first iteration."""

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data."""
        self._check(runner, runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Check test data."""
        self._check(runner, runner.test_dataloader)

    def _check(self, runner: Runner, loader: DataLoader) -> None:
        check_segmentation(loader.dataset)
        check_coco(loader.dataset)
        check_heads(runner.model, loader.dataset)


@RUNNERS.register_module()
class GFNetRunner(Runner):
    """mmengine's runner, with these gaps closed.

    - It trains in several processes on machines without a GPU, too (launcher pytorch; slurm and
      mpi need one).
    - It executes nothing from a checkpoint, and evaluates or resumes only what fits.
    - Checkpoints are whole or not there; signals leave one.
    - A resumed run equals the uninterrupted one.
    - It ends, and says why, when data are missing, the loss is not finite or a process dies.
    """

    # What training starts from may lack heads; what is evaluated or resumed may lack nothing.
    _strict = False

    def train(self) -> nn.Module:
        """Train; when it fails, the log says at what and from where to go on."""
        try:
            with watched_peers(self.logger.error):
                return super().train()
        except Exception as e:
            error = _explained(e)
            begun = isinstance(self._train_loop, BaseLoop)
            at = f' in iteration {self.iter + 1}' if begun else ''
            last = latest_checkpoint(self.work_dir)
            kept = f'\nThe last checkpoint is {last}; --resume continues from it.' if last else ''
            self.logger.error(f'training ended{at}: {type(error).__name__}: {error}{kept}')
            if error is e:
                raise
            raise error from e
        finally:
            for hook in self.hooks:
                if isinstance(hook, InterruptHook):
                    hook.release()

    def test(self) -> dict[str, float]:
        """Test the model, on weights that are all there and all used."""
        self._strict = True
        with watched_peers(self.logger.error):
            return super().test()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint whose weights are all there and all used."""
        self._strict = True
        super().resume(filename, *args, **kwargs)

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', strict: bool = False, **kwargs: Any
    ) -> dict:
        """Load a local checkpoint.

        Raises:
            OSError: If there is no such file.
            CheckpointError: If it is not safe to read or does not hold the backbone.
            RuntimeError: If it does not fit the whole model and has to.
        """
        # mmengine's own loading turns its safety off for a file that fails it. The file is read
        # once: a second reader could take the same bytes for something else.
        checkpoint = load_file(filename)
        strict = strict or self._strict
        if not strict:
            self._check_backbone(checkpoint, filename)
        if 'state_dict' not in checkpoint:  # weights alone, or an official file
            checkpoint = dict(state_dict=checkpoint)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        _load_checkpoint_to_model(self._unwrapped, checkpoint, strict, **kwargs)
        self._has_loaded = True
        self.logger.info(f'loaded {filename}')
        return checkpoint

    @property
    def _unwrapped(self) -> nn.Module:
        return self.model.module if is_model_wrapper(self.model) else self.model

    def _check_backbone(self, content: Any, filename: str) -> None:
        """Check that the backbone is in a checkpoint, whatever heads are combined with it."""
        found = content.get('state_dict', content) if isinstance(content, Mapping) else {}
        found = {str(key).removeprefix('module.'): value for key, value in found.items()}
        own = self._unwrapped.state_dict()
        own = {key: own[key] for key in own if key.startswith('backbone.')} or own
        lacking = [
            key
            for key, value in own.items()
            if key not in found or getattr(found[key], 'shape', None) != value.shape
        ]
        if lacking:
            names = ', '.join(lacking[:3]) + (', …' if len(lacking) > 3 else '')
            raise CheckpointError(
                f'{filename} lacks {len(lacking)} of {len(own)} weights of this model or has them '
                f'in other shapes: {names}. Weights of a backbone alone, official ones too, '
                'belong in the init_cfg of the backbone'
            )

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint as mmengine does, a local one whole or not at all."""
        if kwargs.get('backend_args') or '://' in str(out_dir):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        path = Path(out_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with write_whole(path) as file:  # mmengine opens it once more, by name
                partial = Path(file.name)
                super().save_checkpoint(str(partial.parent), partial.name, *args, **kwargs)
        except OSError as e:
            raise OSError(
                e.errno,
                f'{e.strerror}: {path} could not be written and older checkpoints are kept; make '
                'room, then continue with --resume',
            ) from e

    def setup_env(self, env_cfg: dict) -> None:
        """Start gloo where mmengine would ask for a GPU, then go on as mmengine does."""
        on_cpu = not torch.cuda.is_available()
        if on_cpu and self.launcher == 'pytorch' and not is_distributed():
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for several processes, on CPUs without what needs a GPU.

        That is SyncBN, which becomes BN, and the device id that mmengine hands over.
        """
        options = dict(model_wrapper_cfg or {})
        wrapper = options.pop('type', 'MMDistributedDataParallel')
        on_cpu = self.distributed and not torch.cuda.is_available()
        if not on_cpu or wrapper != 'MMDistributedDataParallel':
            return super().wrap_model(model_wrapper_cfg, model)
        options.setdefault('broadcast_buffers', False)
        options.setdefault('find_unused_parameters', self.cfg.get('find_unused_parameters', False))
        return MMDistributedDataParallel(revert_sync_batchnorm(model), **options)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop as mmengine does, over data that can be resumed."""
        if isinstance(self._train_dataloader, Mapping):
            self._train_dataloader = resumable(self._train_dataloader, self.seed)
        return super().build_train_loop(loop)

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args: Any, **kwargs: Any) -> DataLoader:
        """Build a dataloader as mmengine does.

        Raises:
            DataError: If the data are not there.
        """
        if not isinstance(dataloader, Mapping):
            return dataloader
        dataset = dataloader['dataset']
        if isinstance(dataset, Mapping):
            check_folders(dataset)
        if not isinstance(dataset, Mapping) or dataset['type'] != 'SeededDataset':
            # For evaluation, too, it names what cannot be loaded.
            dataset = dict(type='SeededDataset', dataset=dataset, seed=0)
        loader = Runner.build_dataloader(dict(dataloader, dataset=dataset), *args, **kwargs)
        loader.worker_init_fn = partial(init_worker, loader.worker_init_fn)
        if len(loader) == 0:
            raise DataError(
                f'{len(loader.dataset)} images do not fill a batch in each process: lower '
                'batch_size of the dataloader, or set drop_last=False'
            )
        return loader

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate by the total batch, accumulated batches included."""
        steps = getattr(optim_wrapper, '_accumulative_counts', 1)
        if auto_scale_lr and steps > 1:
            base = auto_scale_lr['base_batch_size'] / steps
            auto_scale_lr = dict(auto_scale_lr, base_batch_size=base)
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def register_hooks(
        self, default_hooks: dict | None = None, custom_hooks: list | None = None
    ) -> None:
        """Register hooks as mmengine does, and those that close its gaps."""
        default_hooks = dict(default_hooks or {})
        checkpoint = default_hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        if isinstance(checkpoint, Mapping) and checkpoint['type'] == 'CheckpointHook':
            default_hooks['checkpoint'] = dict(checkpoint, type='DurableCheckpointHook')
        super().register_hooks(default_hooks, custom_hooks)
        closing = [SamePlaceHook(), CheckDataHook(), ValidationOnResumeHook()]
        closing += [InterruptHook(), PortableCheckpointHook()]
        if not any(isinstance(hook, NonFiniteLossHook) for hook in self.hooks):  # with options
            closing.append(NonFiniteLossHook())
        if self.distributed and not torch.cuda.is_available():
            closing.append(AverageBuffersHook())
        for hook in closing:
            self.register_hook(hook)


def _explained(error: Exception) -> Exception:
    """Return an error that says what to do, where torch's own does not."""
    if isinstance(error, (ConnectionError, EOFError)):
        # A data loading process has died. Torch says so a moment later, wherever that may be.
        try:
            time.sleep(1.0)
        except RuntimeError as e:
            error = e
    lines = str(error).rstrip().splitlines()
    if isinstance(error, DataError) and len(lines) > 1:  # with the traceback of another process
        return DataError(lines[-1].partition('DataError: ')[2])
    if str(error).startswith('DataLoader worker'):
        return DataError(
            f'{error}: a process that loads data was killed, as a rule for want of memory: lower '
            'num_workers of the dataloader'
        )
    return error
