"""Activations that exist already, in memory or on disk, for a probe to read, and the stores it writes."""
