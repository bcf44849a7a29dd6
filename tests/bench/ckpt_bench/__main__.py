# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs cases. scripts/bench prepares what is needed and calls this."""

import argparse
import os
import shutil
import signal
import sys
import time
import traceback

from . import report
from .bars import decide
from .cases import CASES, time_limit
from .host import ROOT, Host, machine
from .samples import Failure, Samples, Unavailable


class Result:
    """What became of a case."""

    def __init__(self, case, store):
        self.about = case.about
        self.store = store
        self.status = "ok"
        self.reason = ""
        self.repetitions = 0
        self.seconds = 0.0
        self.failures = 0
        self.samples = Samples()
        self.profiles = {}


class Run:
    """All of one run."""

    def __init__(self, quick):
        self.quick = quick
        self.machine = {}
        self.results = {}
        self.bars = []
        self.no_profile = ""
        self.seconds = 0.0


def arguments():
    """The command line; scripts/bench --help has the text."""
    parser = argparse.ArgumentParser(prog="scripts/bench", add_help=False)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--directory", required=True)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--guests", required=True)
    return parser.parse_args()


# Seconds that a repetition of any case may take.
LONGEST = 300


def repeat_once(case, host, result, left):
    """One repetition, while there is time. What fails is noted, and ends nothing but this repetition."""
    seconds = min(LONGEST, max(60, left))
    begun = time.monotonic()
    try:
        with time_limit(host, seconds) as exceeded:
            try:
                result.samples.merge(case.run(host))
            except Failure as error:
                if exceeded.is_set() and seconds < LONGEST:
                    raise Unavailable("no time was left to end it; give more by --budget") from error
                raise Failure(f"it did not end within {seconds:.0f} s") if exceeded.is_set() else error
        result.repetitions += 1
    except Unavailable as error:
        if not result.repetitions:
            result.status, result.reason = "not available", str(error)
    except Exception as error:  # pylint: disable=broad-except
        traceback.print_exc()
        result.failures += 1
        result.status, result.reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        try:
            host.sweep()
        except OSError as error:
            print(f"cannot clean up: {error}", file=sys.stderr)
    taken = time.monotonic() - begun
    result.seconds += taken
    return taken


def rounds(cases, host, run, most, deadline):
    """Round after round over all cases, so that what the machine does meanwhile falls on all alike, while there is time."""
    longest = {case.name: 0.0 for case in cases}
    for number in range(max(most.values())):
        for i, case in enumerate(cases):
            result = run.results[case.name]
            if number >= most[case.name] or result.status == "not available" or result.failures >= 2:
                continue
            left = deadline - time.monotonic()
            if not number and left <= 0:
                result.status, result.reason = "not available", "no time was left; give more by --budget"
            if longest[case.name] > left or left <= 0:
                continue
            # In the first round every case is to get its turn; later ones have what is left.
            host.share(left / (len(cases) - i) * 0.8 if not number else left)
            print(f"[{int(time.monotonic() - START):4d} s] {case.name}, repetition {number + 1}", file=sys.stderr, flush=True)
            longest[case.name] = max(longest[case.name], repeat_once(case, host, result, left))


def profile(cases, host, run, deadline):
    """One more repetition, under perf, of each case that misses a bar: what the machine was doing. Its samples do not count."""
    if not shutil.which("perf"):
        return "perf is not installed"
    missed = {bar.case for bar in run.bars if bar.reached is False}
    for case in cases:
        result = run.results[case.name]
        if case.name not in missed or time.monotonic() + 1.3 * result.seconds / max(result.repetitions, 1) > deadline:
            continue
        print(f"[{int(time.monotonic() - START):4d} s] {case.name}, profile", file=sys.stderr, flush=True)
        host.profiles = result.profiles
        host.share(0)
        scratch = Result(case, result.store)
        repeat_once(case, host, scratch, deadline - time.monotonic())
        host.profiles = None
    return ""


START = time.monotonic() - float(os.environ.get("CKPT_BENCH_SECONDS_BEFORE", "0"))


def main():
    """Runs what is asked for; 1 if a case failed."""
    # A shell starts what runs in the background with SIGINT ignored; either signal ends the jobs first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    options = arguments()
    names = [case.name for case in CASES]
    if options.list:
        for case in CASES:
            print(f"{case.name:24s}{case.about}")
        print(f"{'vm':24s}The kernel module in a virtual machine: scripts/bench-vm.")
        return 0
    unknown = [name for name in options.case if name not in names]
    if unknown:
        print(f"there is no case {', '.join(unknown)}; see scripts/bench --list", file=sys.stderr)
        return 2
    cases = [case for case in CASES if (case.name in options.case if options.case else case.smoke or not options.quick)]
    host = Host(options.directory, options.ckpt, options.guests, options.quick)
    run = Run(options.quick)
    run.machine = machine(host)
    run.results = {case.name: Result(case, run.machine["store"]) for case in cases}
    options.profile = options.profile or options.publish
    budget = options.budget or (15 if options.publish else None)
    deadline = START + budget * 60 if budget else float("inf")
    most = {case.name: options.repetitions or (1 if options.quick else case.most if budget else min(case.most, 3)) for case in cases}
    try:
        # A part of the budget is for what explains the figures.
        rounds(cases, host, run, most, deadline - 60 * budget * 0.12 if budget and options.profile else deadline)
        run.bars = decide(run.results)
        if options.profile:
            run.no_profile = profile(cases, host, run, deadline)
    except KeyboardInterrupt:
        print("interrupted: what there is so far", file=sys.stderr)
    finally:
        host.sweep()
    run.seconds = time.monotonic() - START
    run.bars = decide(run.results)
    report.print_table(run)
    if options.json:
        report.write_json(run, options.json)
    if options.publish:
        report.publish(run, ROOT / "docs")
    elif run.quick:
        # The plots and the page are made all the same, so that they cannot rot.
        report.markdown(run, list(report.plots(run)))
    failed = [name for name, result in run.results.items() if result.failures]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
