"""Thousands of saves with random faults, and nothing that grows with their number: `make soak`."""
