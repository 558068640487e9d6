"""Starts a training anywhere: `aromni launch --help`, docs/launch.md."""
