# SPDX-License-Identifier: MIT OR Apache-2.0
"""A long job of several processes: counts primes, step by step, and writes each step down once.

    demo.py LOG STOP

Each of three worker processes counts the primes in its part of a step's range; a thread of the parent collects what they
send. Every line of LOG holds the step, the total so far and a nonce drawn at the start by the parent and by each worker and
held only in memory: a program that was started again would write others. It ends when the file STOP exists.
"""

import multiprocessing
import os
import queue
import secrets
import sys
import threading

WORKERS = 3
SPAN = 6000


def primes_between(start, end):
    """The number of primes in [start, end), by trial division: slow on purpose."""
    count = 0
    for candidate in range(max(start, 2), end):
        divisor = 2
        while divisor * divisor <= candidate:
            if candidate % divisor == 0:
                break
            divisor += 1
        else:
            count += 1
    return count


def work(tasks, results, steps_done, lock):
    """One worker: takes (step, start, end), sends (step, own nonce, primes), until it is sent None."""
    nonce = secrets.token_hex(4)
    while (task := tasks.get()) is not None:
        step, start, end = task
        found = primes_between(start, end)
        with lock:
            steps_done.value += 1
        results.put((step, nonce, found))


def main():
    log_path, stop_path = sys.argv[1:3]
    nonce = secrets.token_hex(8)
    results, lock = multiprocessing.Queue(), multiprocessing.Lock()
    parts_done = multiprocessing.Value("q", 0, lock=False)
    lanes = [multiprocessing.Queue() for _ in range(WORKERS)]
    workers = [multiprocessing.Process(target=work, args=(lane, results, parts_done, lock)) for lane in lanes]
    for worker in workers:
        worker.start()

    # A thread hands the workers' results on, so that the parent has one too.
    collected = queue.Queue()
    threading.Thread(target=lambda: [collected.put(item) for item in iter(results.get, None)], daemon=True).start()

    step, total = 0, 0
    with open(log_path, "a", encoding="ascii", buffering=1) as log:
        while not os.path.exists(stop_path):
            step += 1
            # The ranges repeat, so that steps take the same time for ever.
            base = step % 20 * SPAN * WORKERS
            for index, lane in enumerate(lanes):
                lane.put((step, base + index * SPAN, base + (index + 1) * SPAN))
            parts = [collected.get() for _ in lanes]
            assert all(part[0] == step for part in parts), parts
            assert parts_done.value == step * WORKERS, (parts_done.value, step)
            total += sum(part[2] for part in parts)
            names = ",".join(sorted(part[1] for part in parts))
            line = f"step {step} primes {total} nonce {nonce} workers {names}"
            log.write(line + "\n")
            print(line, flush=True)
        for lane in lanes:
            lane.put(None)
        for worker in workers:
            worker.join()
        log.write(f"done {step} primes {total} nonce {nonce} exits {[worker.exitcode for worker in workers]}\n")


if __name__ == "__main__":
    main()
