#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""What steps.c does, in Python: nothing to compile, the functions are found in the interceptor that ckpt has loaded.

    ckpt run --name steps --dump-on request -- python3 examples/hooks/steps.py 100
    ckpt restore steps --copies 3
"""

import contextlib
import ctypes
import random
import sys
import time

NOT_UNDER_CKPT, NOBODY, DUMPED, RESTORED = -1, -4, 1, 2


class Restored(ctypes.Structure):
    """struct ckpt_restored of ckpt-hooks.h."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("restores", ctypes.c_uint32),
        ("of_checkpoint", ctypes.c_uint32),
        ("copy", ctypes.c_uint32),
        ("copies", ctypes.c_uint32),
        ("checkpoint", ctypes.c_uint64),
        ("name", ctypes.c_char * 80),
    ]


ON_DUMP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
ON_RESUME = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
ON_RESTORE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(Restored))


class Hooks(ctypes.Structure):
    """struct ckpt_hooks."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("user", ctypes.c_void_p),
        ("on_dump", ON_DUMP),
        ("on_resume", ON_RESUME),
        ("on_restore", ON_RESTORE),
    ]


# Without ckpt none of them is there.
loaded = ctypes.CDLL(None)
UNDER_CKPT = hasattr(loaded, "ckpt_interceptor_hooks_register")


def register(on_dump, on_resume, on_restore):
    """Registers callbacks. The result must be kept as long as they may be called."""
    hooks = Hooks(ctypes.sizeof(Hooks), None, ON_DUMP(on_dump), ON_RESUME(on_resume), ON_RESTORE(on_restore))
    if UNDER_CKPT and loaded.ckpt_interceptor_hooks_register(ctypes.byref(hooks)) < 0:
        raise OSError("ckpt takes no hooks")
    return hooks


@contextlib.contextmanager
def critical(name):
    """A section in which no dump is made."""
    if UNDER_CKPT:
        loaded.ckpt_interceptor_critical_begin(name.encode())
    try:
        yield
    finally:
        if UNDER_CKPT:
            loaded.ckpt_interceptor_critical_end()


def dump_now(timeout_s=60):
    """Asks for a dump; returns what became of it, and the number of the checkpoint."""
    if not UNDER_CKPT:
        return NOT_UNDER_CKPT, 0
    checkpoint = ctypes.c_uint64()
    result = loaded.ckpt_interceptor_dump_now(ctypes.c_uint32(int(timeout_s * 1000)), ctypes.byref(checkpoint))
    return result, checkpoint.value


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    generator = random.Random(1)

    def on_dump(_user):
        sys.stdout.flush()
        return 0

    def on_resume(_user):
        pass

    def on_restore(_user, restored):
        if restored[0].of_checkpoint > 1:
            generator.seed()
            print("a copy: new random numbers", flush=True)

    kept = register(on_dump, on_resume, on_restore)
    if not UNDER_CKPT:
        print("without ckpt", flush=True)
    for step in range(1, steps + 1):
        with critical("step"):
            generator.random()
            print(f"step {step}", flush=True)
        if step % 10 == 0:
            result, checkpoint = dump_now()
            if result == DUMPED:
                print(f"dumped: checkpoint {checkpoint}", flush=True)
            elif result == RESTORED:
                print(f"restored from checkpoint {checkpoint}", flush=True)
            elif result == NOBODY:
                print("nobody makes dumps: ckpt run --dump-on request", flush=True)
        time.sleep(0.02)
    print("done", flush=True)
    del kept


if __name__ == "__main__":
    main()
