"""Deep-learning reference implementations, from one YAML file to a verified ONNX bundle.

Importing `dlref` never imports torch: `dlref.runtime` has to work where there is none.
"""

import os

# From 1.29 on onnxruntime reports each session to its makers, and keeps an identifier of the device in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
