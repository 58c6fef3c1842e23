"""A page-fault handler as many were written: poll, read one message, COPY one page. For test_conformance.py.

    python naive_handler.py SOCKET SNAPSHOT [--break WHAT]

It knows nothing of discards, of pages that are there already, of EAGAIN, of addresses within a page, or of handshakes
longer than its buffer, and dies of the first error. --break makes something else wrong that it does right.
"""

import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time

PAGE = 4096
UFFDIO_COPY = 0xC028AA03
UFFDIO_UNREGISTER = 0x8010AA01
PAGEFAULT = 0x12


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def main(path, snapshot, broken=""):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    connection, _ = listener.accept()
    body, fds, _, _ = socket.recv_fds(connection, 1024, 1)
    if broken == "deaf" and (not fds or not body.startswith(b"[{")):
        signal.pause()
    regions = json.loads(body)
    uffd = fds[0]
    os.set_blocking(uffd, False)
    if broken == "old-fields":
        assert all(region["page_size"] == PAGE for region in regions)
    if broken == "new-fields":
        assert all(len(region) <= 5 for region in regions)
    if broken == "late":
        time.sleep(0.05)
        os.read(uffd, 1 << 16)
    if broken == "unregisters":

        def unregister(*_):
            for region in regions:
                fcntl.ioctl(uffd, UFFDIO_UNREGISTER, struct.pack("QQ", region["base_host_virt_addr"], region["size"]))
            os._exit(0)

        signal.signal(signal.SIGTERM, unregister)
    if broken == "unstoppable":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    file = open(snapshot, "rb")  # noqa: SIM115
    content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    staging = mmap.mmap(-1, PAGE)
    while True:
        waits = [uffd, connection] if broken == "hangs-up" else [uffd]
        if connection in select.select(waits, [], [])[0]:
            sys.exit("the VMM has gone")
        try:
            messages = os.read(uffd, 32 * (16 if broken == "batches" else 1))
        except BlockingIOError:
            continue
        for event, address in struct.iter_unpack("=B15xQ8x", messages):
            if event != PAGEFAULT:
                continue
            region = next(r for r in regions if 0 <= address - r["base_host_virt_addr"] < r["size"])
            position = address - region["base_host_virt_addr"] + region["offset"]
            target, length, source = address, PAGE, address_of(content) + position
            if broken == "offsets":
                source -= region["offset"]
            elif broken == "content":
                source = address_of(content) + (position + PAGE) % len(content)
            elif broken == "holes" and not any(content[position : position + PAGE]):
                continue
            elif broken == "around":
                into = position % (4 * PAGE)
                target, length, source = address - into, 4 * PAGE, source - into
            elif broken == "short-reads":
                staging[:] = os.pread(file.fileno(), PAGE, position).ljust(PAGE, b"\0")
                source = address_of(staging)
            try:
                fcntl.ioctl(uffd, UFFDIO_COPY, struct.pack("QQQQq", target, source, length, 0, 0))
            except FileExistsError:
                if broken != "no-wake":
                    raise


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if argument != "--break"])
