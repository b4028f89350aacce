"""What dlref is measured by, beside its peers: `python -m benchmarks`."""
