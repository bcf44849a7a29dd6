# SPDX-License-Identifier: MIT OR Apache-2.0
"""The bars: what each figure must not exceed, and whether it does."""

MEMORY_CASES = ("64m-4k", "64m-thp", "1g-4k", "1g-thp", "4g-4k", "4g-thp")
SIZES = {"64m": "64 MiB", "1g": "1 GiB", "4g": "4 GiB"}
PAUSE_EVIDENCE = ("pause_ms", "fork_ms", "quiet_gap_ms", "reported_ms", "gaps_ms", "phase ")


class Bar:
    """One bar, decided or not."""

    def __init__(self, what, bar, case, evidence):
        self.what = what
        self.bar = bar
        self.case = case
        self.evidence = evidence
        self.figure = ""
        self.reached = None
        self.reason = ""

    def as_json(self):
        """For a file."""
        return {key: getattr(self, key) for key in ("what", "bar", "case", "figure", "reached", "reason")}


class Bars:
    """Decides the bars from results: a mapping of case names to Result."""

    def __init__(self, results):
        self.results = results
        self.all = []

    def median(self, case, metric):
        """The median, or None."""
        result = self.results.get(case)
        return result.samples.median(metric) if result else None

    def why_not(self, case, metric):
        """Why there is no such figure."""
        result = self.results.get(case)
        if case == "vm":
            return "measured by scripts/bench vm"
        if result is None:
            return "not run"
        return result.samples.missing.get(metric) or result.reason or "no figure"

    def decide(self, what, bar, case, metric, limit, figure, evidence=()):
        """`limit` gets the median function of the case, and returns the limit or None; `figure` shows value and limit."""
        entry = Bar(what, bar, case, evidence or (metric,))
        self.all.append(entry)
        value = self.median(case, metric)
        if value is None:
            entry.reason = self.why_not(case, metric)
            return
        bound = limit(lambda name: self.median(case, name))
        if bound is None:
            entry.reason = "what it is compared with has no figure"
            entry.figure = figure(value, float("nan")).split(" (")[0]
            return
        entry.figure = figure(value, bound)
        entry.reached = value <= bound

    def at_least(self, what, bar, case, metric, bound, figure, evidence):
        """The other way round, against a number."""
        entry = Bar(what, bar, case, evidence)
        self.all.append(entry)
        value = self.median(case, metric)
        if value is None:
            entry.reason = self.why_not(case, metric)
        else:
            entry.figure = figure(value)
            entry.reached = value >= bound


def milliseconds(value, bound):
    """A time against its limit."""
    return f"{value:.2f} ms (limit {bound:.2f} ms)"


def percent(value, bound):
    """A part against its limit."""
    return f"{value:.2f} % (limit {bound:.2f} %)"


