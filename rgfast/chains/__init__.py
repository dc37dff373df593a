"""Markov chains with a known spectrum: transition matrices, sampling and the exact Bayes posterior."""

from rgfast.chains.chain import MarkovChain
from rgfast.chains.modes import Eigenspace
from rgfast.chains.posterior import captured_fraction

__all__ = ["Eigenspace", "MarkovChain", "captured_fraction"]
