"""What surrounds the training of any task: a run's folder, checkpoints, devices, progress, profiles.

No config names anything in here; what a config can name is in `dlref.tasks`.
"""
