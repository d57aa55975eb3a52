"""mmengine's runner, safe with checkpoints and at home on machines without a GPU."""

from typing import Any

import torch
from mmengine.dist import all_reduce_params, is_distributed
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from gfnet_dense.data import DataError
from gfnet_dense.serialization import PLAIN_TYPES, load_file


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


@RUNNERS.register_module()
class GFNetRunner(Runner):
    """mmengine's runner with two gaps closed.

    It trains in several processes on machines without a GPU, too (launcher pytorch; slurm and mpi
    need one). It executes nothing from a checkpoint, and evaluates or resumes only what fits.
    """

    _strict = False

    def test(self) -> dict[str, float]:
        """Test the model, on weights that are all there and all used."""
        self._strict = True
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
            CheckpointError: If it is not safe to read.
            RuntimeError: If it does not fit the model and has to.
        """
        # Here and not in mmengine's loading, which turns its safety off for a file that fails it.
        load_file(filename)
        with torch.serialization.safe_globals(PLAIN_TYPES):
            return super().load_checkpoint(filename, map_location, strict or self._strict, **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """Start gloo where mmengine would ask for a GPU, then go on as mmengine does."""
        on_cpu = not torch.cuda.is_available()
        if on_cpu and self.launcher == 'pytorch' and not is_distributed():
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop.

        Raises:
            DataError: If there are too few images for a single batch.
        """
        loop = super().build_train_loop(loop)
        if len(loop.dataloader) == 0:
            raise DataError(
                f'{len(loop.dataloader.dataset)} training images in {self.world_size} processes '
                'do not fill one batch: take a smaller train_dataloader.batch_size, '
                'or drop_last=False'
            )
        return loop

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate by the total batch, with the batches that are accumulated."""
        if auto_scale_lr and auto_scale_lr.get('enable'):
            steps = optim_wrapper._accumulative_counts
            base = auto_scale_lr['base_batch_size'] / steps
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base}
        super().scale_lr(optim_wrapper, auto_scale_lr)

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
