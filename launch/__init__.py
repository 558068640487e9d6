"""Starts a training anywhere: `python -m launch.run --help`, docs/launch.md."""
