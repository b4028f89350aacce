"""What a GPU does."""

BENCHMARKS = {}
