"""One module per kind of bundle, each with its `Runner`."""
