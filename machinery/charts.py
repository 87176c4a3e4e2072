"""Charts as SVG text, drawn by matplotlib from plain numbers. They know nothing of SWEET.

A chart must read well on a light and on a dark page, so it is drawn in the placeholder colours of `COLOURS`, and each
of them becomes a CSS variable of the page that holds the chart. `standalone` brings the variables along, for a picture
in a README. Text stays text, in the page's font. The same numbers give the same bytes.

Exercised by `python -m pytest tests/test_report.py`.
"""

import io
import re
from html import escape
from pathlib import Path

import numpy as np

COLOURS = {  # placeholder: (CSS variable, its value on a light page and on a dark one)
    "#010101": ("--ink", "#1c1f23", "#e7e9ec"),
    "#020202": ("--soft", "#5b636d", "#a3abb5"),
    "#030303": ("--rule", "#dfe3e8", "#363c44"),
    "#040404": ("--good", "#1f6fb8", "#6db3f2"),
    "#050505": ("--bad", "#c4570c", "#f29a52"),
    "#060606": ("--third", "#3d8a58", "#77c493"),
}
INK, SOFT, _, GOOD, BAD, THIRD = COLOURS
LINES = (
    (GOOD, "o", "-"),
    (INK, "s", "-"),
    (BAD, "D", "--"),
    (THIRD, "^", "-."),
    (SOFT, "v", ":"),
    (GOOD, "P", ":"),
    (BAD, "X", "-."),
    (INK, "*", "--"),
    (THIRD, "p", "-"),
    (SOFT, "h", "--"),
)
STYLE = Path(__file__).with_name("page") / "charts.mplstyle"
WIDTH = 3.8  # inches: about the width of a telephone, so that text keeps its size there


def variables(column):
    """CSS declarations of the colours. column: 1 for a light page, 2 for a dark one."""
    return "".join(f"{colour[0]}:{colour[column]};" for colour in COLOURS.values())


def draw(title, height, paint, columns=(1,), width=WIDTH):
    """One chart as an <svg> element. title: what it shows, in words, for those who cannot see it; paint(axes, ...)
    draws on as many axes as `columns` has relative widths."""
    from matplotlib import rc_context  # late: it takes half a second, and most commands draw nothing
    from matplotlib.figure import Figure

    with rc_context(fname=STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(*figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0])
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline(file.getvalue(), title)


def inline(svg, title):
    """matplotlib's SVG as an element of a page, without size, fonts, colours and names of its own."""
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r".*?<svg[^>]*>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]*; ",
        "",
        svg,
        flags=re.DOTALL,
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several charts on one page would repeat these names
    svg = svg.replace("xlink:href", "href")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(title)}">{svg}'
    for placeholder, (name, *_) in COLOURS.items():
        svg = svg.replace(placeholder, f"var({name})")
    return svg


def standalone(svg):
    """A chart as a file of its own, which follows the theme of whoever looks at it."""
    style = (
        f":root{{{variables(1)}font-family:system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{:root{{{variables(2)}}}}}"
    )
    head, rest = svg.split(">", 1)
    return f"{head}><style>{style}</style>{rest}"


def legend_above(axes, **more):
    """A legend between title and axes, in one row."""
    handles, labels = axes.get_legend_handles_labels()
    more = {
        "ncols": len(labels),
        "borderpad": 0,
        "handletextpad": 0.4,
        "columnspacing": 1.2,
        **more,
    }
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, **more
    )


