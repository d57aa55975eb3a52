"""Official weights by name, from servers on this machine, faults included."""

import hashlib
import importlib.util
import logging
import os
import re
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from processes import run
from torch import nn

from gfnet_dense.models import GFNet, GFNetPyramid, hub
from gfnet_dense.models.checkpoint import CheckpointError, check_official
from gfnet_dense.models.gfnet import HIERARCHICAL, ISOTROPIC, Architecture, official_network
from gfnet_dense.models.hub import ADDRESSES, OFFICIAL_WEIGHTS, DownloadError

NANO = Architecture(embed_dims=8, depths=2, patch_size=16)
PARTIAL = f'gfnet-nano.pth.{socket.gethostname()}.partial'


class Server(ThreadingHTTPServer):
    """Answers as told, at /first/... and /second/..., and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.released = threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)

    @property
    def address(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, *_) -> None:
        """Say nothing of clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.answers[self.path.split('/')[1]](self)

    def log_message(self, *_) -> None:
        pass

    def head(self, status: int = 200, kind: str = 'application/octet-stream', **headers) -> None:
        self.send_response(status)
        self.send_header('Content-Type', kind)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), str(value))
        self.end_headers()


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    """The server in place of the official ones, and a very small network among their weights."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(
        hub, 'ADDRESSES', tuple(f'{server.address}/{place}/{{}}' for place in ('first', 'second'))
    )
    monkeypatch.setattr(hub, 'TIMEOUT', 0.5)
    monkeypatch.setitem(OFFICIAL_WEIGHTS, 'gfnet-nano', ('one', 'two'))
    monkeypatch.setitem(ISOTROPIC, 'nano', NANO)
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture
def log(monkeypatch) -> list[str]:
    lines = []

    def notice(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return False

    monkeypatch.setattr(hub._logger, 'filters', [notice])
    monkeypatch.setattr(hub._logger, 'level', logging.INFO)
    hub._logger.manager._clear_cache()
    return lines


def content_of(state: object) -> bytes:
    file = Path('content.pth')
    torch.save(state, file)
    return file.read_bytes()


def nano(**changes) -> nn.Module:
    return GFNet(**{'arch': 'nano', 'num_classes': 1000, **changes})


@pytest.fixture
def content(tmp_path, server, monkeypatch) -> bytes:
    """What the authors would have published."""
    monkeypatch.chdir(tmp_path)
    model = nano()
    nn.init.normal_(model.head.weight)
    return content_of({'model': model.state_dict(), 'epoch': 299})


def digest(model: nn.Module) -> str:
    weights = (value.numpy().tobytes() for _, value in sorted(model.state_dict().items()))
    return hashlib.sha256(b''.join(weights)).hexdigest()


# What servers answer


def whole(content: bytes) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head(Content_Length=len(content))
        handler.wfile.write(content)

    return answer


def unsized(content: bytes) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head()
        handler.wfile.write(content)

    return answer


def in_pieces(content: bytes, end: bytes = b'0\r\n\r\n') -> Callable:
    def answer(handler: Handler) -> None:
        handler.protocol_version = 'HTTP/1.1'
        handler.head(Transfer_Encoding='chunked', Connection='close')
        handler.wfile.write(b'%x\r\n%s\r\n' % (len(content), content) + end)
        handler.close_connection = True

    return answer


def kept_open(content: bytes) -> Callable:
    """A server that leaves the end of the connection to the client."""

    def answer(handler: Handler) -> None:
        whole(content)(handler)
        handler.wfile.flush()
        handler.server.released.wait(10)

    return answer


def elsewhere(place: str) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head(302, Location=f'{handler.server.address}/{place}/')

    return answer


def cut(content: bytes) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head(Content_Length=len(content))
        handler.wfile.write(content[: len(content) // 2])

    return answer


def stalled(content: bytes) -> Callable:
    def answer(handler: Handler) -> None:
        cut(content)(handler)
        handler.wfile.flush()
        handler.server.released.wait(10)

    return answer


def trickling(content: bytes) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head(Content_Length=len(content))
        for byte in content:
            handler.wfile.write(bytes([byte]))
            if handler.server.released.wait(0.05):
                break

    return answer


def silent(handler: Handler) -> None:
    handler.server.released.wait(10)


def hung_up(handler: Handler) -> None:
    handler.close_connection = True


def page(kind: str) -> Callable:
    body = b'<!DOCTYPE html><html><head><title>Quota\n&amp; more</title></head></html>'

    def answer(handler: Handler) -> None:
        handler.head(kind=kind, Content_Length=len(body))
        handler.wfile.write(body)

    return answer


def status(code: int) -> Callable:
    return lambda handler: handler.send_error(code)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def without(state: dict, *keys: str) -> dict:
    return {key: value for key, value in state.items() if key not in keys}


FAULTS = {
    'page': (
        lambda c: page('text/html; charset=utf-8'),
        'the server sent a web page in place of the file: Quota & more',
    ),
    'page_as_a_file': (
        lambda c: page('application/octet-stream'),
        'the download is not a checkpoint',
    ),
    'not_found': (lambda c: status(404), 'HTTP Error 404: Not Found'),
    'server_error': (lambda c: status(500), 'HTTP Error 500'),
    'cut': (cut, r'cut after \d+ of \d+ bytes'),
    'cut_unsized': (lambda c: unsized(c[: len(c) // 2]), 'the download is not a checkpoint'),
    'cut_in_pieces': (lambda c: in_pieces(c, end=b''), 'IncompleteRead'),
    'empty': (lambda c: whole(b''), 'the download is not a checkpoint'),
    'stalled': (stalled, 'timed out'),
    'silent': (lambda c: silent, 'timed out'),
    'trickling': (trickling, 'slower than 10000 bytes per second'),
    'hung_up': (lambda c: hung_up, 'closed connection without response'),
    'round_and_round': (lambda c: elsewhere('first'), 'HTTP Error 302'),
    'of_another_size': (
        lambda c: whole(content_of(GFNet('ti', img_size=16, num_classes=1000).state_dict())),
        r'the download: holds ti \(.*model is nano \(',
    ),
    'of_another_grid': (
        lambda c: whole(content_of(nano(img_size=384).state_dict())),
        r'the download: resized from grid \(24, 24\)',
    ),
    'of_other_classes': (
        lambda c: whole(content_of(nano(num_classes=10).state_dict())),
        r'the download: not used by this network: head.*lacks head\.bias, head\.weight',
    ),
    'incomplete': (
        lambda c: whole(content_of(without(nano().state_dict(), 'blocks.0.norm1.bias'))),
        r'the download: lacks blocks\.0\.norm1\.bias',
    ),
    'without_norm': (
        lambda c: whole(content_of(without(nano().state_dict(), 'norm.weight'))),
        r'the download: lacks norm\.weight',
    ),
    'malicious': (
        lambda c: whole(content_of({'model': nano().state_dict(), 'args': Malicious()})),
        'the download is not safe to read: it asks for posix.mkdir',
    ),
}
WAITED_FOR = ('stalled', 'silent', 'trickling')
faults = pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        pytest.param(*fault, id=name, marks=[pytest.mark.slow] * (name in WAITED_FOR))
        for name, fault in FAULTS.items()
    ],
)


# When it works


@pytest.mark.parametrize(
    'answer',
    [whole, unsized, in_pieces, kept_open, lambda c: elsewhere('second')],
    ids=['whole', 'unsized', 'in_pieces', 'kept_open', 'elsewhere'],
)
def test_a_name_is_downloaded_once(server, folder, content, log, answer):
    server.answers = {'first': answer(content), 'second': whole(content)}
    state = torch.get_rng_state()
    first, second = nano(), nano()
    used = torch.get_rng_state()
    first.load_pretrained('gfnet-nano')
    assert torch.equal(torch.get_rng_state(), used)
    assert not torch.equal(used, state)
    asked = list(server.requests)
    assert asked[0] == '/first/one'
    second.load_pretrained('gfnet-nano')
    assert server.requests == asked
    assert digest(first) == digest(second)
    assert (folder / 'gfnet-nano.pth').read_bytes() == content
    assert first.loaded_from == str(folder / 'gfnet-nano.pth')
    assert {path.name for path in folder.iterdir()} == {'gfnet-nano.pth', 'gfnet-nano.pth.lock'}
    assert len(log) == 2  # from where to where, and that it is done
    assert all(str(folder / 'gfnet-nano.pth') in line for line in log)


def test_the_file_is_readable_as_any_other(server, folder, content):
    server.answers['first'] = whole(content)
    nano().load_pretrained('gfnet-nano')
    Path('other').touch()
    assert (folder / 'gfnet-nano.pth').stat().st_mode == Path('other').stat().st_mode


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_drawn_on_terminals_only(server, content, monkeypatch, capsys, terminal):
    server.answers['first'] = whole(content)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal, raising=False)
    nano().load_pretrained('gfnet-nano')
    drawn = capsys.readouterr().err
    assert ('100%' in drawn and 'gfnet-nano' in drawn) == terminal
    assert terminal or drawn == ''


@faults
def test_the_second_address_stands_in(server, folder, content, log, fault, reason):
    server.answers = {'first': fault(content), 'second': whole(content)}
    nano().load_pretrained('gfnet-nano')
    assert (folder / 'gfnet-nano.pth').read_bytes() == content
    assert re.search(rf'{server.address}/first/one: .*{reason}', '\n'.join(log), re.DOTALL)
    assert server.requests[-1] == '/second/two'
    assert not Path('executed').exists()


# When nothing does


@faults
def test_nothing_is_kept_and_the_error_says_what_to_do(server, folder, content, fault, reason):
    server.answers = {'first': fault(content), 'second': status(403)}
    model = nano()
    before = digest(model)
    with pytest.raises(DownloadError) as e:
        model.load_pretrained('gfnet-nano')
    text = str(e.value)
    assert re.search(rf'{server.address}/first/one: .*{reason}', text, re.DOTALL)
    assert f'{server.address}/second/two: HTTP Error 403' in text
    assert str(folder / 'gfnet-nano.pth') in text
    assert 'init_cfg' in text
    assert PARTIAL not in text
    assert len(text) < 1500
    assert [path.name for path in folder.iterdir()] == ['gfnet-nano.pth.lock']
    assert digest(model) == before
    assert not Path('executed').exists()

    server.answers['first'] = whole(content)
    model.load_pretrained('gfnet-nano')
    assert digest(model) != before


def test_no_network(server, folder, monkeypatch):
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        address = f'http://127.0.0.1:{closed.getsockname()[1]}/{{}}'
        monkeypatch.setattr(hub, 'ADDRESSES', (address, 'http://no-such-host.invalid/{}'))
        with pytest.raises(DownloadError, match=r'one: .*refused(.|\n)*invalid/two: .') as e:
            nano().load_pretrained('gfnet-nano')
    assert str(folder / 'gfnet-nano.pth') in str(e.value)


@pytest.mark.parametrize('name', OFFICIAL_WEIGHTS)
def test_the_published_addresses_are_named(tmp_path, monkeypatch, name):
    """Behind a proxy that does not answer: nothing of this leaves the machine."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(DownloadError) as e:
        GFNet({'embed_dims': 8, 'depths': 1}, img_size=16).load_pretrained(name)
    tsinghua, google = OFFICIAL_WEIGHTS[name]
    for part in (
        f'https://cloud.tsinghua.edu.cn/f/{tsinghua}/?dl=1: ',
        f'https://drive.usercontent.google.com/download?id={google}&export=download&confirm=t: ',
        str(tmp_path / 'hub' / 'checkpoints' / f'{name}.pth'),
    ):
        assert part in str(e.value)


