"""Looks inside a teacher cache: what it holds, what the teacher said, whether it is whole. Needs no torch."""
