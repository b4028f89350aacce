"""Turn a trained task into a verified bundle for one target: `bundle.export`. Devices are in `targets`.

Importing this package imports nothing heavy, so that `export.py --list-targets` returns at once.
"""
