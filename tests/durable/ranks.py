"""Runs of two processes: ranks.py FOLDER. Each process is a fork, which spares the imports."""

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from faults import FAULTS, apply, make_config, scans, write_data
from toy import LossesHook, losses, toy_config

from gfnet_dense import cli
from gfnet_dense.data import DataError, report
from gfnet_dense.durable import data_checks
from gfnet_dense.durable.ranks import on_main_process
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


def ended(children: list[int]) -> list[int]:
    """Return the exit codes of processes."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def then(iteration: int, who: int, what: Callable[[], object]) -> Callable[[int], None]:
    """Return how one of the processes is prepared to do something in an iteration."""

    def prepare(rank: int) -> None:
        if rank == who:
            LossesHook.then = (iteration, what)

    return prepare


def config(work_dir: Path, processes: int = 2) -> object:
    """Return the toy run, with a batch that does not depend on the processes."""
    cfg = toy_config(work_dir)
    cfg.train_dataloader.batch_size = 8 // processes
    cfg.auto_scale_lr = dict(base_batch_size=16)
    return cfg


def a_signal_to_one_stops_both(folder: Path, whole: Path) -> None:
    """The checkpoint is of an iteration that both have completed, and the run goes on from it."""
    terminate = then(5, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def run(resume: str | None = None) -> None:
        options = dict(seed=3, auto_scale_lr=True, resume=resume)
        train(config(folder), launcher='pytorch', **options)

    children = start(folder, run, terminate)
    assert ended(children) == [143, 143]
    assert max(losses(folder, 0)) == max(losses(folder, 1)) == 5
    assert ended(start(folder, lambda: run('auto'))) == [0, 0]
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
    assert ended(start(two, lambda: run(two, launcher='pytorch'))) == [0, 0]
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


def the_first_process_checks_the_data_for_both(folder: Path) -> None:
    """Folders before the data set is built, the rest before the first iteration."""

    def run(name: str, **dataset: object) -> list[str]:
        def note(rank: int) -> None:
            def noted(check: Callable[..., None]) -> Callable[..., None]:
                def call(*args: object, **kwargs: object) -> None:
                    with open(folder / name / f'checked{rank}', 'a') as file:
                        print(check.__name__, file=file)
                    check(*args, **kwargs)

                return call

            def inspect(*args: object, **kwargs: object) -> None:
                raise DataError('an annotation is broken')

            data_checks.check_folders = noted(data_checks.check_folders)
            data_checks.inspect = noted(inspect)

        cfg = config(folder / name)
        cfg.train_dataloader.dataset.update(dataset)
        children = start(folder / name, lambda: train(cfg, launcher='pytorch'), note)
        assert ended(children) == [1, 1]
        assert not (folder / name / 'checked1').exists()
        return (folder / name / 'checked0').read_text().split()

    calls = run('folder', data_root='/no/such', data_prefix=dict(img='images'))
    assert calls == ['check_folders']
    calls = run('annotation')
    assert calls == ['check_folders', 'check_folders', 'inspect']
    for rank in range(2):
        output = (folder / 'folder' / f'rank{rank}').read_text()
        assert 'DataError: ToyData: there is no folder /no/such/images' in output, output
        output = (folder / 'annotation' / f'rank{rank}').read_text()
        assert 'DataError: an annotation is broken' in output, output


def the_first_process_says_what_is_wrong_with_files(folder: Path) -> None:
    """It alone opens them and prints the fault, and both end at once."""
    root = write_data(folder / 'data')
    fault = FAULTS['truncated_scan']
    cfg = apply(make_config('classification', root), fault.make(root))
    cfg.custom_hooks = []
    cfg.dump(folder / 'config.py')

    def run() -> None:
        def noted(*args: object, **kwargs: object) -> object:
            (folder / f'read{os.environ["RANK"]}').touch()
            return read(*args, **kwargs)

        read, report.read_contents = report.read_contents, noted
        options = ['--work-dir', str(folder / 'run'), '--launcher', 'pytorch']
        sys.argv = ['train.py', str(folder / 'config.py'), *options]
        sys.exit(cli.main('train'))

    begun = time.monotonic()
    assert ended(start(folder, run)) == [1, 1]
    assert time.monotonic() - begun < 60
    assert [path.name for path in folder.glob('read*')] == ['read0']
    first, second = [(folder / f'rank{rank}').read_text() for rank in range(2)]
    assert first.count(f'\nDataError: {scans(root)[3]} {fault.says}') == 1, first
    assert 'DataError' not in second and fault.says not in second, second


def checks_may_take_longer_than_a_collective(folder: Path) -> None:
    """The others wait for the first process, and see its error."""

    def fail() -> None:
        time.sleep(4)
        raise DataError('found late')

    def run() -> None:
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=1))
        on_main_process(lambda: time.sleep(4))
        on_main_process(fail)

    assert ended(start(folder, run)) == [1, 1]
    for rank in range(2):
        assert 'DataError: found late' in (folder / f'rank{rank}').read_text()


def a_loss_that_is_not_finite_in_one_process_is_no_step_in_both(folder: Path) -> None:
    """Both have the weights and the running statistics of the iteration before."""

    def run() -> None:
        broken = (5, 6) if os.environ['RANK'] == '1' else ()
        cfg = config(folder)
        cfg.model.update(broken=broken, norm=True)
        cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
        runner = train(cfg, seed=3, launcher='pytorch')
        torch.save(runner.model.module.state_dict(), folder / f'state{runner.rank}')

    assert ended(start(folder, run)) == [0, 0]
    states = [torch.load(folder / f'state{rank}') for rank in range(2)]
    saved = [torch.load(folder / f'iter_{n}.pth', weights_only=False) for n in (4, 6, 7)]
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key
        four, six, seven = (checkpoint['state_dict'][key] for checkpoint in saved)
        assert seven.isfinite().all() and not torch.equal(six, seven), key
        if key.startswith('layers.'):
            assert torch.equal(four, six), key


def a_process_that_stops_answering_is_not_awaited_for_ever(folder: Path) -> None:
    """As on a machine that is gone: nothing closes its connections. The config says how long."""

    def run() -> None:
        cfg = config(folder)
        cfg.env_cfg = dict(dist_cfg=dict(timeout=5))
        train(cfg, launcher='pytorch')

    stop = then(5, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    waiting, stopped = start(folder, run, stop)
    try:
        assert ended([waiting]) == [1]
    finally:
        os.kill(stopped, signal.SIGKILL)
    ended([stopped])
    output = (folder / 'rank0').read_text()
    assert f'The last checkpoint is {folder}/iter_3.pth; --resume continues' in output, output


def main(folder: Path) -> None:
    """Run all."""
    torch.set_num_threads(1)
    gc.freeze()  # mmengine collects garbage for every data set
    two = one_or_two_processes_see_the_same(folder / 'same')
    accumulated_batches_count(folder / 'accumulated')
    a_signal_to_one_stops_both(folder / 'signal', two)
    a_process_that_stops_answering_is_not_awaited_for_ever(folder / 'silent')
    the_first_process_checks_the_data_for_both(folder / 'checks')
    the_first_process_says_what_is_wrong_with_files(folder / 'files')
    checks_may_take_longer_than_a_collective(folder / 'long')
    a_loss_that_is_not_finite_in_one_process_is_no_step_in_both(folder / 'finite')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
