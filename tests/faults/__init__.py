"""Deliberate faults: malformed and malicious inputs, arbitrary bytes, killed runs, several devices and load."""
