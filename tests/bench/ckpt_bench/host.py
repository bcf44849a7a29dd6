# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the cases run on: directories, programs, jobs, and the machine's description."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

from .observer import Observer
from .samples import Failure, Unavailable

ROOT = pathlib.Path(__file__).resolve().parents[3]
GIB = 1 << 30
MIB = 1 << 20


def read(path, default=""):
    """A small file's text without the newline, or the default."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return default


class Ran:
    """A command that has ended: what `measure` says, and its output."""

    def __init__(self, figures, output, errors):
        self.figures = figures
        self.output = output
        self.errors = errors
        self.wall_ms = figures["wall_ns"] / 1e6

    def json(self):
        """Its standard output as JSON."""
        try:
            return json.loads(self.output)
        except json.JSONDecodeError as error:
            raise Failure(f"no JSON in {self.output[:200]!r}: {error}") from error


class Host:
    """Directories and programs of one run of the bench."""

    def __init__(self, directory, ckpt, guests, quick):
        self.directory = pathlib.Path(directory)
        self.ckpt = str(ckpt)
        self.guests = pathlib.Path(guests)
        self.quick = quick
        self.store = self.directory / "store"
        self.store.mkdir()
        self.scratch = self.directory / "scratch"
        self.scratch.mkdir()
        registry = self.directory / "registry"
        registry.mkdir(mode=0o700)
        self.environment = dict(os.environ, XDG_RUNTIME_DIR=str(registry), CKPT_STORE=str(self.store))
        self._numbers = 0
        self._help = {}
        self._share_ends = float("inf")
        # While it is a dictionary, dumps and restores are run under perf, and what that finds is kept here.
        self.profiles = None

    def guest(self, name):
        """The path of a compiled guest or tool."""
        return str(self.guests / name)

    def fresh(self, what):
        """A name that was not used before."""
        self._numbers += 1
        return f"{what}-{self._numbers}"

    def share(self, seconds):
        """From now on a case has so much time."""
        self._share_ends = time.monotonic() + seconds

    def times(self, count):
        """Counts, as far as the time of the case allows; at least one. Of a smoke run only one."""
        for i in range(1 if self.quick else count):
            if i and time.monotonic() > self._share_ends:
                return
            yield i

    def has_option(self, command, option):
        """Whether `ckpt COMMAND` knows an option."""
        if command not in self._help:
            run = subprocess.run([self.ckpt, command, "--help"], capture_output=True, text=True, env=self.environment, check=False)
            self._help[command] = run.stdout if run.returncode == 0 else ""
        return re.search(rf"(^|[\s,]){re.escape(option)}\b", self._help[command]) is not None

    def need_option(self, command, option):
        """Raises Unavailable unless `ckpt COMMAND` knows the option."""
        if not self.has_option(command, option):
            raise Unavailable(f"this ckpt has no `{command} {option}`")

    def run(self, command, ticks=None, seconds=300, check=True):
        """Runs a command under `measure`; with `ticks` also the time until that observer's counter moves."""
        reader, writer = os.pipe()
        prefix = [self.guest("measure"), str(writer)] + (["--ticks", str(ticks)] if ticks else []) + ["--"]
        out, err = (self.scratch / self.fresh(name) for name in ("out", "err"))
        # To files: a pipe would be waited for as long as somebody in a job holds it.
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            process = subprocess.Popen(
                prefix + [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=to_out,
                stderr=to_err,
                env=self.environment,
                pass_fds=(writer,),
            )
        os.close(writer)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"{' '.join(map(str, command))} did not end within {seconds} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            with os.fdopen(reader, "rb") as figures:
                os.set_blocking(figures.fileno(), False)
                said = figures.read() or b""
            output, errors = read(out), read(err)
            out.unlink()
            err.unlink()
        if not said:
            raise Failure(f"{' '.join(map(str, command))} could not be started: {errors}")
        ran = Ran(json.loads(said), output, errors)
        if check and ran.figures["status"] != 0:
            raise Failure(f"{' '.join(map(str, command))} ended with {ran.figures['status']}: {errors[:1000]}")
        return ran

    def run_profiled(self, what, command, **options):
        """Runs a dump or restore, under perf if profiles are wanted: where all processors were, kernel included."""
        if self.profiles is None:
            return self.run(command, **options)
        data = self.directory / "perf.data"
        # Not preallocated memory: samples of the kernel's clock work in every virtual machine.
        ran = self.run(["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-a", "-o", data, "--", *command], **options)
        text = self.quietly(["perf", "report", "-q", "--stdio", "-i", str(data), "-F", "overhead,comm,sym", "-t", ";"], seconds=120)
        data.unlink(missing_ok=True)
        rows = []
        for line in text.splitlines():
            part, comm, symbol = (line.split(";", 2) + ["", ""])[:3]
            if part.strip().endswith("%") and comm.strip() not in ("swapper", "perf", "perf-exec"):
                rows.append((float(part.strip().rstrip("%")), comm.strip(), re.sub(r"\s+", " ", symbol.strip())[:90]))
        self.profiles.setdefault(what, rows[:12])
        return ran

    def quietly(self, command, seconds=30):
        """Runs a command of which only the effect counts; its output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            run = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=seconds, check=False)
            return run.stdout
        return ""

    def kill_jobs(self):
        """Ends all jobs of this bench."""
        try:
            jobs = json.loads(self.quietly([self.ckpt, "ps", "--json"]) or "[]")
        except json.JSONDecodeError:
            jobs = []
        for job in jobs if isinstance(jobs, list) else jobs.get("jobs", []):
            self.quietly([self.ckpt, "kill", str(job.get("name")), "KILL"])

    def sweep(self):
        """Ends all jobs of this bench, and empties its store and scratch directory."""
        self.kill_jobs()
        for place in (self.store, self.scratch):
            for entry in place.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


class Job:
    """A guest as a job of ckpt, with its observer. A context manager: nothing of it is left behind."""

    def __init__(self, host, command, name="guest", observed=True):
        """`command` gets the observer's path, and returns the command line."""
        self.host = host
        self.name = host.fresh(name)
        self.observer = None
        if observed:
            self.observer = Observer(host.scratch / f"{self.name}.observer", self._alive)
            command = command(str(self.observer.path))
        self.command = command
        self.dumps = 0

    def __enter__(self):
        try:
            self.host.run([self.host.ckpt, "run", "--name", self.name, "--detach", "--", *self.command])
            if self.observer:
                self.observer.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.kill()
        self.host.quietly([self.host.ckpt, "rm", self.name])
        if self.observer:
            self.observer.close()
            self.observer.path.unlink(missing_ok=True)

    def info(self):
        """What `ckpt ps --json` says of it, or None."""
        found = json.loads(self.host.quietly([self.host.ckpt, "ps", "--json"]) or "[]")
        for job in found if isinstance(found, list) else found.get("jobs", []):
            if job.get("name") == self.name:
                return job
        return None

    def init_peak_kib(self):
        """The largest resident set of the job's init, which is ckpt, too."""
        info = self.info()
        found = info and re.search(r"^VmHWM:\s*(\d+)", read(f"/proc/{info['init_pid']}/status"), re.MULTILINE)
        if not found:
            raise Failure(f"the job {self.name} has no init: {self.log()}")
        return int(found.group(1))

    def _alive(self):
        if self.info() is None:
            raise Failure(f"the job {self.name} has ended: {self.log()}")

    def log(self):
        """The end of the job's output."""
        logs = sorted(self.host.store.glob(f"**/{self.name}*log*"))
        return read(logs[-1])[-400:] if logs else "no log"

    def kill(self):
        """Ends it at once."""
        self.host.quietly([self.host.ckpt, "kill", self.name, "KILL"])

    def dump(self, *options, seconds=300):
        """Dumps it: what measure says and what ckpt says."""
        command = [self.host.ckpt, "--quiet", "dump", self.name, "--json", *options]
        ran = self.host.run_profiled("dump", command, seconds=seconds)
        self.dumps += 1
        return ran, ran.json()

    def restore(self, *options, number=None, seconds=300):
        """Restores it, under the same name: what measure says, with the time to the first tick, and what ckpt says."""
        checkpoint = self.name if number is None else f"{self.name}@{number}"
        command = [self.host.ckpt, "--quiet", "restore", checkpoint, "--detach", "--json", *options]
        observed = None
        if self.observer:
            command += ["--allow-changed", str(self.observer.path)]
            observed = self.observer.path
        what = "lazy restore" if "--lazy" in options else "restore"
        ran = self.host.run_profiled(what, command, ticks=observed, seconds=seconds)
        if self.observer and not ran.figures["first_tick_ns"]:
            raise Failure(f"the restored job {self.name} does not tick: {ran.errors} {self.log()}")
        return ran, ran.json()


class Process:
    """A guest that runs without ckpt, for other tools and for comparison."""

    def __init__(self, host, command, name="plain"):
        self.host = host
        self.observer = Observer(host.scratch / f"{host.fresh(name)}.observer", self._alive)
        self.command = command(str(self.observer.path))
        self.process = None
        self.pid = 0

    def __enter__(self):
        with open(self.host.scratch / "plain.log", "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=self.host.environment
            )
        self.pid = self.process.pid
        self.observer.wait_ready()
        return self

    def _alive(self):
        if not os.path.exists(f"/proc/{self.pid}") or (self.process and self.process.poll() is not None):
            raise Failure(f"the guest {self.pid} has ended: {read(self.host.scratch / 'plain.log')[-400:]}")

    def kill(self):
        """Ends it at once, and waits until it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.process:
            self.process.wait()
            self.process = None
        until = time.monotonic() + 10
        while os.path.exists(f"/proc/{self.pid}") and time.monotonic() < until:
            time.sleep(0.002)

    def __exit__(self, *_):
        if self.pid:
            self.kill()
        self.observer.close()
        self.observer.path.unlink(missing_ok=True)


def filesystem(path):
    """The type of the file system that a path is on."""
    best = ("", "unknown")
    for line in read("/proc/self/mounts").splitlines():
        _, point, kind, *_ = line.split()
        if (str(path) + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def machine(host):
    """The machine and the versions, for the report."""
    model = re.search(r"^model name\s*:\s*(.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", read("/proc/meminfo"), re.MULTILINE)
    huge = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    version = host.quietly([host.ckpt, "--version"]).strip()
    commit = host.quietly(["git", "-c", "safe.directory=*", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]).strip()
    return {
        "processor": model.group(1) if model else "unknown",
        "processors": len(os.sched_getaffinity(0)),
        "hypervisor": "hypervisor" in read("/proc/cpuinfo"),
        "memory_gib": round(int(memory.group(1)) / (1 << 20), 1) if memory else 0,
        "kernel": " ".join(os.uname()[i] for i in (0, 2)),
        "thp": huge.group(1) if huge else "none",
        "store": filesystem(host.store),
        "root": os.geteuid() == 0,
        "load": read("/proc/loadavg").split()[:3],
        "ckpt": version,
        "commit": commit,
    }


def wait_for(condition, seconds, what):
    """Polls until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise Failure(f"not within {seconds} s: {what}")
        time.sleep(0.01)
