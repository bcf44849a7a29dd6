# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cases. Each function does one repetition, and returns its samples; what is compared is interleaved within it.

Figures of the same name mean the same in all cases:

pause_ms          longest gap that the guest itself saw during a dump
quiet_gap_ms      the same for as long after the dump, when nobody dumps: what the machine's noise is
reported_ms       the pause that ckpt says
gaps_ms           sum of all gaps longer than a tick during the dump and its write
fork_ms           fork() of the same memory by the guest itself; with several processes the sum
dump_s            from the start of `ckpt dump` to its end
throughput_ratio  the guest's memory per dump_s, as a part of the best plain write of it into the same store
peak_mib          the dumper's largest resident set, and the job's init's
first_tick_ms     from the start of `ckpt restore` until the guest ticks
fill_ms           filling fresh memory of the same size from the image's file, the faster of two ways
"""

import contextlib
import csv
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time

from . import observer as ob
from .host import GIB, MIB, Job, Process, read, wait_for
from .samples import Failure, Samples, Unavailable

# What a dump says that it has copied, and its figures.
COPIED = (("held_bytes", "held_mib"), ("early_bytes", "early_mib"), ("duplicated_bytes", "duplicated_mib"))


def ticker(host, memory_bytes, pages="4k", processes=1, threads=1, vmas=0):
    """The command line of the guest, once its observer is known."""
    return lambda path: [host.guest("ticker"), path, *map(str, (memory_bytes, pages, processes, threads, vmas))]


def heap(host, memory_bytes):
    """The same for the guest with a python heap."""
    return lambda path: ["/usr/bin/python3", str(host.guests / "heap.py"), path, str(memory_bytes)]


def fork_times(guest, samples, prefix=""):
    """One fork of the guest's memory, or one of each of its processes."""
    total, longest, count = guest.ask(ob.FORK)[:3]
    samples.add(prefix + "fork_ms", total / 1e6, "ms")
    if count > 1:
        samples.add(prefix + "longest_fork_ms", longest / 1e6, "ms")


def note_dump(samples, job, ran, said, memory_bytes, prefix=""):
    """What every dump is asked."""
    guest = job.observer
    _, _, _, longest, gaps_ns, _ = guest.ask(ob.SAMPLE)[:6]
    samples.add(prefix + "pause_ms", longest / 1e6, "ms")
    samples.add(prefix + "reported_ms", said["pause_ns"] / 1e6, "ms")
    samples.add(prefix + "gaps_ms", gaps_ns / 1e6, "ms")
    samples.add(prefix + "dump_s", ran.wall_ms / 1e3, "s")
    samples.add(prefix + "cpu_user_ms", ran.figures["user_ns"] / 1e6, "ms")
    samples.add(prefix + "cpu_system_ms", ran.figures["system_ns"] / 1e6, "ms")
    guest.ask(ob.RESET)
    time.sleep(min(ran.wall_ms / 1e3, 0.2 if job.host.quick else 2))
    samples.add(prefix + "quiet_gap_ms", guest.ask(ob.SAMPLE)[3] / 1e6, "ms")
    init_kib = job.init_peak_kib()
    samples.add(prefix + "init_peak_mib", init_kib / 1024, "MiB")
    samples.add(prefix + "peak_mib", (ran.figures["peak_kib"] + init_kib) / 1024, "MiB")
    if memory_bytes >= 64 * MIB:
        samples.add(prefix + "throughput", memory_bytes / GIB / (ran.wall_ms / 1e3), "GiB/s")
    for phase, taken in (said.get("phases_ns") or {}).items():
        samples.add(f"{prefix}phase {phase}", taken / 1e6, "ms")
    for field, name in COPIED:
        if said.get(field) is not None:
            samples.add(prefix + name, said[field] / MIB, "MiB")
    samples.note(prefix + "engine", said.get("engine"))
    if said.get("engine_reasons"):
        samples.note(prefix + "engine_reasons", said["engine_reasons"])


def one_dump(samples, job, memory_bytes, *options, prefix=""):
    """Touches all memory, dumps, and notes what it took."""
    job.observer.ask(ob.TOUCH)
    job.observer.ask(ob.RESET)
    ran, said = job.dump(*options)
    note_dump(samples, job, ran, said, memory_bytes, prefix)
    return ran, said


