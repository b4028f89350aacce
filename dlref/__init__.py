"""Deep-learning reference implementations, from one YAML file to a verified ONNX bundle.

Importing `dlref` never imports torch: `dlref.runtime` must work without it.
"""

import os

# Since 1.29, onnxruntime reports each session to its makers and stores an identifier of the device in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
