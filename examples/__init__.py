"""Examples on real data, run as `python -m examples.<name>`; not installed."""
