"""Write docs/scaling.json, the tables of docs/scaling.md between two comments, and the pictures."""

import json
import math
import re
import statistics
from pathlib import Path

COLOURS = ("#1d4ed8", "#c2410c")
MARKS = ("<!-- measured -->", "<!-- /measured -->")


def slope(sizes: list[float], values: list[float]) -> float:
    """Return the exponent of a power law through the upper half of the sizes: least squares over the logarithms."""
    half = len(sizes) // 2
    xs, ys = ([math.log(max(v, 1e-12)) for v in part[half:]] for part in (sizes, values))
    return statistics.linear_regression(xs, ys).slope


def exponent(sizes: list[float], values: list[float] | None, large: float | None = None) -> str:
    """Format an exponent for a table, followed by that of large sizes if it differs; a dash if there are no values."""
    if values is None:
        return "–"
    here = f"{slope(sizes, values):.2f}".replace("-0.00", "0.00")
    return here if large is None or math.isclose(float(here), large, abs_tol=0.005) else f"{here}, then {large}"


def middles(line: dict) -> list[float] | None:
    """Return the median seconds of each size."""
    return line["seconds"] and [statistics.median(turns) for turns in line["seconds"]]


def number(size: float) -> str:
    """Format a size as briefly as it can be read."""
    return f"{size:,.0f}" if size >= 20 else f"{size:.3g}"


def tables(found: dict) -> str:
    """Return the tables of the page in Markdown."""
    rows = [
        "| trained | what grows | on paper | time on paper | measured | memory on paper | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for sweep in found["sweeps"].values():
        sizes = sweep["sizes"]
        span = f"{sweep['axis']}, {number(sizes[0])} to {number(sizes[-1])}"
        for name, line in sweep["lines"].items():
            title = f"{sweep['title']}{f': {name}' if name else ''}"
            pairs = zip(("time", "memory"), line["exponents"], (middles(line), line["bytes"]), strict=True)
            exponents = [
                f"{exponent(sizes, line[f'paper_{of}'], large)} | {exponent(sizes, values)}"
                for of, large, values in pairs
            ]
            rows.append(f"| {title} | {span} | {sweep['paper']} | {' | '.join(exponents)} |")
    rows += ["", "| the same step | | ms | memory, MB | share of the baseline's memory |", "|---|---|---|---|---|"]
    for title, ways in found["levers"].items():
        whole = next(iter(ways.values()))["bytes"]
        rows += [
            f"| {title} | {name} | {1e3 * statistics.median(way['seconds']):.0f} | {way['bytes'] / 1e6:.0f} | "
            f"{way['bytes'] / whole:.0%} |"
            for name, way in ways.items()
        ]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    where = f"{machine(found)}; Python {found['python']}, {versions}; median of {found['turns']} turns."
    return "\n".join([where, "", *rows])


def machine(found: dict) -> str:
    """Describe where it was measured."""
    threads = f", {found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return found["machine"] + (threads if found["device"] == "cpu" else "")


def put_between(page: str, text: str) -> str:
    """Return a page with `text` between its two marks, and everything else unchanged."""
    begin, end = MARKS
    found, times = re.subn(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"expected {begin} and {end} once")
    return found


def draw(found: dict, path: Path, of: str) -> None:
    """Draw small multiples of `time` or `memory`: measured values, and dashed the law on paper from the last size."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(found["sweeps"]) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns).flatten()
    for axes, sweep in zip(grid, found["sweeps"].values(), strict=False):
        draw_sweep(axes, sweep, of)
    for axes in grid[len(found["sweeps"]) :]:
        axes.set_visible(False)
    what = "a training step" if of == "time" else "memory"
    figure.suptitle(
        f"{what}: measured, with its exponent over the upper half of the sizes; "
        f"dashed and in brackets: on paper\n{machine(found)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def draw_sweep(axes, sweep: dict, of: str) -> None:
    """Draw the lines of one sweep, each in its colour, without those that lack `time` or `memory`."""
    factor, unit = (1e3, "ms") if of == "time" else (1e-6, "MB")
    sizes, drawn = sweep["sizes"], []
    lines = {name: line for name, line in sweep["lines"].items() if of == "memory" or line["seconds"]}
    for name, line in lines.items():
        colour = COLOURS[list(sweep["lines"]).index(name)]
        values = [factor * value for value in (middles(line) if of == "time" else line["bytes"])]
        paper = line[f"paper_{of}"]
        label = f"{name if len(lines) > 1 else ''} {exponent(sizes, values)} ({exponent(sizes, paper)})".strip()
        axes.plot(sizes, values, "o-", color=colour, markersize=4, linewidth=1.2, label=label)
        if paper:
            guide = [values[-1] * value / paper[-1] for value in paper]
            axes.plot(sizes, guide, "--", color=colour, linewidth=1.1, alpha=0.7)
        drawn += values
    axes.set(xscale="log", yscale="log", xlabel=sweep["axis"], ylabel=unit)
    axes.set_title(sweep["title"], fontsize=9)
    plain_ticks(axes, sizes, drawn)
    axes.legend(fontsize=8, frameon=False, handlelength=1.2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def plain_ticks(axes, sizes: list[float], values: list[float]) -> None:
    """Label few sizes with plain numbers, leave room above for the legend, and make a flat line look flat."""
    middle = math.sqrt(min(values) * max(values))
    low, high = min(min(values) / 1.5, middle / 4), max(2.5 * max(values), 5 * middle)
    axes.set_ylim(low, high)
    apart = [size for size, before in zip(sizes, [0, *sizes], strict=False) if size > 1.3 * before]
    axes.set_xticks(apart, [number(size) for size in apart], fontsize=7)
    axes.minorticks_off()
    powers = [power for power in range(-6, 7) if low <= 10.0**power <= high]
    ticks = [m * 10.0**power for power in range(-6, 7) for m in ((1,) if len(powers) > 1 else (1, 3))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks], fontsize=7)
    axes.tick_params(length=2)


def write(found: dict, folder: Path) -> None:
    """Write the pictures, and the tables of the page."""
    (folder / "images").mkdir(exist_ok=True)
    draw(found, folder / "images/scaling.png", "time")
    draw(found, folder / "images/scaling-memory.png", "memory")
    page = folder / "scaling.md"
    page.write_text(put_between(page.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")


def lines_of(found: dict) -> str:
    """Format as JSON, with each list of numbers on one line."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text) + "\n"
