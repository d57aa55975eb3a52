"""Notice when another process of a run dies, instead of waiting for its part of a sum.

Collectives wait for all processes, with NCCL for many minutes. Here each process holds a
connection to the first one, which the operating system closes when its process ends, however it
ends. The first tells the others which rank is gone.
"""

import contextlib
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mmengine.dist import broadcast_object_list, get_dist_info

_GRACE = 15.0  # seconds for the main thread to end by itself, by an error of its collective
_CONNECT = 120.0  # seconds to reach the first process
_GOODBYE = 0xFFFFFFFF  # in place of a rank: this process ends as it should


class RankDiedError(RuntimeError):
    """Another process of this run ended before its time."""


@contextlib.contextmanager
def watched_peers(log: Callable[[str], Any]) -> Iterator[None]:
    """Within it, the death of another process of the run ends this one, too, within a minute.

    All processes have to enter and leave it. Alone, a process watches nothing.

    Args:
        log: Called with the message before the process ends.

    Raises:
        RankDiedError: Names the rank, in place of the error of a collective that misses it.
    """
    rank, world_size = get_dist_info()
    if world_size == 1:
        yield
        return
    try:
        peers = _connect(rank, world_size)
    except OSError as e:
        raise RankDiedError(
            f'rank {rank} of {world_size} has no connection to all others within {_CONNECT:.0f} '
            f'seconds, at {os.environ["MASTER_ADDR"]}: {e}; does a firewall close its ports?'
        ) from e
    watch = _Watch(rank, peers, log)
    watch.start()
    try:
        yield
    except RuntimeError as e:  # the kind that collectives raise
        # Was it because of another process? Its connection may end a little after its collective.
        if watch.found.wait(2.0):
            raise RankDiedError(watch.message) from e
        raise
    except (KeyboardInterrupt, SystemExit):  # told to, as all the others are
        watch.say_goodbye()
        raise
    else:
        watch.say_goodbye()
    finally:
        watch.stop()


def _connect(rank: int, world_size: int) -> dict[int, socket.socket]:
    """Return connections by rank: of the first process to all others, of those to the first."""
    listener = None
    address: list[Any] = [None, None]
    if rank == 0:
        listener = socket.create_server(('', 0), backlog=world_size)
        listener.settimeout(_CONNECT)
        address = [listener.getsockname()[1], secrets.token_bytes(16)]
    broadcast_object_list(address)
    port, token = address
    if rank != 0:
        peer = socket.create_connection((os.environ['MASTER_ADDR'], port), timeout=_CONNECT)
        peer.sendall(token + rank.to_bytes(4, 'big'))
        peers = {0: peer}
    else:
        peers = {}
        with listener:
            while len(peers) < world_size - 1:
                peer, _ = listener.accept()
                peer.settimeout(_CONNECT)
                with peer.makefile('rb') as stream:
                    hello = stream.read(len(token) + 4)
                if secrets.compare_digest(hello[:-4], token):
                    peers[int.from_bytes(hello[-4:], 'big')] = peer
                else:  # not one of ours
                    peer.close()
    for peer in peers.values():
        peer.setblocking(True)
        # A machine that is gone closes nothing: ask for a sign of life.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (('TCP_KEEPIDLE', 10), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 4)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peers


class _Watch(threading.Thread):
    def __init__(
        self, rank: int, peers: dict[int, socket.socket], log: Callable[[str], Any]
    ) -> None:
        super().__init__(name='watch-peers', daemon=True)
        self.found = threading.Event()
        self.message = ''
        self._rank = rank
        self._peers = peers
        self._log = log
        self._over = threading.Event()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map() and not self._over.is_set():
                for key, _ in selector.select(timeout=0.2):
                    dead = self._hear(key.fileobj, key.data)
                    if dead == _GOODBYE:
                        selector.unregister(key.fileobj)
                    else:
                        self._end(dead)
                        return

    def _hear(self, peer: socket.socket, rank: int) -> int:
        """Return the rank that is dead according to a connection that has something to read."""
        try:
            news = peer.recv(4, socket.MSG_WAITALL)
        except OSError:
            news = b''
        return int.from_bytes(news, 'big') if len(news) == 4 else rank

    def _end(self, dead: int) -> None:
        self.message = (
            f'rank {dead} has died, and rank {self._rank} cannot go on without it; see the end of '
            "that rank's output for its reason, then continue with --resume"
        )
        self._tell(dead)
        self.found.set()
        self._log(self.message)
        # The main thread may wait in a collective that never ends.
        if not self._over.wait(_GRACE):
            os._exit(1)

    def _tell(self, news: int) -> None:
        for rank, peer in self._peers.items():
            if rank != news:
                with contextlib.suppress(OSError):
                    peer.sendall(news.to_bytes(4, 'big'))

    def say_goodbye(self) -> None:
        self._tell(_GOODBYE)

    def stop(self) -> None:
        self._over.set()
        self.join(timeout=1.0)
        # Only now: what others have sent is not to be lost with the connection.
        for peer in self._peers.values():
            peer.close()
