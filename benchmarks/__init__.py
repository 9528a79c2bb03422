"""Measurements of speed and size. They print; they never pass or fail. `python -m benchmarks` runs them all."""
