"""Figures from saved results."""