def name_rows(axes, names):
    """The y-axis of a chart with a row for each name, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def intervals(title, methods, ways, label, order_label):
    """Means with intervals, a row for each method, and beside them the same methods' figures from elsewhere.

    methods: {name: ([(mean, low, high) of each way], figure from elsewhere or None)}.
    """
    names, others = list(methods), [other for _, other in methods.values()]

    def paint(axes, beside=None):
        for k, way in enumerate(ways):
            colour, marker, _ = LINES[k]
            means, low, high = np.array([found[k] for found, _ in methods.values()]).T
            rows = np.arange(len(names)) + 0.24 * (k - (len(ways) - 1) / 2)
            errors = np.maximum(0, [means - low, high - means])
            axes.errorbar(
                means,
                rows,
                xerr=errors,
                fmt=marker,
                color=colour,
                label=way,
                markersize=5,
                elinewidth=2,
            )
        name_rows(axes, names)
        axes.set_xlabel(label)
        legend_above(axes)
        if beside:
            beside.plot(others, range(len(names)), "o", color=SOFT, markersize=5)
            for row, other in enumerate(others):
                text = f"{other:g}" if other is not None else ""
                beside.annotate(
                    text,
                    (other or 0, row),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    color=SOFT,
                )
            name_rows(beside, [""] * len(names))
            beside.set_xticks([])
            beside.margins(x=0.35)
            beside.set_xlabel(order_label)

    columns = (3, 1.1) if sum(other is not None for other in others) > 1 else (1,)
    return draw(title, 1.1 + 0.36 * len(names), paint, columns, 1.2 * WIDTH)


def ranking(title, names, scores, classes, half, second, label, width=WIDTH):
    """Bars in the order of their scores, the best on top.

    classes: for each bar, an index into `LINES`, by which it is coloured; half: how many bars, also in part, are above
    the line that is drawn; second: (what it is, one number a bar), drawn as hollow marks.
    """

    def paint(axes):
        for row, (score, kind) in enumerate(zip(scores, classes)):
            axes.barh(row, score, 0.62, color=(GOOD, BAD, SOFT)[kind])
        axes.plot(
            second[1],
            range(len(scores)),
            "D",
            color=INK,
            markerfacecolor="none",
            markersize=4.5,
            label=second[0],
        )
        axes.axvline(0, color=SOFT, linewidth=0.8)
        axes.axhline(half - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        name_rows(axes, names)
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(label)
        legend_above(axes)

    return draw(title, 0.8 + 0.2 * len(names), paint, width=width)


def points(title, groups, x_label, y_label):
    """A point for each pair. groups: {name: (xs, ys)}."""

    def paint(axes):
        for (colour, marker, _), (name, (xs, ys)) in zip(LINES[::2], groups.items()):
            label = f"{name} ({len(xs)})"
            axes.plot(xs, ys, marker, color=colour, label=label, markersize=4, alpha=0.6, mew=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        legend_above(axes)

    return draw(title, 2.9, paint)


def curves(title, lines, x_label, y_label):
    """Lines through their points: {name: (xs, ys)}, y from 0 on. The xs are whole numbers, each one named."""

    def paint(axes):
        for (colour, marker, dashes), (name, (xs, ys)) in zip(LINES, lines.items()):
            axes.plot(xs, ys, dashes, color=colour, marker=marker, markersize=4.5, label=name)
        axes.set_ylim(bottom=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xticks(sorted({x for xs, _ in lines.values() for x in xs}))
        legend_above(axes, ncols=3 if len(lines) > 4 else 2)

    return draw(title, 2.9, paint)


def growth(title, lines, x_label, y_label):
    """Means with intervals along sizes that double: {name: (sizes, [(mean, low, high)])}."""

    def paint(axes):
        for k, (name, (sizes, found)) in enumerate(lines.items()):
            colour, marker, dashes = LINES[k % len(LINES)]
            means, low, high = np.array(found).T
            beside = np.array(sizes) * 2 ** (0.06 * (k - (len(lines) - 1) / 2))
            errors = np.maximum(0, [means - low, high - means])
            axes.errorbar(
                beside,
                means,
                yerr=errors,
                color=colour,
                marker=marker,
                linestyle=dashes,
                label=name,
                markersize=4.5,
                elinewidth=1,
            )
        ticks = sorted({size for sizes, _ in lines.values() for size in sizes})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        legend_above(axes, ncols=2)

    return draw(title, 2.9, paint)


def smooth(values):
    """Running mean over a fifteenth of the curve."""
    window = np.ones(max(1, len(values) // 15))
    total = np.convolve(values, window, "same")
    return total / np.convolve(np.ones(len(values)), window, "same")


def training(title, lines):
    """{name: one value a step, as an array}: a strong running mean over the faint values."""

    def paint(axes):
        for (colour, _, dashes), (name, values) in zip(LINES, lines.items()):
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
            axes.plot(steps, smooth(values), dashes, color=colour, linewidth=1.6, label=name)
        low, high = np.percentile(np.concatenate(list(lines.values())), (1, 99))
        axes.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axes.legend()

    return draw(title, 2.4, paint)


def durations(title, seconds):
    """{name: seconds} as bars."""

    def paint(axes):
        bars = axes.barh(range(len(seconds)), list(seconds.values()), 0.6, color=GOOD)
        axes.bar_label(
            bars, [f"{value:.0f} s" for value in seconds.values()], padding=4, color=SOFT
        )
        name_rows(axes, list(seconds))
        axes.margins(x=0.15)
        axes.set_xlabel("seconds")

    return draw(title, 0.6 + 0.24 * len(seconds), paint)
