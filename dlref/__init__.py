"""Deep-learning reference implementations, from one YAML file to a verified ONNX bundle.

Importing `dlref` never imports torch: `dlref.runtime` has to work where there is none.
"""

__version__ = "0.1.0"
