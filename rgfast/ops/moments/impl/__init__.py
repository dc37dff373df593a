"""Implementations of this room's op."""
