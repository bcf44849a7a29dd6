# SPDX-License-Identifier: MIT OR Apache-2.0
"""Figures: what was measured, and what it says."""

import statistics


class Unavailable(Exception):
    """A case, or a part of one, that this host or this ckpt cannot do. Says why."""


class Failure(Exception):
    """Something that should work did not."""


class Samples:
    """The figures of one case: a name and a unit, and a value for each repetition."""

    def __init__(self):
        self.metrics = {}
        self.missing = {}
        self.notes = {}

    def add(self, name, value, unit):
        """Adds one value. The unit is one of ms, us, s, GiB/s, MiB, %, ratio, 1."""
        self.metrics.setdefault(name, (unit, []))[1].append(float(value))

    def unavailable(self, name, reason):
        """Says why there is no figure of that name."""
        self.missing.setdefault(name, reason)

    def note(self, name, value):
        """Keeps something that is no figure, such as a series for a plot; the last one counts."""
        self.notes[name] = value

    def median(self, name):
        """The median, or None."""
        unit_values = self.metrics.get(name)
        return statistics.median(unit_values[1]) if unit_values else None

    def merge(self, other):
        """Takes the values of one repetition over."""
        for name, (unit, values) in other.metrics.items():
            for value in values:
                self.add(name, value, unit)
        for name, reason in other.missing.items():
            self.unavailable(name, reason)
        self.notes.update(other.notes)

    def as_json(self):
        """Everything, for a file."""
        return {
            "metrics": {name: {"unit": unit, **summary(values), "samples": values} for name, (unit, values) in self.metrics.items()},
            "not_available": self.missing,
            "notes": self.notes,
        }


def summary(values):
    """Median and spread."""
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    else:
        first = third = values[0]
    return {
        "median": statistics.median(values),
        "minimum": min(values),
        "first_quartile": first,
        "third_quartile": third,
        "maximum": max(values),
        "count": len(values),
    }
