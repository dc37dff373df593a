"""Implementations of this room's ops."""
