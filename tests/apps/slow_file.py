# SPDX-License-Identifier: MIT OR Apache-2.0
"""A file system of one file, `pages`, whose reads go into the reader's memory directly (FUSE_DIRECT_IO) and take long.

Usage: slow_file.py DIRECTORY, as root; it is mounted there until this program ends. Each 8 bytes of page n are n times MULTIPLIER.
The protocol is that of linux/fuse.h.
"""
import ctypes
import errno
import os
import struct
import sys
import time

MULTIPLIER = 0x9E3779B97F4A7C15
PAGE = 4096
SIZE = 4096 * PAGE
# How long memory is pinned.
READ_SECONDS = 0.02

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 14, 15, 18, 25, 26, 36, 42
DIRECT_IO = 1
ROOT, FILE = 1, 2


def attributes(node):
    """`struct fuse_attr`."""
    mode, size = (0o040755, 0) if node == ROOT else (0o100444, SIZE)
    return struct.pack("<QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, PAGE, 0)


def answer(code, node, body):
    """The error, or the bytes of the reply; None if there is to be none."""
    if code in (FORGET, BATCH_FORGET, INTERRUPT):
        return None
    if code == INIT:
        major, minor, readahead, _ = struct.unpack_from("<IIII", body)
        return struct.pack("<IIIIHHII9I", major, min(minor, 31), readahead, 0, 12, 9, PAGE, 1, *[0] * 9)
    if code == LOOKUP:
        if body.rstrip(b"\0") != b"pages":
            return errno.ENOENT
        return struct.pack("<QQQQII", FILE, 0, 60, 60, 0, 0) + attributes(FILE)
    if code == GETATTR:
        return struct.pack("<QII", 60, 0, 0) + attributes(node)
    if code == OPEN:
        return struct.pack("<QII", 0, DIRECT_IO, 0)
    if code == READ:
        _, offset, size = struct.unpack_from("<QQI", body)
        time.sleep(READ_SECONDS)
        pages = range(offset // PAGE, min(offset + size, SIZE) // PAGE)
        return b"".join(struct.pack("<Q", n * MULTIPLIER % 2**64) * (PAGE // 8) for n in pages)
    if code in (RELEASE, FLUSH):
        return b""
    return errno.ENOSYS


def main():
    """Mounts and serves."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    where = os.fsencode(sys.argv[1])
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % device
    if libc.mount(b"slow_file", where, b"fuse.slow_file", 0, options) != 0:
        sys.exit("mount: " + os.strerror(ctypes.get_errno()))
    try:
        while True:
            request = os.read(device, 1 << 20)
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            reply = answer(code, node, request[40:])
            if reply is None:
                continue
            error, data = (-reply, b"") if isinstance(reply, int) else (0, reply)
            try:
                os.write(device, struct.pack("<IiQ", 16 + len(data), error, unique) + data)
            except FileNotFoundError:
                # Whoever asked is gone.
                pass
    except OSError:
        # Unmounted.
        pass


main()
