"""Faults done to caches, by the thousand: flipped bits, killed writers, full disks, hostile files.

Each kind of fault is a room: a trial is a pure function of (seed, number) that returns an `Outcome`. `tests/faults`
runs a few trials of each room, `scripts/faults.py` runs the full counts.
"""
