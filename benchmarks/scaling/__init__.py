"""What grows how, on paper and measured: docs/scaling.md is written by `python -m benchmarks.scaling`."""
