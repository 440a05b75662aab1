"""Directions of other projects, read and written as data."""
