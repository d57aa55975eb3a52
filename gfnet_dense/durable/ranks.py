"""What concerns the several processes of a run."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mmengine.dist import all_reduce_params, broadcast_object_list, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.distributed import distributed_c10d

_calls = itertools.count()  # of on_main_process; the same in all processes


def on_main_process(function: Callable[[], Any]) -> None:
    """Call a function in the first process alone; all processes raise the error that it raises.

    All processes have to call this. The function may take longer than the timeout of collectives.
    In the other processes, the error has `said_elsewhere = True`: it need not be printed again.
    """
    error: list[Exception | None] = [None]
    # A broadcast gives up after 10 minutes with NCCL, so the others wait on the store first. If the
    # first process dies, they wait until the launcher ends them.
    store = distributed_c10d._get_default_store() if is_distributed() else None
    key = f'on_main_process/{next(_calls)}'
    if is_main_process():
        try:
            function()
        except Exception as e:
            error = [e]
        finally:
            if store is not None:
                store.set(key, '1')
    elif store is not None:
        store.wait([key], timedelta(days=1))
    broadcast_object_list(error)
    if error[0] is not None:
        if not is_main_process():
            error[0].said_elsewhere = True  # type: ignore[attr-defined]
        raise error[0]


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average running statistics over the processes after each iteration.

    On CPUs BN replaces SyncBN. Without this hook, each process would evaluate another model.
    """

    priority = 'ABOVE_NORMAL'  # before the hooks that save a checkpoint

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Average the floating-point buffers of the model."""
        buffers = [buffer for buffer in runner.model.buffers() if buffer.is_floating_point()]
        all_reduce_params(buffers, op='mean')
