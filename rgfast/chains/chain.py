"""The chain itself: an immutable transition matrix and everything that follows from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rgfast.chains import gaps, kinds, modes, posterior, sampling
from rgfast.chains.stochastic import as_stochastic
from rgfast.validation import as_floats, as_tensor, check_integer, kind_of

__all__ = ["MarkovChain"]

# Eigenvalues err by 1e-16 and more: a smaller gap has lost half its digits.
_NEAR = 1e-8


class MarkovChain:
    """A Markov chain with a known spectrum, samples of it, and what can be known of hidden tokens.

    ``transition``: a row-stochastic matrix ``[V, V]``, V >= 2: torch tensor, numpy array or nested lists,
    entry (i, j) the probability of j after i. Kept in fp64, immutable; every property is computed from it in
    fp64. ``label``: the name it goes by in results.

    Raises TypeError for what is not a matrix of real numbers; ValueError unless it is square, finite,
    nonnegative, its rows sum to 1 (within 1e-9, or 1e-6 when given in fp32; they are then scaled to 1) and
    its stationary distribution is unique (one recurrent class).

    >>> from rgfast import MarkovChain
    >>> chain = MarkovChain([[0.9, 0.1], [0.3, 0.7]])
    >>> [round(p, 6) for p in chain.stationary.tolist()]
    [0.75, 0.25]
    >>> round(chain.relaxation_time, 6)
    2.5
    """

    def __init__(self, transition: Tensor | ArrayLike, label: str = "matrix") -> None:
        if not isinstance(label, str) or not label:
            raise TypeError(f"label must be a string that is not empty, got {label!r}")
        self._matrix = as_stochastic(transition)
        self._matrix.flags.writeable = False
        self._stationary = modes.stationary_distribution(self._matrix)
        self._stationary.flags.writeable = False
        self._label = label
        # Eigenvalues of a named kind, known better from their formula than from the rounded matrix.
        self._formula: NDArray[np.complex128] | None = None
        self._semigroup = False

    @classmethod
    def from_correlation_length(
        cls,
        xi: float,
        states: int = 16,
        kind: str = "two-scale",
        clusters: int = 4,
        fast_exponent: float = 4.0,
        seed: int = 0,
        spread: float = 5.0,
    ) -> MarkovChain:
        """The chain of a kind whose correlation length -1/ln|lambda_2| is ``xi``, exactly (relative 1e-12).

        With U = 11ᵀ/V, slow = exp(-1/xi), and every kind but ``zipf-tree`` a semigroup (its k-th power is
        the same kind at xi/k):

        - ``two-scale``: U + slow (C - U) + slow^r (I - C), C the average over each of ``clusters`` equal runs
          of states, r = ``fast_exponent`` >= 1;
        - ``lazy``: U + slow (I - U);
        - ``ring-heat``: heat kernel exp(-tL) of the ring of V states;
        - ``cyclic``: Poisson-distributed steps forward round the ring: not reversible, complex pairs, xi by
          modulus;
        - ``random-reversible``: exp(-tQ), Q a random reversible generator (log-normal conductances and
          stationary weights), drawn from ``seed``;
        - ``zipf-tree``: the stationary distribution moves with xi, pi_v ∝ (v + 1)^(-2/(1 + xi)) for v = 0, 1,
          …, and no two modes are equally slow: decay lengths xi · spread^(-(k - 1)/(V - 2)), k = 1 … V - 1,
          from xi to xi/``spread`` (>= 1). Reversible: Σ (lambda_k - lambda_{k+1}) C_k, C_k the average under
          pi over each of k + 1 runs of states, of which the next halves the first largest;
        - ``iid``: U, whose correlation length is 0: ``xi`` is not read.

        ``clusters`` and ``fast_exponent`` are read by ``two-scale`` only, ``seed`` by ``random-reversible``
        only, ``spread`` by ``zipf-tree`` only.

        The eigenvalues are those of the formula; ``transition`` is its matrix rounded to fp64, whose own xi
        agrees to 1e-12 between 0.2 and 200 and to 1e-7 from end to end.

        Raises ValueError for xi outside 0.05 to 5000 (beyond, fp64 does not resolve the slowest mode), for an
        unknown kind, states below 2 (3 for ``cyclic``), clusters below 2 or not dividing states,
        fast_exponent or spread below 1 (the fast modes would be the slow ones), a negative seed. TypeError
        where a number has the wrong type.

        >>> from rgfast import MarkovChain
        >>> short, long = (MarkovChain.from_correlation_length(xi) for xi in (1, 7))
        >>> bool((long.decimate(7).transition - short.transition).abs().max() < 1e-15)
        True
        """
        return cls._from_kind(kinds.Kind(kind, clusters, fast_exponent, seed, spread), xi, states)

    @classmethod
    def from_label(cls, label: str, xi: float, states: int = 16) -> MarkovChain:
        """The chain that ``label`` names at correlation length ``xi``.

        Labels: ``two-scale``, ``two-scale:r=30``, ``two-scale:K=2``, ``two-scale:K=2,r=30``, ``lazy``,
        ``ring-heat``, ``cyclic``, ``random-reversible``, ``random-reversible:seed=3``, ``zipf-tree``,
        ``zipf-tree:spread=10``, ``iid`` (whose xi is 0: the argument is not read). K is the number of
        clusters, r the fast exponent of :meth:`from_correlation_length`.

        Raises what :meth:`from_correlation_length` raises, and ValueError for a label it cannot read.

        >>> from rgfast import MarkovChain
        >>> MarkovChain.from_label("two-scale:r=30,K=2", 7)
        MarkovChain('two-scale:K=2,r=30', states=16, correlation_length=7)
        """
        return cls._from_kind(kinds.parse_label(label), xi, states)

    @classmethod
    def _from_kind(cls, kind: kinds.Kind, xi: float, states: int) -> MarkovChain:
        matrix, values = kinds.build(kind, xi, states)
        return cls(matrix, kind.label)._with_formula(values, kind.is_semigroup)

    def _with_formula(self, values: NDArray[np.complex128], semigroup: bool) -> MarkovChain:
        self._formula, self._semigroup = modes.sort_spectrum(values), semigroup
        return self

    @classmethod
    def from_npy(cls, path: str | Path) -> MarkovChain:
        """The chain whose transition matrix is stored in the NumPy file ``path`` (no pickles).

        Raises OSError when the file cannot be read, ValueError when it holds no array or what the constructor
        refuses, with the file's name.
        """
        try:
            matrix = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"path must be a .npy file with a matrix of numbers, got {str(path)!r}: {error}"
            ) from None
        if not isinstance(matrix, np.ndarray):
            raise ValueError(f"path must be a .npy file with one array, got an archive: {str(path)!r}")
        try:
            return cls(matrix)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} (from {str(path)!r})") from None

    def __repr__(self) -> str:
        xi = self.correlation_length
        return f"MarkovChain({self.label!r}, states={self.states}, correlation_length={xi:.6g})"

    @property
    def label(self) -> str:
        """The name of the chain: of its kind and options, as :meth:`from_label` reads it, or ``matrix``."""
        return self._label

    @property
    def states(self) -> int:
        """The number of states V."""
        return len(self._matrix)

    @property
    def transition(self) -> Tensor:
        """The transition matrix, fp64 ``[V, V]``, a copy."""
        return torch.from_numpy(self._matrix.copy())

    @property
    def stationary(self) -> Tensor:
        """The stationary distribution, fp64 ``[V]``, a copy; 0 for states that are left for good."""
        return torch.from_numpy(self._stationary.copy())

    @cached_property
    def _spectrum(self) -> NDArray[np.complex128]:
        if self._formula is not None:
            return self._formula
        return modes.spectrum(self._matrix, self._stationary)

    @property
    def eigenvalues(self) -> Tensor:
        """All V eigenvalues by falling modulus, the 1 first: fp64 where all are real, else complex128."""
        values = torch.from_numpy(self._spectrum.copy())
        return values if bool((values.imag != 0).any()) else values.real.clone()

    @cached_property
    def _gap(self) -> float:
        """1 - |lambda_2|; 0 if periodic."""
        gap = 1 - float(abs(self._spectrum[1]))
        near = max(_NEAR, 4 * self.states * float(np.finfo(np.float64).eps))
        if gap > near or self._formula is not None:
            return gap
        if gaps.period(self._matrix, self._stationary) > 1:
            return 0.0
        # Nearly reducible or nearly periodic: the eigenvalue is 1 to rounding, the way out of a class is not.
        return gaps.slowest_gap(self._matrix, self._stationary, self._spectrum, near)

    @property
    def correlation_length(self) -> float:
        """xi = -1/ln|lambda_2| in steps, lambda_2 second by modulus; 0 if i.i.d., inf if periodic.

        Finite for a chain that is nearly reducible or nearly periodic, however slow: see
        :attr:`relaxation_time`.
        """
        modulus, gap = float(abs(self._spectrum[1])), self._gap
        if gap > 0.5:  # a small modulus has its digits, 1 less it has not
            return 0.0 if modulus == 0 else -1 / math.log(modulus)
        return math.inf if gap == 0 else min(-1 / math.log1p(-gap), sys.float_info.max)

    @property
    def relaxation_time(self) -> float:
        """1/(1 - |lambda_2|) in steps; 1 if i.i.d., inf if periodic.

        Where lambda_2 rounds to 1 it comes from the transition probabilities between the nearly closed
        classes, not from the eigenvalue, and keeps its digits: a chain that leaves a class once in 1e16 steps
        relaxes in about 1e16. Beyond the range of fp64 it is the largest number there.
        """
        return math.inf if self._gap == 0 else min(1 / self._gap, sys.float_info.max)

    def autocorrelation(
        self,
        lags: int | Sequence[int] | NDArray[np.integer[Any]] | Tensor,
        observable: Tensor | ArrayLike | None = None,
    ) -> Tensor:
        """The stationary autocorrelation at ``lags`` (integers >= 0), fp64 in the shape of ``lags``.

        With ``observable``, a real function of the state ``[V]``: corr(f(x_0), f(x_lag)), what a sample
        shows. Without: that of the slowest mode, Re(lambda_2^lag). For a real lambda_2 it is the
        autocorrelation of each eigenfunction in ``eigenspaces()[1].basis``; for a complex pair of the two of
        them averaged.

        Raises TypeError for lags that are not integers, ValueError for negative ones, for an observable of
        another shape, not finite, or constant where the chain lives.

        >>> from rgfast import MarkovChain
        >>> chain = MarkovChain.from_correlation_length(7)
        >>> [round(c, 6) for c in chain.autocorrelation([0, 7, 14]).tolist()]
        [1.0, 0.367879, 0.135335]
        """
        steps = as_tensor(lags, "lags")
        if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
            raise TypeError(f"lags must be integers, got {lags!r}")
        if steps.numel() and int(steps.min()) < 0:
            raise ValueError(f"lags must be at least 0, got {int(steps.min())}")
        flat = steps.flatten().cpu().numpy()
        if observable is None:
            found = (self._spectrum[1] ** flat).real
        else:
            f = as_floats(observable, "observable")
            if f.shape != (self.states,) or not np.isfinite(f).all():
                raise ValueError(f"observable must be {self.states} finite numbers, got {observable!r}")
            f = f - self._stationary @ f
            variance = self._stationary @ f**2
            if not variance > 1e-24 * max(1.0, float(np.abs(f).max()) ** 2):
                raise ValueError(
                    "observable must vary between the states that the chain visits, got a constant"
                )
            of = {
                lag: f @ (self._stationary * (np.linalg.matrix_power(self._matrix, lag) @ f))
                for lag in set(flat)
            }
            found = np.array([of[lag] for lag in flat]) / variance
        return torch.from_numpy(np.asarray(found, dtype=np.float64)).reshape(steps.shape)

    def mutual_information(self, lag: int = 1) -> float:
        """Mutual information of tokens ``lag`` steps apart in nats: E ln(P^lag[x, y] / pi[y]).

        Raises TypeError or ValueError unless ``lag`` is an integer of at least 1.
        """
        check_integer(lag, "lag", least=1)
        power = np.linalg.matrix_power(self._matrix, lag)
        joint = self._stationary[:, None] * power
        live = joint > 0
        ratio = power[live] / np.broadcast_to(self._stationary, power.shape)[live]
        return max(0.0, float(joint[live] @ np.log(ratio)))

    def eigenspaces(self, tolerance: float = 1e-8) -> list[modes.Eigenspace]:
        """Eigenvalues with projectors, multiplicities and bases by falling modulus, the constant one first.

        Eigenvalues that hang together within ``tolerance`` (absolute) are one eigenspace, and so are the two
        of a complex pair. The projectors, fp64 ``[V, V]``, sum to the identity and commute with the
        transition matrix; they exist for non-reversible and non-diagonalisable chains too. See
        :class:`rgfast.chains.Eigenspace`.

        Raises ValueError unless ``tolerance`` is finite and at least 0, or where it separates eigenvalues
        that double precision cannot (a Jordan block of size m scatters its eigenvalue by about 1e-16^(1/m)).

        >>> from rgfast import MarkovChain
        >>> chain = MarkovChain.from_correlation_length(7)
        >>> [(round(space.modulus, 4), space.multiplicity) for space in chain.eigenspaces()]
        [(1.0, 1), (0.8669, 3), (0.5647, 12)]
        """
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance must be finite and at least 0, got {tolerance!r}")
        return modes.eigenspaces(self._matrix, self._stationary, tolerance)

    def power(self, k: int) -> MarkovChain:
        """The chain seen at every k-th step only: transition matrix P^k, correlation length xi/k.

        Keeps the label of the named kinds that are semigroups (all but ``zipf-tree``). Raises TypeError or
        ValueError unless ``k`` is an integer of at least 1, ValueError where P^k falls apart into several
        classes (a periodic chain).
        """
        check_integer(k, "k", least=1)
        matrix = np.linalg.matrix_power(self._matrix, k)
        chain = MarkovChain(matrix, self.label if self._semigroup or k == 1 else f"{self.label}^{k}")
        return chain if self._formula is None else chain._with_formula(self._formula**k, self._semigroup)

    decimate = power

    @cached_property
    def _tables(self) -> sampling.AliasTables:
        return sampling.AliasTables(self._matrix, self._stationary)

    def sample(self, n: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent sequences, int64 ``[n, length]``, stationary from the first token.

        One fp64 uniform a token through alias tables: probabilities are exact to 53 bits, and a transition of
        probability 0 never occurs. The tokens depend on ``generator`` alone (default: torch's global one),
        not on the number of threads, and lie on its device. Fastest from about a thousand sequences up; a few
        long ones go through Python token by token, at about a tenth of that rate.

        Raises TypeError or ValueError unless ``n`` and ``length`` are integers of at least 1, TypeError
        unless ``generator`` is a ``torch.Generator`` or None.

        >>> import torch
        >>> from rgfast import MarkovChain
        >>> chain = MarkovChain.from_correlation_length(7)
        >>> chain.sample(128, 12, torch.Generator().manual_seed(0)).shape
        torch.Size([128, 12])
        """
        check_integer(n, "n", least=1)
        check_integer(length, "length", least=1)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        return sampling.sample(self._tables, n, length, generator)

    def bayes_posterior(self, tokens: Tensor, mask: Tensor, radius: int | None = None) -> Tensor:
        """The exact distribution of every token given the visible ones, fp64 ``[n, T, V]``.

        One-hot where visible. ``tokens`` ``[n, T]``, integers; where ``mask`` (bool ``[n, T]``) is True they
        are hidden and their values are never looked at. With ``radius`` w only the visible tokens within w
        positions count for each position (w = 0: the stationary distribution at every hidden one).

        Forward-backward for a chain observed without noise (Rabiner, Proc. IEEE 77, 1989): with the nearest
        visible tokens x at distance a before and y at b after, the messages are row x of P^a and column y of
        P^b. fp64, on the device of ``tokens``; stable at any length. Memory 8 V (n T + 3 V g) bytes and more
        for work, g the longest distance to a visible token.

        Raises TypeError for other dtypes; ValueError for other shapes, visible tokens outside 0..V-1, a
        radius that is no integer >= 0, and visible tokens that have probability 0
        (below 1e-308) under the chain.

        >>> import torch
        >>> from rgfast import MarkovChain
        >>> chain = MarkovChain([[0.9, 0.1], [0.3, 0.7]])
        >>> hidden = torch.tensor([[False, True, False]])
        >>> chain.bayes_posterior(torch.tensor([[0, 1, 0]]), hidden)[0, 1]
        tensor([0.9643, 0.0357], dtype=torch.float64)
        """
        integral = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
        if not isinstance(tokens, Tensor) or tokens.dtype not in integral:
            raise TypeError(f"tokens must be an integer torch.Tensor, got {kind_of(tokens)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool torch.Tensor, got {kind_of(mask)}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape [n, T], got {tuple(tokens.shape)}")
        if mask.shape != tokens.shape:
            raise ValueError(
                f"mask must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(mask.shape)}"
            )
        if radius is not None:
            check_integer(radius, "radius", least=0)
        mask = mask.to(tokens.device)
        outside = ~mask & ((tokens < 0) | (tokens >= self.states))
        if bool(outside.any()):
            row, column = (int(i) for i in outside.nonzero()[0])
            raise ValueError(
                f"tokens must lie in 0..{self.states - 1} where they are visible, "
                f"got {int(tokens[row, column])} at position {column} of sequence {row}"
            )
        return posterior.bayes_posterior(self._matrix, self._stationary, tokens.long(), mask, radius)
