"""Helpers that tests of several folders share."""

import functools
import gc
import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from torch import Tensor

# The same examples on every machine, and no folder of examples left behind.
hypothesis.settings.register_profile('repeatable', deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile('repeatable')

# Two processes of tests, and what they start, share two cores: each computes in one thread.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# Nothing leaves this machine, of subprocesses neither: the proxy is a port where nobody answers.
os.environ |= {f'{scheme}_proxy': 'http://127.0.0.1:9' for scheme in ('http', 'https')}
os.environ['no_proxy'] = '127.0.0.1'

# Subprocesses import the stand-ins of tests/stand_ins, too.
paths = [str(Path(__file__).parent / 'stand_ins'), os.environ.get('PYTHONPATH')]
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest, so that no process is left with it at the end."""
    items.sort(key=lambda item: item.path.stem != 'test_gpu_report')


gc.disable()  # until all is imported, which it would slow by a tenth


def pytest_collection_finish() -> None:
    """Prepare a process that runs tests. The one that hands tests out imports nothing large."""
    import torch

    # Tensors of tests are so small that threads cost more than they bring.
    torch.set_num_threads(1)
    # mmengine spends seconds on reading all of mmdet's metafiles for each `mmdet::` base of a
    # config. The tests of the operator and the networks run without mmengine, too.
    if importlib.util.find_spec('mmengine') is not None:
        from mmengine.config import utils

        utils.load = functools.cache(utils.load)
    gc.freeze()  # mmengine collects garbage for every data set: spare it what is imported
    gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    # Without a GPU, torch.manual_seed would note a whole traceback for the GPUs there might be.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.fixture
def golden() -> Callable[[str], 'dict[str, Tensor]']:
    """Return a reader of the numbers that the official code produced."""
    from safetensors.torch import load_file

    return lambda name: load_file(Path(__file__).parent / 'golden' / f'{name}.safetensors')


@pytest.fixture
def relative_error() -> 'Callable[[Tensor, Tensor], float]':
    """Return a measure: the largest deviation, in units of the largest expected value."""

    def measure(actual: 'Tensor', expected: 'Tensor') -> float:
        assert actual.shape == expected.shape
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return measure


@pytest.fixture
def gfnet(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a verb in this process: exit status, output and errors."""
    from mmengine.utils import ManagerMixin

    from gfnet_dense.cli import main

    monkeypatch.setenv('LOCAL_RANK', '0')  # which verbs that know launchers set

    def forget_runs() -> None:
        kinds = [ManagerMixin]
        for kind in kinds:
            kind._instance_dict.clear()
            kinds += kind.__subclasses__()

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr('sys.argv', ['gfnet', *map(str, arguments)])
        # As in a process of its own, nothing is left of other runs, and nothing of this one. Those
        # of one name would share loggers and visualizers, and their folders.
        forget_runs()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            status = main()
        finally:
            forget_runs()
            signal.signal(signal.SIGTERM, handler)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
