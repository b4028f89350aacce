"""Support for the training of any task: a run's folder, checkpoints, devices, progress, profiles.

Configs name nothing in this package; the classes that a config can name are in `dlref.tasks`.
"""