def test_official_weights_are_those_of_the_seven_sizes():
    assert list(OFFICIAL_WEIGHTS) == [f'gfnet-{name}' for name in (*ISOTROPIC, *HIERARCHICAL)]
    ids = [i for pair in OFFICIAL_WEIGHTS.values() for i in pair]
    assert len(ids) == len(set(ids)) == 14
    assert all(len(pair) == len(ADDRESSES) for pair in OFFICIAL_WEIGHTS.values())


@pytest.mark.slow
def test_each_name_stands_for_its_own_size(tmp_path):
    names = list(OFFICIAL_WEIGHTS)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        network = GFNetPyramid if '-h-' in name else GFNet
        with torch.device('meta'):
            state = network(name.removeprefix('gfnet-'), num_classes=1000).state_dict()
        # All elements of a tensor are the same one, so that the file is small.
        state = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
        torch.save({'model': state}, tmp_path / name)
        check_official(official_network, name, tmp_path / name)
        size, another = (n.removeprefix('gfnet-') for n in (name, other))
        with pytest.raises(CheckpointError, match=rf'holds {size} \(.* model is {another} \('):
            check_official(official_network, other, tmp_path / name)


# What happens on this side


def test_an_interrupted_download_leaves_nothing(server, folder, content, monkeypatch):
    server.answers['first'] = whole(content)

    def interrupt(*_) -> None:
        assert (folder / PARTIAL).read_bytes() == content
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch('gfnet-nano', interrupt)
    assert [path.name for path in folder.iterdir()] == ['gfnet-nano.pth.lock']
    nano().load_pretrained('gfnet-nano')


