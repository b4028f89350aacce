"""report.md: the manifest for people."""


def report(manifest: dict, sizes: dict[str, int]) -> str:
    """Markdown from a manifest and the size of each file in bytes."""
    target, verification = manifest["target"], manifest["verification"]
    lines = [
        f"# {manifest['kind']} for {target['name']}",
        "",
        f"{target['description']}: {target['precision']}, {target['provider']}, opset {target['opset']}.",
        "",
        "    python -m dlref.runtime FOLDER INPUT...",
        "",
        "## Graphs",
        "",
        "| file | MB | inputs | outputs |",
        "|---|---|---|---|",
    ]
    for graph in manifest["graphs"].values():
        signature = (", ".join(map(_signature, graph[side])) for side in ("inputs", "outputs"))
        lines.append(f"| {graph['file']} | {sizes[graph['file']] / 1e6:.2f} | {' | '.join(signature)} |")
    lines += [
        "",
        "## The task's metric, by PyTorch and by this bundle",
        "",
        "| metric | split | samples | PyTorch | bundle | largest difference of an output |",
        "|---|---|---|---|---|---|",
    ]
    for row in (verification["metric"], verification["test"]):
        lines.append(
            f"| {row['name']} | {row['split']} | {row['n']} | {row['pytorch']:.4f} | {row['bundle']:.4f} "
            f"| {row['max_abs_error']:.1e} |"
        )
    lines += [
        "",
        "## Parity with PyTorch",
        "",
        "| graph | input shapes | largest difference |",
        "|---|---|---|",
    ]
    for row in verification["parity"]:
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in row["shape"].items())
        lines.append(f"| {row['graph']} | {shapes} | {row['max_abs_error']:.1e} |")
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return "\n".join([*lines, "", f"Made with {versions}.", ""])


def _signature(value: dict) -> str:
    return f"{value['name']} {value['type']} ({', '.join(map(str, value['shape']))})"
