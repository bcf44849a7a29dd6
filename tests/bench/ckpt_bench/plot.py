# SPDX-License-Identifier: MIT OR Apache-2.0
"""Plots as SVG: bars and lines, with the little that these need."""

import math
from xml.sax.saxutils import escape

COLOURS = ("#3b6fb6", "#d1823c", "#5a9a5a", "#a0529c", "#8a8a8a", "#b6453b")
WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 64, 60
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" font-family="sans-serif" font-size="12">\n'
    "<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->\n"
    '<rect width="{w}" height="{h}" fill="#ffffff"/>\n'
)


class Canvas:
    """The elements of one plot."""

    def __init__(self, title):
        self.parts = [_HEAD.format(w=WIDTH, h=HEIGHT)]
        self.text(WIDTH / 2, 20, title, size=15, anchor="middle")

    def text(self, x, y, text, size=12, anchor="start", colour="#222222", rotate=None):
        """A line of text."""
        turn = f' transform="rotate({rotate} {x:.1f} {y:.1f})"' if rotate else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{turn}>{escape(text)}</text>\n'
        )

    def line(self, x1, y1, x2, y2, colour="#dddddd", width=1.0, dash=None):
        """A straight line."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashes}/>\n'
        )

    def box(self, x, y, width, height, colour):
        """A filled rectangle."""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0.5):.1f}" fill="{colour}"/>\n')

    def path(self, points, colour):
        """A line through points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.4"/>\n')

    def legend(self, names):
        """The names of the colours, below the title."""
        x = LEFT
        for i, name in enumerate(names):
            self.box(x, 32, 10, 10, COLOURS[i % len(COLOURS)])
            self.text(x + 14, 41, name)
            x += 14 + 7 * len(name) + 22

    def svg(self):
        """All of it."""
        return "".join(self.parts) + "</svg>\n"


def _number(value):
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2g}" if value < 0.095 else f"{value:.2f}"


def _linear_ticks(top):
    step = 10 ** math.floor(math.log10(top))
    for factor in (0.1, 0.2, 0.25, 0.5, 1, 2):
        if top / (step * factor) <= 6:
            step *= factor
            break
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def bars(title, unit, groups, names, limits=(), logarithmic=False):
    """Grouped bars; None if there are no figures.

    groups: (label, [value or (first quartile, median, third quartile) or None for each name]). limits: for each group a number or None, drawn as a dashed line.
    """
    canvas = Canvas(title)
    triples = [(label, [v if v is None or isinstance(v, tuple) else (v, v, v) for v in values]) for label, values in groups]
    flat = [v[2] for _, values in triples for v in values if v] + [limit for limit in limits if limit]
    low = [v[1] for _, values in triples for v in values if v and v[1] > 0]
    if not low:
        return None
    top = max(flat) * (2.2 if logarithmic else 1.12)
    bottom = 10 ** math.floor(math.log10(min(low))) if logarithmic else 0
    height = HEIGHT - TOP - BOTTOM

    def y_of(value):
        if logarithmic:
            part = math.log(max(value, bottom) / bottom) / math.log(top / bottom)
        else:
            part = value / top
        return TOP + height * (1 - part)

    if logarithmic:
        marks = [10.0**e for e in range(int(math.log10(bottom)), int(math.log10(top)) + 1)]
    else:
        marks = _linear_ticks(top)
    for mark in marks:
        canvas.line(LEFT, y_of(mark), WIDTH - RIGHT, y_of(mark))
        canvas.text(LEFT - 6, y_of(mark) + 4, f"{mark:g}", anchor="end")
    canvas.text(16, TOP + height / 2, unit, anchor="middle", rotate=-90)
    canvas.legend(names)
    room = (WIDTH - LEFT - RIGHT) / len(triples)
    wide = min(room * 0.84 / len(names), 46)
    for g, (label, values) in enumerate(triples):
        middle = LEFT + room * (g + 0.5)
        start = middle - wide * len(names) / 2
        for i, value in enumerate(values):
            if not value:
                canvas.text(start + wide * (i + 0.5), y_of(bottom) - 4, "–", anchor="middle", colour="#888888")
                continue
            first, median, third = value
            x = start + wide * i
            canvas.box(x + 1, y_of(median), wide - 2, y_of(bottom) - y_of(median), COLOURS[i % len(COLOURS)])
            canvas.line(x + wide / 2, y_of(first), x + wide / 2, y_of(third), "#222222")
            canvas.text(x + wide / 2, y_of(max(median, third)) - 4, _number(median), size=9 if wide < 30 else 10, anchor="middle")
        if g < len(limits) and limits[g]:
            canvas.line(start - 4, y_of(limits[g]), start + wide * len(names) + 4, y_of(limits[g]), "#c00000", 1.6, "5,3")
        canvas.text(middle, HEIGHT - BOTTOM + 18, label, anchor="middle", size=11)
    canvas.line(LEFT, TOP + height, WIDTH - RIGHT, TOP + height, "#222222")
    if any(limits):
        canvas.line(LEFT, HEIGHT - 18, LEFT + 24, HEIGHT - 18, "#c00000", 1.6, "5,3")
        canvas.text(LEFT + 30, HEIGHT - 14, "bar: not to be exceeded", size=11)
    return canvas.svg()


def lines(title, x_unit, y_unit, series, x_step, x_limit=None):
    """Lines over time; None if there are none. series: (name, [values at x_step distance])."""
    canvas = Canvas(title)
    series = [(name, values) for name, values in series if values]
    if not series:
        return None
    right = max(len(values) for _, values in series) * x_step
    if x_limit:
        right = min(right, x_limit)
    top = max(max(values) for _, values in series) * 1.08 or 1
    height, width = HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT
    for mark in _linear_ticks(top):
        y = TOP + height * (1 - mark / top)
        canvas.line(LEFT, y, WIDTH - RIGHT, y)
        canvas.text(LEFT - 6, y + 4, f"{mark:g}", anchor="end")
    for mark in _linear_ticks(right):
        x = LEFT + width * mark / right
        canvas.line(x, TOP + height, x, TOP + height + 4, "#222222")
        canvas.text(x, TOP + height + 18, f"{mark:g}", anchor="middle")
    canvas.text(16, TOP + height / 2, y_unit, anchor="middle", rotate=-90)
    canvas.text(LEFT + width / 2, HEIGHT - 20, x_unit, anchor="middle")
    canvas.legend([name for name, _ in series])
    for i, (_, values) in enumerate(series):
        points = [(LEFT + width * (n + 0.5) * x_step / right, TOP + height * (1 - v / top)) for n, v in enumerate(values) if (n + 1) * x_step <= right]
        canvas.path(points, COLOURS[i % len(COLOURS)])
    canvas.line(LEFT, TOP + height, WIDTH - RIGHT, TOP + height, "#222222")
    canvas.line(LEFT, TOP, LEFT, TOP + height, "#222222")
    return canvas.svg()