def decide(results):
    """All bars, in the order in which they are shown."""
    bars = Bars(results)

    def of_fork(factor, more):
        def limit(median):
            fork = median("fork_ms")
            return None if fork is None else factor * fork + more

        return limit

    def fixed(number):
        return lambda median: number

    def compared(metric):
        return lambda median: median(metric)

    def pause(what, bar, case, limit):
        bars.decide(what, bar, case, "pause_ms", limit, milliseconds, PAUSE_EVIDENCE)

    pause("pause, idle program", "≤ 3 ms", "idle", fixed(3))
    for size in ("1g", "4g"):
        pause(f"pause, {SIZES[size]}, 4K pages", "≤ 1.5 × fork + 5 ms", f"{size}-4k", of_fork(1.5, 5))
    pause("pause, 1 GiB, THP", "≤ 10 ms", "1g-thp", fixed(10))
    bars.decide("pause, 1 GiB, kernel module, in the VM", "≤ 0.6 × fork", "vm", "kmod_pause_ms", of_fork(0.6, 0), milliseconds)
    pause("pause, 16 × 64 MiB", "≤ 1.5 × sum of the forks + 10 ms", "processes", of_fork(1.5, 10))
    pause("pause, 100 threads", "≤ 15 ms", "threads", fixed(15))
    lost = ("dump_lost", "fork_write_lost", "dump_lost_ms", "fork_write_lost_ms", "dump_s", "fork_write_s", "dump_slots_lost")
    bars.decide("ticks lost, 1 GiB, dump and 30 s after", "≤ 15 %", "ticks", "dump_lost", fixed(15), percent, lost)
    bars.decide(
        "ticks lost, against fork and write", "not worse", "ticks", "dump_lost", compared("fork_write_lost"), percent, lost
    )  # fmt: skip
    for case in ("1g-4k", "4g-4k", "1g-thp", "4g-thp"):
        size, pages = case.split("-")
        bars.at_least(
            f"dump throughput to {_store(results)}, {SIZES[size]}, {_pages(pages)}",
            "≥ 0.8 × best plain write",
            case,
            "throughput_ratio",
            0.8,
            lambda value: f"{value:.2f} ×",
            ("throughput_ratio", "throughput", "plain_write", "dump_s", "cpu_user_ms", "cpu_system_ms", "phase "),
        )
    bars.decide(
        "redis, worst latency during a dump", "≤ during BGSAVE", "redis", "dump_worst_ms", compared("bgsave_worst_ms"), milliseconds,
        ("dump_worst_ms", "bgsave_worst_ms", "plain_worst_ms", "reported_ms", "dump_s", "bgsave_s"),
    )  # fmt: skip
    for kind in ("scattered", "clustered"):
        case = f"incremental-{kind}"
        bars.decide(
            f"incremental image, 1 % dirty, {kind}", "≤ 1.5 % of full", case, "image_percent", fixed(1.5), percent,
            ("image_percent", "dirty_percent", "interval_s", "image_mib"),
        )  # fmt: skip
        bars.decide(
            f"incremental pause, 1 % dirty, {kind}", "≤ 5 ms/GiB", case, "pause_per_gib_ms", fixed(5), milliseconds, PAUSE_EVIDENCE
        )
    for pages in ("4k", "thp"):
        bars.decide(
            f"restore to first tick, eager, 1 GiB, {_pages(pages)}", "≤ 1.5 × filling from the same file", f"1g-{pages}", "first_tick_ms",
            lambda median: None if median("fill_ms") is None else 1.5 * median("fill_ms"), milliseconds,
            ("first_tick_ms", "fill_ms", "restore_s", "restore_phase "),
        )  # fmt: skip
    for case in MEMORY_CASES:
        size, pages = case.split("-")
        bars.decide(
            f"restore to first tick, lazy, {SIZES[size]}, {_pages(pages)}", "≤ 20 ms", case, "lazy_first_tick_ms", fixed(20), milliseconds,
            ("lazy_first_tick_ms", "lazy_touched_ms", "lazy_resident_ms", "restore_phase "),
        )  # fmt: skip
    bars.decide(
        "run: to start /bin/true", "≤ 5 ms", "startup", "run_overhead_ms", fixed(5), milliseconds, ("run_overhead_ms", "run_true_ms", "true_us")
    )
    bars.decide(
        "run: per exec", "≤ 1 ms", "startup", "exec_overhead_us", fixed(1000),
        lambda value, bound: milliseconds(value / 1e3, bound / 1e3), ("exec_overhead_us", "exec_us", "exec_in_job_us", "interceptor_us"),
    )  # fmt: skip
    for name, what in (("files", "open/write/close loop"), ("malloc", "malloc loop")):
        bars.decide(
            f"run: {what}", "≤ 1 %", "loops", f"{name}_overhead", fixed(1), percent, (f"{name}_overhead", f"{name}_ms", f"{name}_in_job_ms")
        )
    largest = max(
        ((bars.median(case, "peak_mib"), case) for case in results if bars.median(case, "peak_mib") is not None), default=(None, "1g-4k")
    )
    bars.decide(
        f"memory of ckpt itself during a dump (largest: {largest[1]})", "≤ 64 MiB", largest[1], "peak_mib", fixed(64),
        lambda value, bound: f"{value:.1f} MiB (limit {bound:.0f} MiB)", ("peak_mib", "init_peak_mib", "held_mib"),
    )  # fmt: skip
    return bars.all


def _pages(pages):
    return "4K" if pages == "4k" else "THP"


def _store(results):
    for result in results.values():
        if result.store:
            return result.store
    return "the store"
