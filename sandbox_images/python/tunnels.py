"""The cell's side of egress: connections to a port of loopback, carried as frames to the controller and back.

PID 1 listens; it never looks at what the bytes are. Deciding, resolving and connecting is the controller's. In both
directions at most WINDOW bytes of a connection are on their way without having been taken, so that neither side fills.
"""

import contextlib
import select
import socket

OPEN, DATA, SHUT, ACK = 5, 6, 7, 8
PORT = 8118
WINDOW = 256 << 10
PART = 64 << 10
MOST = 16


class Connection:
    def __init__(self, number, connection):
        self.number, self.socket = number, connection
        self.unacknowledged = 0
        self.pending = bytearray()
        self.sends = self.receives = True  # which of the two directions is open: out of the cell, into it


def listen():
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", PORT))
    listener.listen(MOST)
    return listener


class Tunnels:
    """All connections of one call. `send` takes (kind, header, payload)."""

    def __init__(self, poll, send, listener):
        self.poll, self.send, self.listener = poll, send, listener
        self.count = 0
        self.by_number, self.by_descriptor = {}, {}
        self.begun = False

    def begin(self):
        """From now on connections are accepted; those that were made before have waited."""
        if not self.begun:
            self.begun = True
            self.poll.register(self.listener, select.POLLIN)

    def ready(self, descriptor, events):
        """Whether this descriptor was ours; does what it is ready for."""
        if descriptor == self.listener.fileno():
            self.accept()
            return True
        connection = self.by_descriptor.get(descriptor)
        if connection is None:
            return False
        try:
            if events & select.POLLOUT:
                self.flush(connection)
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and connection.number in self.by_number:
                self.read(connection)
        except OSError:
            self.drop(connection, reset=True)
        return True

    def accept(self):
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            accepted, _ = self.listener.accept()
            if len(self.by_number) >= MOST:
                accepted.close()
                return
            accepted.setblocking(False)
            self.count += 1
            connection = Connection(self.count, accepted)
            self.by_number[self.count] = self.by_descriptor[accepted.fileno()] = connection
            self.send(OPEN, {"conn": self.count})
            self.watch(connection)

    def read(self, connection):
        if not connection.sends or connection.unacknowledged >= WINDOW:
            if not connection.receives:
                self.drop(connection, reset=True)
            self.watch(connection)
            return
        try:
            data = connection.socket.recv(min(PART, WINDOW - connection.unacknowledged))
        except BlockingIOError:
            return
        if data:
            connection.unacknowledged += len(data)
            self.send(DATA, {"conn": connection.number}, data)
        else:
            connection.sends = False
            self.send(SHUT, {"conn": connection.number})
        self.settle(connection)

    def flush(self, connection):
        if connection.pending:
            try:
                sent = connection.socket.send(connection.pending)
            except BlockingIOError:
                return
            del connection.pending[:sent]
            self.send(ACK, {"conn": connection.number, "bytes": sent})
        self.settle(connection)

    def take(self, kind, header, payload):
        """A frame from the controller. One for a connection that is over is late, and nothing else."""
        connection = self.by_number.get(header["conn"])
        if connection is None:
            return
        if kind == ACK:
            connection.unacknowledged -= header["bytes"]
        elif kind == DATA:
            connection.pending += payload
        elif header.get("reset"):
            self.drop(connection, reset=False)
            return
        else:
            connection.receives = False
        self.settle(connection)

    def settle(self, connection):
        if not connection.receives and not connection.pending:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
            if not connection.sends:
                self.drop(connection, reset=False)
                return
        self.watch(connection)

    def watch(self, connection):
        wanted = select.POLLOUT if connection.pending else 0
        if connection.sends and connection.unacknowledged < WINDOW:
            wanted |= select.POLLIN
        # Not at all, rather than for nothing: a connection that hung up would be told of again and again.
        if wanted:
            self.poll.register(connection.socket, wanted)
        else:
            with contextlib.suppress(KeyError):
                self.poll.unregister(connection.socket)

    def drop(self, connection, *, reset):
        del self.by_number[connection.number], self.by_descriptor[connection.socket.fileno()]
        with contextlib.suppress(KeyError):
            self.poll.unregister(connection.socket)
        connection.socket.close()
        if reset:
            self.send(SHUT, {"conn": connection.number, "reset": True})

    def close(self):
        for connection in list(self.by_number.values()):
            self.drop(connection, reset=False)
        if self.begun:
            self.poll.unregister(self.listener)
