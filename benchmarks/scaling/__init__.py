"""How cost grows, on paper and measured: `python -m benchmarks.scaling` writes docs/scaling.md."""
