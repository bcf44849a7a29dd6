# SPDX-License-Identifier: MIT OR Apache-2.0
"""multiprocessing.Pool whose workers compute with threads: sums checked against a plain computation at the end.

Protocol of all programs here: WORKDIR as the argument; WORKDIR/log gets "begin NONCE", one "step N NONCE" for each step
and "end NONCE", through one descriptor that stays open; WORKDIR/result gets "OK NONCE" or "FAIL NONCE why".
"""

import hashlib
import multiprocessing
import os
import sys
import threading

STEPS = 40
THREADS = 3


def digest(nonce, step, thread):
    """Real work: a chain of hashes."""
    value = f"{nonce}/{step}/{thread}".encode()
    for _ in range(20000):
        value = hashlib.sha256(value).digest()
    return int.from_bytes(value[:6], "big")


def work(argument):
    """Runs in a worker process: one digest per thread, summed up under a lock."""
    nonce, step = argument
    lock = threading.Lock()
    total = [0]

    def part(thread):
        value = digest(nonce, step, thread)
        with lock:
            total[0] += value

    threads = [threading.Thread(target=part, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return step, total[0]


def main():
    workdir = sys.argv[1]
    nonce = os.urandom(16).hex()
    log = open(os.path.join(workdir, "log"), "a", buffering=1)
    print("begin", nonce, file=log)
    sums = {}
    with multiprocessing.Pool(3) as pool:
        for step, total in pool.imap_unordered(work, [(nonce, step) for step in range(STEPS)]):
            sums[step] = total
            print("step", len(sums), nonce, file=log)
    wrong = [step for step in range(0, STEPS, 7) if sums[step] != sum(digest(nonce, step, i) for i in range(THREADS))]
    print("end", nonce, file=log)
    verdict = f"FAIL {nonce} sums of steps {wrong}" if wrong or len(sums) != STEPS else f"OK {nonce}"
    draft = os.path.join(workdir, "result.draft")
    with open(draft, "w") as result:
        result.write(verdict)
    os.rename(draft, os.path.join(workdir, "result"))


if __name__ == "__main__":
    main()
