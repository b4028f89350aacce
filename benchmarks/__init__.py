"""Benchmarks of dlref beside its peers: `python -m benchmarks`."""
