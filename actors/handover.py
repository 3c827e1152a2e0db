"""Values between two processes of one machine: what is large lies in memory that both see, and is never copied through
a pipe, to a disk or over a network.

The memory has no name (memfd_create): only who is handed its descriptor can open it, and it is gone when the last
process that has it ends, however that ends. A value whose receiver was killed is made again from what is stored.
"""

import errno
import io
import mmap
import os
import pickle
import socket
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 2**16                                     # of a tensor; smaller ones go with the rest
MOST_TENSORS = 64                                       # of one value
FULL = {errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS}
HEAD = struct.Struct("<QI")                             # bytes of the rest, tensors


class Closed(ConnectionError):
    """The other process has ended."""


def send(connection: socket.socket, value: Any) -> None:
    """Raises Closed; OSError where there is no memory for it."""
    files: list[int] = []
    try:
        body = io.BytesIO()
        Packer(body, files).dump(value)
        data = body.getbuffer()
        try:
            socket.send_fds(connection, [HEAD.pack(len(data), len(files))], files)
            connection.sendall(data)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise Closed(str(error)) from error
    finally:
        for file in files:
            os.close(file)


def receive(connection: socket.socket) -> Any:
    """Raises Closed; TimeoutError where the connection has a limit; OSError or MemoryError where there is no room for
    the value, after which nothing more can be received.
    """
    files: list[int] = []
    try:
        try:
            head, files, _, _ = socket.recv_fds(connection, HEAD.size, MOST_TENSORS)
            while 0 < len(head) < HEAD.size:
                head += connection.recv(HEAD.size - len(head)) or fail()
            length, sent = HEAD.unpack(head or fail())
            data, at = memoryview(bytearray(length)), 0
            while at < length:
                at += connection.recv_into(data[at:]) or fail()
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(str(error)) from error
        if len(files) < sent:                           # the system drops what this process has no descriptor for
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Opener(io.BytesIO(data), files).load()
    finally:
        for file in files:
            os.close(file)


def fail() -> Any:
    raise Closed("the other process has closed the connection")


class Packer(pickle.Pickler):
    def __init__(self, body: io.BytesIO, files: list[int]):
        super().__init__(body, protocol=pickle.HIGHEST_PROTOCOL)
        self.files = files

    def persistent_id(self, value: Any) -> tuple[int, str, tuple[int, ...]] | None:
        if not isinstance(value, Tensor) or value.nbytes < LEAST_BYTES:
            return None
        file = os.memfd_create("dailies", os.MFD_CLOEXEC)
        self.files.append(file)
        os.posix_fallocate(file, 0, value.nbytes)      # refused here, or SIGBUS where it is written
        with mmap.mmap(file, value.nbytes) as memory:
            place = np.frombuffer(memory, np.uint8)
            place[:] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            del place                                   # a mapping that something looks into cannot be closed
        return len(self.files) - 1, str(value.dtype).removeprefix("torch."), tuple(value.shape)


class Opener(pickle.Unpickler):
    def __init__(self, body: io.BytesIO, files: list[int]):
        super().__init__(body)
        self.files = files

    def persistent_load(self, said: tuple[int, str, tuple[int, ...]]) -> Tensor:
        place, dtype, shape = said
        memory = mmap.mmap(self.files[place], 0)        # lives as long as the tensor
        return torch.frombuffer(memory, dtype=getattr(torch, dtype)).reshape(shape)
