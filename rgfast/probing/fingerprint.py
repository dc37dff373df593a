"""The fingerprint of a probed model's weights, taken when no forward has to wait for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.beside import Beside, on_gpus
from rgfast.probing.offloaded import is_offloaded
from rgfast.probing.sharding import is_sharded

__all__ = ["Fingerprint"]


class Fingerprint:
    """That of the weights of one model, from :meth:`open` and :meth:`began` to :meth:`put_into` or
    :meth:`stop`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: str | None = None
        self._beside: Beside | None = None
        self._due = False  # until the first forward
        self.sharded = is_sharded(model)
        self._read_once = self.sharded or is_offloaded(model)

    def open(self, *, alone: bool, needed: bool) -> None:
        """Forwards will follow. Weights are read now, which would hold up a forward; those on GPUs wait for
        :meth:`began` if this process is ``alone``.

        Raises ValueError if they are ``needed`` and cannot be read.
        """
        self._due = alone and not self._read_once and on_gpus(self._model)
        if not self._due:
            self._found = checkpoints.fingerprint(self._model)
            if self._found is None and needed:
                self.known()  # which says so

    def began(self) -> None:
        """A forward begins. Weights on GPUs come to the host beside the first one, or before it in training,
        which is going to change them."""
        if self._due:
            self._due = False
            if self._model.training:
                self._found = checkpoints.fingerprint(self._model)
            else:
                self._beside = Beside(self._model)

    def forgo(self) -> None:
        """Take none when forwards begin: it is known from a checkpoint."""
        self._due = False

    def stop(self) -> None:
        """Forwards have failed: end what reads the weights beside them."""
        if self._beside is not None:
            self._beside.stop()

    def put_into(self, provenance: dict[str, Any]) -> None:
        """Put the fingerprint that was taken beside the forwards where it belongs, or the one of now where
        weights have changed since."""
        if self._beside is not None:
            self._found = self._beside.digest() or checkpoints.fingerprint(self._model)
            provenance["weights"] = self._found
            self._beside = None

    def known(self) -> str:
        """That of the weights; if they are sharded or offloaded, as they were at the start.

        Raises ValueError if they cannot be read.
        """
        found = self._found if self._read_once else None
        return found or checkpoints.known_fingerprint(self._model)

    def matches(self, digest: str) -> bool:
        """Whether ``digest``, of a checkpoint, is :meth:`known`, or the model's as rgfast 0.1 took it."""
        return digest == self.known() or not (self.sharded or not checkpoints.is_model(digest, self._model))

    def found(self) -> str | None:
        """The one that was taken, or the one of now; None if weights cannot be read."""
        return self._found or checkpoints.fingerprint(self._model)

    def so_far(self) -> str | None:
        """:meth:`found`, but None while it is being taken beside forwards: :meth:`put_into` has it later."""
        return None if self._beside is not None else self.found()