def expect_right(guest):
    """A restore that brings wrong memory back has no time."""
    wrong, pages, taken = guest.ask(ob.VERIFY)[:3]
    if wrong:
        raise Failure(f"{wrong} of {pages} pages are not what they were")
    return taken


def plain_write(host, guest, samples, memory_bytes):
    """The best plain write of the guest's memory into the store, in GiB/s."""
    path = host.store / "plain-write"
    best = None
    # Of large memory only the two that are mostly the best.
    sizes = [256 << 10, 1 << 20, 4 << 20, 64 << 20] if memory_bytes <= GIB else [1 << 20, 64 << 20]
    random.shuffle(sizes)
    for size in sizes:
        taken = guest.ask(ob.WRITE, size, path=path)[0]
        path.unlink()
        best = taken if best is None else min(best, taken)
    samples.add("plain_write", memory_bytes / GIB / (best / 1e9), "GiB/s")
    return best


def pages_file(said):
    """The largest file of an image: that with its pages."""
    return max((entry for entry in os.scandir(said["path"]) if entry.is_file()), key=lambda entry: entry.stat().st_size).path


def fill(host, samples, path, memory_bytes, pages):
    """Fresh memory filled from a file, by the faster of two ways."""
    best = None
    for way in ("read", "populate"):
        taken = int(host.run([host.guest("fill"), path, str(memory_bytes), pages, way]).output)
        best = taken if best is None else min(best, taken)
    samples.add("fill_ms", best / 1e6, "ms")


def main_process(init_pid, main_pid):
    """The pid on this host of the job's main process, which has the pid `main_pid` in the job."""
    for child in read(f"/proc/{init_pid}/task/{init_pid}/children").split():
        found = re.search(r"^NSpid:.*\b(\d+)$", read(f"/proc/{child}/status"), re.MULTILINE)
        if found and int(found.group(1)) == main_pid:
            return int(child)
    raise Failure(f"init {init_pid} has no child that is {main_pid} in the job")


