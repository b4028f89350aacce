"""What goes wrong on purpose: malformed inputs through the whole commands, and readers against arbitrary bytes."""