def test_a_file_is_on_the_disk_before_it_has_its_name(server, folder, content, monkeypatch):
    """Or a machine that stops could leave the name with less than the whole content."""
    server.answers['first'] = whole(content)
    synced = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        # First the file, then the folder that has its name.
        assert stat.S_ISDIR(status.st_mode) == bool(synced) == (folder / 'gfnet-nano.pth').exists()
        assert synced or status.st_size == len(content)
        synced.append(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    nano().load_pretrained('gfnet-nano')
    assert len(synced) == 2


def test_a_full_disk_is_named_and_leaves_nothing(server, folder, content):
    server.answers = {'first': whole(content), 'second': whole(content)}
    folder.mkdir(parents=True)
    (folder / PARTIAL).symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left on device') as e:
        nano().load_pretrained('gfnet-nano')
    assert str(folder / 'gfnet-nano.pth') in str(e.value)
    assert server.requests == ['/first/one']  # the other address would not help
    assert [path.name for path in folder.iterdir()] == ['gfnet-nano.pth.lock']
    nano().load_pretrained('gfnet-nano')


def test_a_file_put_there_by_hand_is_taken_as_it_is(server, folder, content):
    folder.mkdir(parents=True)
    (folder / 'gfnet-nano.pth').write_bytes(content[:-1000])
    with pytest.raises(CheckpointError, match='get the file again') as e:
        nano().load_pretrained('gfnet-nano')
    assert str(folder / 'gfnet-nano.pth') in str(e.value)
    (folder / 'gfnet-nano.pth').write_bytes(content)
    nano().load_pretrained('gfnet-nano')
    assert server.requests == []


# Several processes


def run_processes(mode: str, server: Server) -> str:
    script = Path(__file__).parent / 'hub_processes.py'
    return run(sys.executable, script, mode, server.address).stdout


@pytest.mark.slow
def test_processes_of_a_group_download_once_and_speak_once(server, content):
    def slowly(handler: Handler) -> None:
        time.sleep(1)
        whole(content)(handler)

    server.answers['first'] = slowly
    out = run_processes('together', server)
    assert server.requests == ['/first/one']
    assert out.count('loaded by a process') == 4
    # The log of a run, which mmengine writes for the first process, says it once.
    times = 1 if importlib.util.find_spec('mmengine') else 0
    assert out.count('resized from grid (14, 14) to (32, 32), bicubic: pos_embed') == times
    assert out.count('resized from grid (14, 14) to (32, 32), bilinear: blocks.0') == times
    assert out.count('not used by this network: head.weight, head.bias') == times
    assert out.count('waiting for another process') <= times


@pytest.mark.slow
def test_a_killed_download_is_taken_over(server, folder, content):
    def stall_at_first(handler: Handler) -> None:
        (stalled if len(server.requests) == 1 else whole)(content)(handler)

    server.answers['first'] = stall_at_first
    out = run_processes('takeover', server)
    assert out.count('loaded by a process') == 1
    assert server.requests == ['/first/one'] * 2
    assert (folder / 'gfnet-nano.pth').read_bytes() == content
    assert {path.name for path in folder.iterdir()} == {'gfnet-nano.pth', 'gfnet-nano.pth.lock'}
