"""Train from one YAML file: `python train.py fit --config configs/lenet5_digits.yaml`."""

import sys

from dlref.cli import train

if __name__ == "__main__":
    sys.exit(train())
