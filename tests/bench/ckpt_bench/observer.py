# SPDX-License-Identifier: MIT OR Apache-2.0
"""The file that a guest shares with the bench. guests/observer.h has the layout and what the commands do."""

import mmap
import os
import time

from .samples import Failure

RESET, TOUCH, FORK, COPY, WRITE, FORK_WRITE, VERIFY, MODE, SAMPLE, EXIT = range(1, 11)
IDLE, WORK, SCATTERED, CLUSTERED = range(4)
_MAGIC, _READY, _REQUEST, _HANDLED, _COMMAND, _ARGUMENT = range(6)
_TICKS, _LONGEST, _GAPS, _GAPS_NS, _WORK, _STARTED, _CHILD, _MEMORY = range(8, 16)
_RESULT = 16
_PATH_BYTES = (384, 1024)
_GAP = 128
_GAPS_KEPT = 128
_BIN = 512
BINS = 4096
BIN_NS = 20_000_000
TICK_NS = 100_000
MAGIC = 0x686E6562
BYTES = 4096 + 8 * BINS


class Observer:
    """One guest, as seen through its file."""

    def __init__(self, path, alive):
        """Makes the file. `alive` raises if the guest is gone."""
        self.path = path
        self.alive = alive
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(file, BYTES)
        self._map = mmap.mmap(file, BYTES)
        os.close(file)
        self._words = memoryview(self._map).cast("Q")
        self._words[_MAGIC] = MAGIC

    def _wait(self, done, what, seconds):
        until = time.monotonic() + seconds
        checked = 0.0
        while not done():
            now = time.monotonic()
            if now > until:
                raise Failure(f"the guest did not {what} within {seconds} s")
            if now - checked > 0.5:
                checked = now
                self.alive()
            time.sleep(0.0005)

    def wait_ready(self, seconds=120):
        """Until the guest has touched its memory."""
        self._wait(lambda: self._words[_READY], "get ready", seconds)

    def ask(self, command, *arguments, path=None, seconds=120):
        """Has the guest do something; its results, in order."""
        if path is not None:
            encoded = os.fsencode(path) + b"\0"
            if len(encoded) > _PATH_BYTES[1] - _PATH_BYTES[0]:
                raise Failure(f"the path {path} is too long for the guest")
            self._map[_PATH_BYTES[0] : _PATH_BYTES[0] + len(encoded)] = encoded
        for i, argument in enumerate(arguments):
            self._words[_ARGUMENT + i] = argument
        self._words[_COMMAND] = command
        request = self._words[_REQUEST] + 1
        self._words[_REQUEST] = request
        self._wait(lambda: self._words[_HANDLED] == request, f"answer command {command}", seconds)
        return list(self._words[_RESULT : _RESULT + 32])

    def ticks(self):
        """How many ticks the guest has seen, ever."""
        return self._words[_TICKS]

    def child_runs(self):
        """Whether the child of FORK_WRITE is still there."""
        return self._words[_CHILD] != 0

    def wait_child(self, seconds=300):
        """Until it is not."""
        self._wait(lambda: not self.child_runs(), "see its child end", seconds)

    def memory_bytes(self):
        """What the guest has touched."""
        return self._words[_MEMORY]

    def work(self):
        """Work done since RESET; in the modes that dirty pages, pages."""
        return self._words[_WORK]

    def gaps(self):
        """The last gaps since RESET that were longer than a tick: (begin, length) in nanoseconds."""
        pairs = [(self._words[_GAP + 2 * i], self._words[_GAP + 2 * i + 1]) for i in range(_GAPS_KEPT)]
        return sorted(pair for pair in pairs if pair[1])

    def bins(self):
        """Work done in each 20 ms since RESET."""
        return list(self._words[_BIN : _BIN + BINS])

    def close(self):
        """Lets go of the file."""
        self._words.release()
        self._map.close()
