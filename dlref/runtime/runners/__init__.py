"""One module a kind of bundle, each with its `Runner`."""