def resident_after(pid, memory_bytes, started_ns, seconds):
    """Milliseconds from the start until the process has all its memory."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = read(f"/proc/{pid}/statm")
        if not text:
            raise Failure(f"the restored process {pid} is gone")
        if int(text.split()[1]) * 4096 >= memory_bytes:
            return (time.monotonic_ns() - started_ns) / 1e6
        time.sleep(0.001)
    raise Unavailable(f"not all of the memory was resident after {seconds} s")


def restores(host, samples, job, said, memory_bytes, pages, big):
    """Restores the job eagerly and lazily, beside filling memory from the same file."""
    job.kill()
    if big:
        fill(host, samples, pages_file(said), memory_bytes, pages)
    ran, answer = job.restore()
    samples.add("first_tick_ms", ran.figures["first_tick_ns"] / 1e6, "ms")
    for phase, taken in (answer.get("phases_ns") or {}).items():
        samples.add(f"restore_phase {phase}", taken / 1e6, "ms")
    samples.add("restore_s", ran.wall_ms / 1e3, "s")
    samples.add("restore_peak_mib", ran.figures["peak_kib"] / 1024, "MiB")
    expect_right(job.observer)
    job.kill()
    if not host.has_option("restore", "--lazy"):
        for name in ("lazy_first_tick_ms", "lazy_resident_ms", "lazy_touched_ms"):
            samples.unavailable(name, "this ckpt has no `restore --lazy`")
        return
    ran, answer = job.restore("--lazy")
    if big and "not lazily" in ran.errors:
        reason = ran.errors.split("not lazily:")[-1].strip()[:200]
        for name in ("lazy_first_tick_ms", "lazy_resident_ms", "lazy_touched_ms"):
            samples.unavailable(name, f"restored as a whole: {reason}")
        job.kill()
        return
    samples.add("lazy_first_tick_ms", ran.figures["first_tick_ns"] / 1e6, "ms")
    for phase, taken in (answer.get("phases_ns") or {}).items():
        samples.add(f"restore_phase lazy {phase}", taken / 1e6, "ms")
    if ran.errors:
        samples.note("lazy said", ran.errors[-300:])
    if big:
        started = ran.figures["started_ns"]
        try:
            samples.add("lazy_resident_ms", resident_after(main_process(answer["init_pid"], answer["main_pid"]), memory_bytes, started, 60), "ms")
        except Unavailable as error:
            samples.unavailable("lazy_resident_ms", str(error))
    expect_right(job.observer)
    job.kill()
    if big:
        # All at once by the guest itself, from the first tick on, against the background.
        ran, _ = job.restore("--lazy")
        expect_right(job.observer)
        samples.add("lazy_touched_ms", (time.monotonic_ns() - ran.figures["started_ns"]) / 1e6, "ms")
        job.kill()


def criu(host, samples, command):
    """Dump and restore by CRIU, if there is one that works here."""
    program = shutil.which("criu")
    if not program:
        raise Unavailable("no criu on PATH")
    if os.geteuid() != 0:
        raise Unavailable("criu needs root")
    check = subprocess.run([program, "check"], capture_output=True, text=True, check=False)
    if check.returncode != 0:
        said = (check.stderr or check.stdout).strip().splitlines() or ["no reason given"]
        raise Unavailable(f"criu check fails on this kernel: {said[-1]}")
    images = host.store / host.fresh("criu")
    images.mkdir()
    with Process(host, command) as guest:
        guest.observer.ask(ob.RESET)
        ran = host.run([program, "dump", "-t", guest.pid, "-D", images, "--leave-running", "--shell-job", "-o", "dump.log"], check=False)
        if ran.figures["status"] != 0:
            raise Unavailable(f"criu dump failed: {' '.join(read(images / 'dump.log').splitlines()[-2:])[-300:]}")
        samples.add("criu_pause_ms", guest.observer.ask(ob.SAMPLE)[3] / 1e6, "ms")
        samples.add("criu_dump_s", ran.wall_ms / 1e3, "s")
        guest.kill()
        restore = [program, "restore", "-D", images, "-d", "--shell-job", "-o", "restore.log"]
        ran = host.run(restore, ticks=guest.observer.path, check=False)
        if ran.figures["status"] != 0 or not ran.figures["first_tick_ns"]:
            raise Unavailable(f"criu restore failed: {' '.join(read(images / 'restore.log').splitlines()[-2:])[-300:]}")
        samples.add("criu_first_tick_ms", ran.figures["first_tick_ns"] / 1e6, "ms")
    shutil.rmtree(images, ignore_errors=True)


def try_criu(host, samples, command):
    """The same; a reason instead of figures where it cannot."""
    try:
        criu(host, samples, command)
    except Unavailable as error:
        samples.unavailable("criu_pause_ms", str(error))


def memory(host, megabytes, pages, dumps=2):
    """One process with so much memory: pause, throughput, restore, and all that they are compared with."""
    samples = Samples()
    memory_bytes = megabytes * MIB
    big = megabytes >= 64
    command = ticker(host, memory_bytes, pages)
    with Job(host, command, f"m{megabytes}{pages}") as job:
        guest = job.observer
        said = None
        for _ in host.times(dumps):
            if said:
                host.quietly([host.ckpt, "rm", said["checkpoint"]])
            if big:
                fork_times(guest, samples)
                samples.add("memcpy_ms", guest.ask(ob.COPY)[0] / 1e6, "ms")
            # Before and after, as the file system's speed changes with what it has just freed.
            best = plain_write(host, guest, samples, memory_bytes) if big else None
            ran, said = one_dump(samples, job, memory_bytes)
            if big:
                samples.add("throughput_ratio", best / 1e6 / ran.wall_ms, "ratio")
                samples.add("pause_by_fork", samples.metrics["pause_ms"][1][-1] / samples.metrics["fork_ms"][1][-1], "ratio")
                samples.add("image_mib", said["bytes"] / MIB, "MiB")
        restores(host, samples, job, said, memory_bytes, pages, big)
    if megabytes <= 1024:
        try_criu(host, samples, command)
    return samples


def idle(host):
    """A program without memory to speak of."""
    return memory(host, 0, "4k", dumps=5)


def processes(host):
    """16 processes of 64 MiB; the first one ticks."""
    samples = Samples()
    count, each = (4, 16 * MIB) if host.quick else (16, 64 * MIB)
    with Job(host, ticker(host, each, processes=count), "processes") as job:
        said = None
        for _ in host.times(3):
            if said:
                host.quietly([host.ckpt, "rm", said["checkpoint"]])
            fork_times(job.observer, samples)
            _, said = one_dump(samples, job, count * each)
        restores(host, samples, job, said, count * each, "4k", False)
    return samples


def threads(host):
    """100 threads, of which one ticks."""
    samples = Samples()
    command = ticker(host, 0, threads=20 if host.quick else 100)
    with Job(host, command, "threads") as job:
        said = None
        for _ in host.times(5):
            _, said = one_dump(samples, job, 0)
        restores(host, samples, job, said, 0, "4k", False)
    try_criu(host, samples, command)
    return samples


def vmas(host):
    """5000 mappings of a page."""
    samples = Samples()
    command = ticker(host, 0, vmas=500 if host.quick else 5000)
    with Job(host, command, "vmas") as job:
        said = None
        for _ in host.times(3):
            fork_times(job.observer, samples)
            _, said = one_dump(samples, job, 0)
        restores(host, samples, job, said, 0, "4k", False)
    try_criu(host, samples, command)
    return samples


def python(host):
    """A python program with a heap of small objects."""
    samples = Samples()
    memory_bytes = 32 * MIB if host.quick else 512 * MIB
    with Job(host, heap(host, memory_bytes), "python") as job:
        said = None
        for _ in host.times(3):
            if said:
                host.quietly([host.ckpt, "rm", said["checkpoint"]])
            fork_times(job.observer, samples)
            _, said = one_dump(samples, job, memory_bytes)
        restores(host, samples, job, said, memory_bytes, "4k", False)
    return samples


def _window(guest, seconds):
    """Lets the guest work, and returns its work a second, and the part of the ticks that it saw, since RESET."""
    time.sleep(seconds)
    return _rates(guest)


def _rates(guest):
    elapsed, work, ticks = guest.ask(ob.SAMPLE)[:3]
    return work / (elapsed / 1e9), ticks / (elapsed / ob.TICK_NS), elapsed


def ticks(host):
    """What an application loses that writes all over its memory, from the start of a dump until 30 s after its end.

    A tick is what the guest does in 100 us when nobody disturbs it: 64-bit writes at random places, as fast as it can.
    """
    samples = Samples()
    memory_bytes = 64 * MIB if host.quick else GIB
    after, control = (1, 1) if host.quick else (30, 6)
    fork_file = host.store / "fork-write"
    with Job(host, ticker(host, memory_bytes), "ticks") as job:
        guest = job.observer
        guest.ask(ob.MODE, ob.WORK)

        def undisturbed():
            guest.ask(ob.RESET)
            rate, seen, _ = _window(guest, control)
            return rate, seen

        def dump():
            guest.ask(ob.RESET)
            ran, said = job.dump()
            guest_rates = _window(guest, after)
            samples.add("dump_s", ran.wall_ms / 1e3, "s")
            for field, name in COPIED:
                if said.get(field) is not None:
                    samples.add(name, said[field] / MIB, "MiB")
            host.quietly([host.ckpt, "rm", said["checkpoint"]])
            return guest_rates

        def fork_and_write():
            guest.ask(ob.RESET)
            begun = time.monotonic()
            guest.ask(ob.FORK_WRITE, path=fork_file)
            guest.wait_child()
            samples.add("fork_write_s", time.monotonic() - begun, "s")
            rates = _window(guest, after)
            fork_file.unlink()
            return rates

        ways = [("dump", dump), ("fork_write", fork_and_write)]
        random.shuffle(ways)
        before, seen_before = undisturbed()
        for name, way in ways:
            rate, seen, elapsed = way()
            longest = guest.ask(ob.SAMPLE)[3]
            bins = guest.bins()[: int(elapsed // ob.BIN_NS)]
            again, seen_again = undisturbed()
            control_rate = (before + again) / 2
            lost = 1 - rate / control_rate
            samples.add(f"{name}_lost", lost * 100, "%")
            samples.add(f"{name}_lost_ms", lost * elapsed / 1e6, "ms")
            samples.add(f"{name}_longest_ms", longest / 1e6, "ms")
            samples.add(f"{name}_slots_lost", (1 - seen / ((seen_before + seen_again) / 2)) * 100, "%")
            samples.note(f"{name}_series", [round(b / (control_rate * ob.BIN_NS / 1e9), 3) for b in bins])
            before, seen_before = again, seen_again
        samples.note("bin_ms", ob.BIN_NS // 1_000_000)
    return samples


def _incremental(host, mode):
    host.need_option("dump", "--incremental")
    samples = Samples()
    memory_bytes = 64 * MIB if host.quick else GIB
    rate = 10_000  # of a million pages a second: 1 %
    with Job(host, ticker(host, memory_bytes), "incremental") as job:
        guest = job.observer
        # The first arms the tracking; whatever it is, the second is the full image that the others are measured by.
        _, full = one_dump(samples, job, memory_bytes, "--incremental", prefix="full_")
        guest.ask(ob.MODE, mode, rate)
        fork_times(guest, samples)
        samples.metrics.pop("full_throughput", None)
        # fork has written to all pages: what follows must begin with a dump that has caught up.
        guest.ask(ob.RESET)
        job.dump("--incremental")
        frozen = time.monotonic()
        for _ in range(2) if host.quick else host.times(6):
            time.sleep(max(0.0, 1.0 - (time.monotonic() - frozen)))
            dirtied = guest.work()
            begun = time.monotonic()
            guest.ask(ob.RESET)
            ran, said = job.dump("--incremental")
            if not said.get("parent"):
                raise Failure(f"a dump that should be incremental is full: {said.get('warnings')} {ran.errors}")
            interval = begun - frozen
            frozen = begun
            note_dump(samples, job, ran, said, memory_bytes)
            samples.add("interval_s", interval, "s")
            samples.add("dirty_percent", dirtied / (memory_bytes / 4096) * 100, "%")
            samples.add("image_percent", said["bytes"] / full["bytes"] * 100, "%")
            samples.add("image_mib", said["bytes"] / MIB, "MiB")
            samples.add("pause_per_gib_ms", samples.metrics["pause_ms"][1][-1] / (memory_bytes / GIB), "ms")
        samples.metrics.pop("throughput", None)
        guest.ask(ob.MODE, ob.IDLE)
        job.kill()
        ran, _ = job.restore()
        samples.add("first_tick_ms", ran.figures["first_tick_ns"] / 1e6, "ms")
        expect_right(guest)
    return samples


def incremental_scattered(host):
    """1 GiB of which 1 % of the pages, scattered, are dirtied in each second."""
    return _incremental(host, ob.SCATTERED)


def incremental_clustered(host):
    """1 GiB of which 1 % of the pages, side by side, are dirtied in each second."""
    return _incremental(host, ob.CLUSTERED)


def shared(host):
    """512 MiB of shared memory of which 1 % of the pages, scattered, are dirtied in each second."""
    samples = Samples()
    memory_bytes = (64 if host.quick else 512) * MIB
    with Job(host, ticker(host, memory_bytes, "shared"), "shared") as job:
        guest = job.observer
        guest.ask(ob.MODE, ob.SCATTERED, 10_000)
        for _ in range(2) if host.quick else host.times(3):
            samples.add("memcpy_ms", guest.ask(ob.COPY)[0] / 1e6, "ms")
            guest.ask(ob.RESET)
            ran, said = job.dump()
            note_dump(samples, job, ran, said, memory_bytes)
        guest.ask(ob.MODE, ob.IDLE)
        job.dump()
        job.kill()
        job.restore()
        expect_right(guest)
    return samples


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _redis_cli(port, *command, seconds=120):
    run = subprocess.run(
        ["redis-cli", "-p", str(port), *command], capture_output=True, text=True, timeout=seconds, check=False
    )
    return run.stdout.strip()


def _redis_load(port, seconds, rate, during):
    """Runs redis-benchmark for about so long, and something a second after its start: p99 and worst latency in ms."""
    requests = max(20_000, int(rate * seconds))
    command = ["redis-benchmark", "-p", str(port), "-c", "8", "-t", "set", "-d", "1000", "-r", "1000000", "-n", str(requests), "--csv"]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as load:
        try:
            time.sleep(min(1.0, seconds / 4))
            during()
            inside = load.poll() is None
            output, _ = load.communicate(timeout=seconds * 10 + 60)
        finally:
            if load.poll() is None:
                load.kill()
    rows = list(csv.DictReader(output.splitlines()))
    if not rows or "max_latency_ms" not in rows[-1]:
        raise Failure(f"redis-benchmark said {output[-300:]!r}")
    row = rows[-1]
    took = time.monotonic() - begun
    return float(row["p99_latency_ms"]), float(row["max_latency_ms"]), requests / took, inside


def redis(host):
    """redis with 1 GiB under redis-benchmark: nothing, BGSAVE, or a dump going on."""
    for program in ("redis-server", "redis-benchmark", "redis-cli"):
        if not shutil.which(program):
            raise Unavailable(f"{program} is not installed")
    samples = Samples()
    port = _free_port()
    keys = 60_000 if host.quick else 1_000_000
    directory = host.scratch / host.fresh("redis")
    directory.mkdir()
    server = [
        shutil.which("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(directory),
        "--enable-debug-command", "yes", "--rdbcompression", "no", "--daemonize", "no",
    ]  # fmt: skip
    with Job(host, server, "redis", observed=False) as job:
        wait_for(lambda: _redis_cli(port, "PING") == "PONG", 20, "redis answers")
        _redis_cli(port, "DEBUG", "POPULATE", str(keys), "key", "1000", seconds=300)
        samples.note("keys", _redis_cli(port, "DBSIZE"))

        def bgsave():
            begun = time.monotonic()
            _redis_cli(port, "BGSAVE")
            wait_for(lambda: "rdb_bgsave_in_progress:0" in _redis_cli(port, "INFO", "persistence"), 300, "BGSAVE ends")
            samples.add("bgsave_s", time.monotonic() - begun, "s")

        def dump():
            ran, said = job.dump("--tcp", "close")
            samples.add("dump_s", ran.wall_ms / 1e3, "s")
            samples.add("reported_ms", said["pause_ns"] / 1e6, "ms")
            host.quietly([host.ckpt, "rm", said["checkpoint"]])

        rate = 20_000.0
        ways = [("bgsave", bgsave), ("dump", dump), ("plain", lambda: None)]
        random.shuffle(ways)
        # To know how many requests a second there are.
        _, _, rate, _ = _redis_load(port, 1, rate, lambda: None)
        for name, way in ways:
            # Long enough for the slowest, so that all of it is under load.
            seconds = 2 if host.quick else 8
            p99, worst, _, inside = _redis_load(port, seconds, rate, way)
            samples.add(f"{name}_p99_ms", p99, "ms")
            samples.add(f"{name}_worst_ms", worst, "ms")
            if not inside:
                samples.note(f"{name} ended", "after the load had ended")
    shutil.rmtree(directory, ignore_errors=True)
    return samples


def startup(host):
    """What ckpt adds to the start of a program: by `ckpt run`, and by the interceptor in each exec."""
    samples = Samples()
    library = interceptor(host)
    true = shutil.which("true") or "/bin/true"
    runs = 20 if host.quick else 400
    for plain, preloaded in _pairs(host, runs, library, [true], [true]):
        samples.add("true_us", plain / 1e3, "us")
        samples.add("preloaded_true_us", preloaded / 1e3, "us")
        samples.add("interceptor_us", (preloaded - plain) / 1e3, "us")
    run = [host.ckpt, "run", "--name", host.fresh("startup"), "--", true]
    for plain, ckpt in _pairs(host, 3 if host.quick else 25, "", [true], run):
        samples.add("run_true_ms", ckpt / 1e6, "ms")
        samples.add("run_overhead_ms", (ckpt - plain) / 1e6, "ms")
    count = 20 if host.quick else 300
    for _ in host.times(4):
        without, with_ckpt = in_turns(host, ["exec", str(count)])
        samples.add("exec_us", without / count / 1e3, "us")
        samples.add("exec_in_job_us", with_ckpt / count / 1e3, "us")
        samples.add("exec_overhead_us", (with_ckpt - without) / count / 1e3, "us")
    return samples


def interceptor(host):
    """The library that ckpt preloads: that which lies beside it, or the one that is to be measured instead."""
    path = os.environ.get("CKPT_TEST_INTERCEPTOR") or os.path.join(os.path.dirname(host.ckpt), "libckpt_interceptor.so")
    if not os.path.exists(path):
        raise Unavailable(f"there is no {path}")
    return path


def _pairs(host, runs, library, first, second):
    command = [host.guest("start"), str(runs), library, *first, "--", *second]
    run = subprocess.run(command, capture_output=True, text=True, env=host.environment, timeout=600, check=False)
    if run.returncode != 0:
        raise Failure(f"{' '.join(command)}: {run.stderr[-400:]}")
    return [tuple(map(int, line.split())) for line in run.stdout.splitlines()]


def in_turns(host, arguments):
    """A loop without and with `ckpt run`, in random order: nanoseconds of both, as it measures itself."""
    plain = [host.guest("loops"), *arguments]
    taken = {}
    for way in random.sample(("plain", "ckpt"), 2):
        prefix = [] if way == "plain" else [host.ckpt, "run", "--name", host.fresh("loop"), "--"]
        taken[way] = int(host.run(prefix + plain).output)
    return taken["plain"], taken["ckpt"]


def loops(host):
    """A fork-heavy script, an open/write/close loop and a malloc loop, with and without `ckpt run`, in turns."""
    samples = Samples()
    directory = str(host.scratch)
    scale = 20 if host.quick else 1
    kinds = {
        "script": ["script", directory, str(200 // scale)],
        "files": ["files", directory, str(60_000 // scale)],
        "malloc": ["malloc", str(4_000_000 // scale)],
    }
    for _ in host.times(12):
        for name, arguments in kinds.items():
            without, with_ckpt = in_turns(host, arguments)
            samples.add(f"{name}_ms", without / 1e6, "ms")
            samples.add(f"{name}_in_job_ms", with_ckpt / 1e6, "ms")
            samples.add(f"{name}_overhead", (with_ckpt / without - 1) * 100, "%")
    return samples


class Case:
    """One case: its name, what it does, how many repetitions are sensible, and whether it is part of a smoke run."""

    def __init__(self, name, run, most=10, smoke=True):
        self.name = name
        self.smoke = smoke
        self.run = run
        self.most = most
        self.about = (run.__doc__ or "").strip().splitlines()[0]


def _memory_case(name, megabytes, pages, most, dumps=2):
    def run(host):
        return memory(host, min(megabytes, 64) if host.quick else megabytes, pages, dumps)

    size = f"{megabytes // 1024} GiB" if megabytes >= 1024 else f"{megabytes} MiB"
    run.__doc__ = f"One process with {size} in {'pages of 4 KiB' if pages == '4k' else 'transparent huge pages'}."
    # A smoke run makes them all of one size, and so needs only one of each kind.
    return Case(name, run, most, smoke=megabytes == 1024)


# In the order of a round: those that take long last, so that all others have their turn when time is short.
CASES = [
    Case("idle", idle),
    _memory_case("64m-4k", 64, "4k", 8, 3),
    _memory_case("64m-thp", 64, "thp", 8, 3),
    _memory_case("1g-4k", 1024, "4k", 8, 3),
    _memory_case("1g-thp", 1024, "thp", 8, 3),
    Case("processes", processes, 6),
    Case("threads", threads),
    Case("vmas", vmas),
    Case("startup", startup, 6),
    Case("loops", loops, 6),
    Case("incremental-scattered", incremental_scattered, 5),
    Case("incremental-clustered", incremental_clustered, 5),
    Case("shared", shared, 5),
    Case("python", python, 5),
    Case("redis", redis, 5),
    _memory_case("4g-4k", 4096, "4k", 3),
    _memory_case("4g-thp", 4096, "thp", 3),
    Case("ticks", ticks, 4),
]


@contextlib.contextmanager
def time_limit(host, seconds):
    """Ends all jobs when a case takes too long, so that what waits for one of them fails."""
    exceeded = threading.Event()

    def end():
        exceeded.set()
        host.kill_jobs()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield exceeded
    finally:
        timer.cancel()
