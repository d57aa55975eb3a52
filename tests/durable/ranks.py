"""Runs of two processes: ranks.py FOLDER. Each process is a fork, which spares the imports."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from toy import LossesHook, losses, toy_config

from gfnet_dense.durable import latest_checkpoint, peers
from gfnet_dense.openmmlab import evaluate, train


def start(
    work_dir: Path,
    function: Callable[[], object],
    prepare: Callable[[int], None] = lambda rank: None,
) -> list[int]:
    """Call a function in two processes, their output in `rank0` and `rank1`; return their ids."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        output = os.open(work_dir / f'rank{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE='2',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
        code = 1
        try:
            prepare(rank)
            function()
            code = 0
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def ended(children: list[int], work_dir: Path, within: float = 60.0) -> list[int]:
    """Return the exit codes of processes, minus the signal where one ended them."""
    codes, deadline = {}, time.monotonic() + within
    while len(codes) < len(children):
        assert time.monotonic() < deadline, (work_dir / 'rank0').read_text()[-2000:]
        for child in {*children} - {*codes}:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[child] for child in children]


def then(iteration: int, who: int, what: Callable[[], object]) -> Callable[[int], None]:
    """Return how one of the processes is prepared to do something in an iteration."""

    def prepare(rank: int) -> None:
        if rank == who:
            LossesHook.then = (iteration, what)

    return prepare


def kill_self() -> None:
    """Die as the kernel makes a process die that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def config(work_dir: Path, processes: int = 2) -> object:
    """Return the toy run, with a batch that does not depend on the processes."""
    cfg = toy_config(work_dir)
    cfg.train_dataloader.batch_size = 8 // processes
    cfg.auto_scale_lr = dict(base_batch_size=16)
    return cfg


def a_dead_rank_is_named(folder: Path, dead: int) -> None:
    """One dies, the other ends and says who."""
    children = start(
        folder, lambda: train(config(folder), launcher='pytorch'), then(5, dead, kill_self)
    )
    codes = ended(children, folder)
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 1, codes
    output = (folder / f'rank{1 - dead}').read_text()
    assert f'RankDiedError: rank {dead} has died' in output, output
    assert latest_checkpoint(folder).name == 'iter_3.pth'


def a_collective_that_never_ends(folder: Path) -> None:
    """With NCCL, the main thread waits and raises nothing."""

    def prepare(rank: int) -> None:
        peers._GRACE = 1.0
        what = kill_self if rank == 1 else lambda: time.sleep(1000)
        LossesHook.then = (5, what)

    children = start(folder, lambda: train(config(folder), launcher='pytorch'), prepare)
    assert ended(children, folder) == [1, -signal.SIGKILL]
    assert 'rank 1 has died' in (folder / 'rank0').read_text()


def a_signal_to_one_stops_both(folder: Path, whole: Path) -> None:
    """The checkpoint is of an iteration that both have completed, and the run goes on from it."""
    terminate = then(5, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def run(resume: str | None = None) -> None:
        options = dict(seed=3, auto_scale_lr=True, resume=resume)
        train(config(folder), launcher='pytorch', **options)

    children = start(folder, run, terminate)
    assert ended(children, folder) == [143, 143]
    assert max(losses(folder, 0)) == max(losses(folder, 1)) == 5
    assert ended(start(folder, lambda: run('auto')), folder) == [0, 0]
    for rank in range(2):
        assert losses(folder, rank) == losses(whole, rank)


def one_or_two_processes_see_the_same(folder: Path) -> Path:
    """The same samples and learning rate each iteration, the same metric over 22 samples."""

    def run(work_dir: Path, **options: object) -> None:
        processes = 2 if options else 1
        train(config(work_dir, processes), seed=3, auto_scale_lr=True, **options)
        metrics = evaluate(
            dict_with_test(config(work_dir, processes)), work_dir / 'iter_12.pth', **options
        )
        (work_dir / 'metrics').write_text(repr(metrics))

    def dict_with_test(cfg: object) -> object:
        cfg.test_dataloader, cfg.test_cfg = cfg.val_dataloader, dict(type='TestLoop')
        cfg.test_evaluator = cfg.val_evaluator
        return cfg

    one, two = folder / 'one', folder / 'two'
    run(one)
    assert ended(start(two, lambda: run(two, launcher='pytorch')), two) == [0, 0]
    alone, both = losses(one), [losses(two, rank) for rank in range(2)]
    for n, (_, rate, *names) in alone.items():
        assert {*names} == {*both[0][n][2:], *both[1][n][2:]}, n
        assert both[0][n][1] == both[1][n][1] == rate
    assert float(alone[1][1]) == 1e-2 * 8 / 16

    # The same weights, evaluated by one and by two processes.
    metrics = evaluate(dict_with_test(config(folder / 'test', 1)), two / 'iter_12.pth')
    in_two = eval((two / 'metrics').read_text())
    assert in_two == metrics and metrics['number'] == 22, (in_two, metrics)
    return two


def accumulated_batches_count(folder: Path) -> None:
    """Four batches of 2 are a batch of 8."""
    cfg = config(folder)
    cfg.train_dataloader.batch_size = 2
    cfg.optim_wrapper.accumulative_counts = 4
    train(cfg, auto_scale_lr=True)
    assert float(losses(folder)[1][1]) == 1e-2 * 8 / 16


def main(folder: Path) -> None:
    """Run all."""
    torch.set_num_threads(1)
    two = one_or_two_processes_see_the_same(folder / 'same')
    accumulated_batches_count(folder / 'accumulated')
    a_dead_rank_is_named(folder / 'dead1', 1)
    a_dead_rank_is_named(folder / 'dead0', 0)
    a_collective_that_never_ends(folder / 'stuck')
    a_signal_to_one_stops_both(folder / 'signal', two)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
