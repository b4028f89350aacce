"""Write report.md, the manifest in readable form."""

from dlref.runtime import runner_of
from dlref.runtime.bundle import CPU

FIGURES = {  # of a contender: column title, format
    "latency_ms": ("ms", "{:.2f}"),
    "latency_p95_ms": ("ms, 95%", "{:.2f}"),
    "throughput": ("per second", "{:.0f}"),
    "peak_rss_mb": ("peak MB", "{:.0f}"),
    "anonymous_mb": ("anonymous MB", "{:.0f}"),
    "first_answer_s": ("first answer, s", "{:.2f}"),
    "model_mb": ("model MB", "{:.2f}"),
    "installed_mb": ("installed MB", "{:.0f}"),
}

BUSY = 0.1  # share of the time spent waiting for a core


def report(manifest: dict, sizes: dict[str, int]) -> str:
    """Return the report in Markdown, from a manifest and the size of each file in bytes."""
    target, versions = manifest["target"], manifest["versions"]
    parts = [
        f"# {manifest['kind']} for {target['name']}",
        f"{target['description']}: {manifest['precision']}, {target['provider']}, opset {target['opset']}.",
        "    python -m dlref.runtime FOLDER INPUT...\n    python -m dlref.runtime bench FOLDER",
        "## Input",
        runner_of(manifest["kind"]).takes(manifest["metadata"]),
        *graphs(manifest["graphs"], sizes),
        *metrics(manifest["verification"], target),
        *measurement(manifest["measurement"], target["provider"] == CPU and runner_of(manifest["kind"]).spreads),
        *parity(manifest["verification"]),
        f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def table(titles: list[str], rows: list[list]) -> str:
    """Format a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def graphs(described: dict, sizes: dict[str, int]) -> list[str]:
    """Return the section with the signature of each graph."""
    rows = []
    for graph in described.values():
        sides = [
            ", ".join(f"{v['name']} {v['type']} ({', '.join(map(str, v['shape']))})" for v in graph[side])
            for side in ("inputs", "outputs")
        ]
        rows.append([graph["file"], f"{sizes[graph['file']] / 1e6:.2f}", *sides])
    return ["## Graphs", table(["file", "MB", "inputs", "outputs"], rows)]


def metrics(verification: dict, target: dict) -> list[str]:
    """Return the section with the metric on both splits, the refused attempts and the nodes kept in float."""
    rows, both = [], (verification["metric"], verification["test"])
    for row in both:
        error = "–" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}"
        rows.append([row["name"], row["split"], row["n"], f"{row['pytorch']:.4f}", f"{row['bundle']:.4f}", error])
    parts = [
        "## The task's metric, with PyTorch and with this bundle",
        table(["metric", "split", "samples", "PyTorch", "bundle", "largest output difference"], rows),
    ]
    if verification["test"]["rows"]:
        parts.append(
            "Selected rows, such as boxes after suppression, are compared as sets; discrete outputs, such as the class "
            "of a pixel, element by element. Rounding changed "
            + " and ".join(f"{row['flipped']} of {row['rows']} ({row['split']})" for row in both)
            + "."
        )
    refused = [
        f"- {' '.join(filter(None, [attempt['precision'], attempt['calibration']]))}"
        f"{kept_float(attempt['kept_float'])}: {attempt['refused']}."
        for attempt in verification["attempts"]
        if attempt["refused"]
    ]
    if refused:
        parts += [f"Tried for {target['precision']} and refused:", "\n".join(refused)]
    kept = verification["attempts"][-1]["kept_float"]
    if kept:
        parts += [f"Kept in float: {', '.join(f'{graph}/{name}' for graph in kept for name in kept[graph])}."]
    return parts


def kept_float(kept: dict) -> str:
    """Describe how many nodes an attempt kept in float."""
    count = sum(map(len, kept.values()))
    return f" with {count} node{'s' * (count > 1)} in float" if count else ""


def measurement(measured: dict, spread: bool) -> list[str]:
    """Return the section with a row for each contender, and the reasons why others are missing.

    Args:
        measured: the manifest's `measurement`.
        spread: whether the runner shares batches out over graphs of one thread each.
    """
    parts = ["## Measured"]
    alone = " Each graph of a bundle has one thread here; the runner spreads a batch over several threads."
    if measured["contenders"]:
        rows = [
            [name, *("–" if figures[key] is None else text.format(figures[key]) for key, (_, text) in FIGURES.items())]
            for name, figures in measured["contenders"].items()
        ]
        parts += [
            f"{measured['processor']}, {measured['threads']} threads; one answer at a time, throughput with eight at "
            "once. Each contender runs in its own process. PyTorch runs the program that torch.export saved, with only "
            "torch loaded; the size of its model is that of its weights." + (alone if spread else ""),
            table(["contender", *(title for title, _ in FIGURES.values())], rows),
        ]
    for name, figures in measured["contenders"].items():
        if held_up(figures):
            share = f"{figures['waited']:.0%}"
            parts.append(f"{name} waited for a core {share} of the time: the machine was busy, its speed is uncertain.")
    missing = measured["not_run"]
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name in missing if missing[name] == reason)
        parts.append(f"Not run: {names} ({reason}). To measure on the device: `python -m dlref.runtime bench FOLDER`.")
    return parts


def held_up(figures: dict) -> bool:
    """Return whether other programs on the machine held a contender up."""
    return (figures["waited"] or 0) > BUSY


def parity(verification: dict) -> list[str]:
    """Return the section with the differences from PyTorch at every declared size."""
    rows = [
        [
            row["graph"],
            row["precision"],
            ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in row["shape"].items()),
            f"{row['max_abs_error']:.1e}" + f", {row['flipped']} of {row['rows']} differ" * bool(row["rows"]),
            "judged by the metric" if row["tolerance"] is None else f"{row['tolerance']:.0e}",
        ]
        for row in verification["parity"]
    ]
    return [
        "## Difference from PyTorch",
        f"Executed by {verification['provider']}. The tolerance is relative for outputs above 1 and absolute below.",
        table(["graph", "precision", "input shapes", "largest difference", "tolerance"], rows),
    ]
