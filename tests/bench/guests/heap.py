#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A guest of the bench with a heap of python objects: `heap.py OBSERVER BYTES`.

Ticks and answers as ticker.c does (observer.h has the layout), as far as the bench asks it to: RESET, TOUCH, FORK, VERIFY,
SAMPLE and EXIT.
"""

import hashlib
import mmap
import os
import struct
import sys
import time

RESET, TOUCH, FORK, VERIFY, SAMPLE, EXIT = 1, 2, 3, 7, 9, 10
MAGIC, READY, REQUEST, HANDLED, COMMAND = range(5)
TICKS, LONGEST, GAPS, GAPS_NS, WORK, STARTED, CHILD, MEMORY = range(8, 16)
RESULT = 16
TICK_NS = 100_000


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def build(wanted):
    """A list of records of small objects of several types, until the process has grown by the wanted bytes."""
    heap = []
    until = resident_bytes() + wanted
    while resident_bytes() < until:
        first = len(heap)
        heap.extend(
            {"id": i, "name": f"record {i}", "tags": [i % 7, i % 11, str(i)], "weight": i / 3.0} for i in range(first, first + 5000)
        )
    return heap


def digest(heap):
    hashed = hashlib.blake2b()
    for record in heap[::97]:
        hashed.update(repr(record).encode())
    return hashed.digest()


def fork_ns():
    before = time.monotonic_ns()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    taken = time.monotonic_ns() - before
    os.waitpid(pid, 0)
    return taken


def main():
    file = os.open(sys.argv[1], os.O_RDWR)
    shared = memoryview(mmap.mmap(file, 4096 + 8 * 4096)).cast("Q")
    os.close(file)
    heap = build(int(sys.argv[2]))
    expected = digest(heap)
    shared[MEMORY] = resident_bytes()
    clock = time.monotonic_ns
    started = last = clock()
    slot = ticks_before = longest = gaps = gaps_ns = 0
    shared[READY] = 1
    while True:
        t = clock()
        gap = t - last
        last = t
        if gap > TICK_NS:
            gaps += 1
            gaps_ns += gap
            longest = max(longest, gap)
        if t // TICK_NS != slot:
            slot = t // TICK_NS
            shared[TICKS] += 1
        if shared[REQUEST] == shared[HANDLED]:
            continue
        command = shared[COMMAND]
        answer = []
        if command == RESET:
            longest = gaps = gaps_ns = 0
            ticks_before = shared[TICKS]
            started = clock()
        elif command == TOUCH:
            # Reading an object writes its reference count.
            for record in heap:
                record["id"]
        elif command == FORK:
            taken = fork_ns()
            for record in heap:
                record["id"]
            answer = [taken, taken, 1]
        elif command == VERIFY:
            answer = [int(digest(heap) != expected), 1, 0]
        elif command == SAMPLE:
            answer = [clock() - started, 0, shared[TICKS] - ticks_before, longest, gaps_ns, gaps]
        for i, value in enumerate(answer):
            shared[RESULT + i] = value
        last = clock()
        shared[HANDLED] = shared[REQUEST]
        if command == EXIT:
            return


if __name__ == "__main__":
    if struct.calcsize("Q") != 8 or sys.byteorder != "little":
        sys.exit("this bench is for 64-bit little-endian machines")
    main()
