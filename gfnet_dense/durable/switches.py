"""Which parts of the runner are on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Switches:
    """The key `durable` of a config: `durable = dict(data_checks=False)` switches one part off.

    All parts are on by default. Without a part, the runner does what mmengine's own does.

    Attributes:
        checkpoints: Write checkpoints whole or not at all, remove an older one only after the newer
            one is written, and save numbers of metrics as Python's, which load safely anywhere.
        safe_loading: Execute nothing from a checkpoint. Resume and test only from checkpoints whose
            weights all fit, and start training only from those that hold the backbone.
        exact_resume: Continue with the same data, random numbers and validations as a run that was
            never interrupted.
        interrupts: On SIGTERM and Ctrl-C, finish the iteration and save a checkpoint.
        non_finite_guard: Skip optimizer steps along gradients that are not finite, and stop after
            some in a row.
        data_checks: Check the data before training, and name the file of a sample that fails.
        work_dir_lock: Allow one training in a work directory at a time, and none over the
            checkpoints of another.
        cpu_processes: Train in several processes on machines without a GPU (launcher pytorch).
        scale_accumulated_lr: Let `auto_scale_lr` count accumulated batches, too.
        summary: Log model, data, batch and learning rate before the first iteration, and leave the
            config and the list of hooks, of hundreds of lines, to the log file.
    """

    checkpoints: bool = True
    safe_loading: bool = True
    exact_resume: bool = True
    interrupts: bool = True
    non_finite_guard: bool = True
    data_checks: bool = True
    work_dir_lock: bool = True
    cpu_processes: bool = True
    scale_accumulated_lr: bool = True
    summary: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> 'Switches':
        """Read the key `durable` of a config.

        Raises:
            ValueError: If there is no such switch, or its value is neither True nor False.
        """
        known = [field.name for field in fields(cls)]
        for name, value in (config or {}).items():
            if name not in known:
                raise ValueError(f'durable has no switch {name}: it has {", ".join(known)}')
            if not isinstance(value, bool):
                raise ValueError(f'durable.{name} must be True or False, but got {value!r}')
        return cls(**(config or {}))
