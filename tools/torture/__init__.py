"""Every fault at every place of a real run, and what is left judged: `make torture`."""
