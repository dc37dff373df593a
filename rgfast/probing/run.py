"""Probing a model: one pass over the batches, checkpoints along the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from rgfast.files import write_folder_atomically
from rgfast.probing import checkpoint as checkpoints
from rgfast.probing import coordinated_checkpoints
from rgfast.probing.capture.batches import batch_rows, check_order, iterate, sequences_of
from rgfast.probing.controls import random_weights, shuffled
from rgfast.probing.distributed import rank_path
from rgfast.probing.options import parse_memory
from rgfast.probing.result import ProbeResult
from rgfast.probing.sources.activations import Activations
from rgfast.probing.sources.keep import Keeper
from rgfast.probing.sources.replay import SavedActivations, as_replayed
from rgfast.probing.spec import ProbeOptions, ProbeSpec, shows_options
from rgfast.probing.watch import Probe, opened

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["probe"]


@shows_options(ProbeOptions)
def probe(
    model: nn.Module | Activations, batches: Any = None, **options: Unpack[ProbeOptions]
) -> ProbeResult:
    """Measures of every layer and position of ``model`` over ``batches``, a :class:`ProbeResult`.

    One pass in evaluation mode without gradients; memory does not depend on the number of samples.

    Args:
        model: any module. Hooks, training flags and grad mode are as before when this returns or raises. Or
            :class:`rgfast.Activations` that exist already, without ``batches``: ``layers`` then names some of
            theirs (all by ``"auto"``), and ``axes``, ``output`` and ``control`` are refused. Their ids are
            ``result.dataset.sequence_id``. Of several ranks that give the same ones each reads a part.
        batches: an iterable of batches (a list, a DataLoader), or one mapping of whole arrays or one array,
            which is cut into pieces of ``batch_size`` (by default 256; of a :class:`ResidualStack` on a GPU
            and an array up to 1,024 times ``groups``, as far as a quarter of ``memory``, and what the state
            leaves of it, holds their rows at all layers, without a checkpoint). A batch is a mapping (what
            ``forward`` takes by name is passed; the whole mapping, if ``forward`` takes a single argument of
            another name), a tuple (as many items as ``forward`` requires, and a padding mask among the
            others) or a tensor.
        layers: ``"auto"`` (the residual stream: the input of the first block and the output of each), the
            name of a stack of blocks, names, indices, globs or regular expressions, see
            :func:`rgfast.probing.capture.layers.resolve`. ``"sublayers"`` (``"sublayers:NAME"`` for a named
            stack) has the stream inside each block too: between attention, or another mixing, and the MLP,
            for families whose blocks are known (an error says how to name the points of others).
            A layer's output may be a tensor, or a tuple, mapping or dataclass holding one (see ``output``),
            with its axes in any order (see ``axes``). A module that runs several times in a forward is as
            many layers.
        positions: those followed one by one: indices, ``"first"``, ``"last"``, ``"all"``, or ``"auto"``: all
            if they fit ``memory``, else log-spaced ones. With padding, those from the end (``"last"``, −1)
            are each sequence's own, and ``"first"`` is 0 with ``origin="token"``.
        origin: where position 0 is with padding: ``"column"`` 0 of the batch, or each sequence's first
            ``"token"`` that counts.
        measures: ``"all"``, or some of ``effective_rank``, ``effective_rank_variance``,
            ``participation_ratio``, ``stable_rank``, ``numerical_rank`` (singular values above 1e-7 of the
            largest), ``effective_rank_uncentred``, ``effective_rank_variance_uncentred``, ``kernel_drift``
            (1 − biased CKA of neighbours), ``kernel_drift_debiased``, ``kernel_change`` (‖K' − K‖/‖K‖),
            ``cka`` (debiased), ``cka_biased``. Singular values are always there.
        pairs: of which layers CKA is taken: ``"adjacent"``, ``"all"`` or index pairs.
        mask: the name of a batch entry, or a function of the batch's entries, that gives ``[B, T]`` bool:
            True where the token was hidden. It makes the views ``visible`` and ``masked``.
        rows: views of some rows only, ``{"nouns": ..., "rest": ...}``, each pooled over positions as one
            cloud and named in the result (one selection that is not in a mapping: ``"rows"``). A selection is
            the name of a batch entry, a function of the batch's entries, or an array over all sequences in
            their order. It gives bool ``[B, T]``, True for the rows of the view (``[B]``: whole sequences),
            or whole numbers of which some are meant: ``("pos_tags", 3)``, ``(labels, [3, 4])``. ``"first"``
            and ``"last"`` are each sequence's first and last token that counts. Padding never counts.
        padding: which batch entry says what is padding: ``"auto"`` (``attention_mask`` and the like: whole
            numbers and bool, scores to be added, ``…key_padding_mask`` with True for padding; a decoder's, an
            encoder's and a tower's own), an entry's name, None (every position counts), or these by pattern
            of layer names: ``{"decoder.*": "decoder_attention_mask", "vision.*": None}``. Rows that are
            padding are never counted; ``result.notes`` says what was read otherwise than one may expect.
        axes: the order of axes in the layers' tensors: a layout such as ``"N T D"``, ``"T N D"`` or
            ``"N H W D"`` (N samples, D features, other letters positions, flattened in their order), or
            layouts by pattern of layer names, ``{"encoder.*": "T N D"}``. By default ``[B, D]``,
            ``[B, T, D]`` and ``[B, D, H, W]``, unless evidence moves that and none contradicts it:
            ``batch_first=False`` in a layer, the batch's size on the second axis, the widths of norms, linear
            maps and convolutions. Tokens in one row, ``[B·T, D]``, are laid out as ``[B, T, D]``.
        output: which tensor of a block's return value is the stream: an index, a key, a function of the
            return value, ``"sum"`` (adds a branch and its residual), or these by pattern of layer names. A
            layer ``name:input`` follows ``"sum"`` and patterns that end in ``:input``. By default the first
            tensor, unless a second one has the stream's shape.
        placements: of a model that several ranks run together (``parallelize_module``), what each rank has of
            the plain tensors that layers put out: ``Shard(1)`` (some of the positions), ``Shard(-1)``
            (features), ``Partial()``, ``Replicate()`` of ``torch.distributed.tensor``, or these by pattern of
            layer names. DTensors say so themselves, and tensors that are the same on all these ranks need
            nothing. See docs/distributed.md.
        targets: name -> what to predict linearly from each layer: an array over all sequences, the name of a
            batch entry, or a function of the entries; vectors ``[B, T, m]`` or ``[B, m]``, or integer labels
            ``[B, T]`` or ``[B]`` (one-hot). ``target_r2`` is the R² on held-out groups of the least squares
            map from the others; with ``groups=1`` five groups are made.
        groups: G > 1 gives jackknife standard errors over G groups of sequences, number i in group i mod G.
            The state is G times as large.
        checkpoint: a file to write the state to, atomically, after every ``checkpoint_every`` batches and at
            the end: all rows so far, or moments. If it exists the run goes on from it: with the same batches
            in the same order the bits are those of a run that never stopped (on the same machine and
            versions). NaN and infinity are reported before anything is written.
        progress: show a bar, and print what was chosen and what it costs; by default on a terminal.
        memory: bytes, or text such as ``"4GiB"``, that the state may take, of those that a GPU has free.
        views: some of ``visible`` (rows whose token is seen), ``masked``, ``position`` (all rows at each
            position), ``pooled`` (all rows at all positions as one cloud), ``mean_pooled`` (a sequence's mean
            over positions), ``flattened`` (a sequence as one row), and names of ``rows``; by default all that
            the data allow, ``flattened`` where it is small. Drift is NaN and rank 0 for a layer without
            variance.
        refine: whether to keep, beside the moments, triangular factors of layers whose rows are deficient but
            for rounding (what a LayerNorm puts out, more features than tokens): they give the small singular
            values that moments lose, at up to 1.5 times the state and a few times the products of such a
            layer. By default on the CPU for widths to 512, where ``memory`` allows; ``effective_rank_bound``
            says what is known either way.
        route: ``"moments"`` sums up second moments as the batches come. ``"samples"`` holds the rows of all
            layers and takes those of a position at once, in a fraction of the time, on the smaller side of
            rows and features. It is for at most 4,096 sequences whose rows fit ``memory``, all on one device
            and off the CPU without padding or masks, of
            ``pairs`` adjacent or all, without refine, one process by itself. CKA and drift of
            positions then come from fp32 products (as those of :func:`rgfast.cka_matrix`: within 1e-6, close
            neighbors from fp64 ones). A :class:`ResidualStack` with ``mixing="none"`` takes a few positions
            at a time through all layers and, without targets or a checkpoint, has nothing held: merging or
            saving its result takes another forward. ``"auto"`` takes this route if it can, with compiled
            kernels, and the work is more than a moment's; what outgrows it is summed up from the first batch
            on.
            ``result.dataset.attrs["route"]`` says which it was.
        distributed: whether the ranks of torch.distributed probe together, each the sequences it is given:
            ``"auto"`` where torch.distributed is initialised, or torchrun started the process, with more than
            one rank; False never; True or a process group always. Every rank returns the result of all
            sequences, rank 0's first, and rank 0 alone writes its report and files. Arrays given for all
            sequences are of the rank's own, but of all for activations that the ranks divide. See
            docs/distributed.md.
        control: probe a control in the model's stead. ``"random_weights"``: a copy whose modules draw their
            weights anew, each by its own ``reset_parameters`` (Hugging Face models: by their configuration);
            buffers stay, and the model is as before.
            ``"shuffled_tokens"``: tokens (whole numbers ``[B, T]``) are permuted within each batch, across
            sequences and positions; padding and what ``mask`` hides stay where they are.
            ``result.flow(control=twin)`` reads both together; ``result.dataset.attrs["control"]`` names it.
        control_seed: of the weights or the permutations.
        timeout: seconds without a sign of life after which another rank counts as dead.
        owner: who sums up, of several ranks. ``"ranks"``: each its own sequences, all layers; the sums are
            added at the end. ``"layers"``: each some layers of all sequences, so that state, spectra and time
            to solve them are shared out; rows go to their owners beside the forwards, and a rank waits for
            others that are behind. It needs ``pairs`` adjacent (or no measure that compares layers) and
            layers that run in every forward; its result cannot be merged.
            ``"auto"``: ``"layers"`` if moments of all layers do not fit ``memory``. See docs/distributed.md.
        keep: a new or empty folder to write activations of the probed layers to, as they were computed:
            a sample of the sequences that ``keep_bytes`` hold, which :class:`rgfast.Activations` reads (its
            ``ids`` number the sequences from 0, in the order in which batches bring them). The folder is
            there when all is measured, or not at all; meanwhile up to twice as many bytes lie beside it.
            Hidden tokens are the entry ``"masked"``. Not with ``checkpoint``, nor with several ranks.
        keep_bytes: bytes, or text such as ``"1GiB"``, that kept activations may take.
        keep_seed: of the sample, which does not depend on ``batch_size``.

    Moments are fp64, whatever the model computes in; definitions are those of the functions of the same
    names. The bits do not depend on how samples are cut into batches, as far as the model's own do not.

    Raises ValueError for options out of range, layers that are not found, layers whose axes or stream can be
    read in two ways (naming ``axes`` or ``output``), a budget that nothing fits (naming the change to make),
    NaN or infinity (naming layer, position and count), fewer than 2 sequences, and options that saved
    activations do not have (TypeError for ``batches`` beside them); whatever the model raises is passed on.
    With several ranks, :class:`rgfast.probing.RankError` (a RuntimeError)
    where another one died or failed.

    >>> import torch, rgfast
    >>> stack = rgfast.ResidualStack(width=4, depth=2, mixing="none")
    >>> result = rgfast.probe(stack, torch.randn(100, 3, 4), progress=False)
    >>> result.order_parameter("position", "kernel_drift").values
    array([0., 0.])
    """
    spec = ProbeSpec(**options)
    ids = None
    if isinstance(model, Activations):
        if batches is not None:
            raise TypeError(
                "batches must be left out, since the activations are the batches, got "
                f"{type(batches).__name__}"
            )
        ids = model.ids
        model, spec = as_replayed(model, spec)
        batches = model.batches(spec.sequences_at_once)
    with ExitStack() as stack:
        if spec.control == "random_weights":
            model = stack.enter_context(random_weights(model, spec.control_seed))
        result = _run(model, batches, spec) if spec.keep is None else _run_keeping(model, batches, spec, ids)
    if spec.control is not None:
        result.dataset.attrs.update(control=spec.control, control_seed=spec.control_seed)
    ids = model.ids if isinstance(model, SavedActivations) else None
    return result if ids is None else result.with_ids(ids)


def _run_keeping(
    model: nn.Module, batches: Any, spec: ProbeSpec, ids: Sequence[int | str] | None
) -> ProbeResult:
    assert spec.keep is not None
    found: list[ProbeResult] = []

    def fill(folder: Path) -> None:
        keeper = Keeper(folder, parse_memory(spec.keep_bytes), spec.keep_seed)
        found.append(_run(model, batches, spec, keeper))
        keeper.end(ids)

    write_folder_atomically(spec.keep, fill)
    return found[0]


def _run(model: nn.Module, batches: Any, spec: ProbeSpec, keeper: Keeper | None = None) -> ProbeResult:
    path = None if spec.checkpoint is None else Path(spec.checkpoint)
    ordered = [(f"targets[{one.name!r}]", "the target") for one in spec.new_targets() if one.in_order]
    ordered += [(one.said, "it") for one in spec.new_selections() if one.in_order]
    check_order(ordered, batches)
    watched = opened(model, spec, keeper)
    rank, ranks = (0, 1) if watched.ranks is None else (watched.ranks.rank, watched.ranks.size)
    if keeper is not None and ranks > 1:
        raise ValueError(
            f"keep: one process alone keeps activations, got {ranks} ranks; with distributed=False each rank "
            "keeps those of its own sequences, in a folder of its own"
        )
    replayed = watched.model if isinstance(watched.model, SavedActivations) else None
    watched.tally.expected = sequences_of(batches) if replayed is None else replayed.sequences
    quiet = bool(rank) or not spec.shows_progress
    pieces = iterate(batches, watched.batch_size(batches))
    if spec.control == "shuffled_tokens":
        pieces = _shuffled(pieces, watched.model, spec, rank)
    with tqdm(unit="position", desc="probe", disable=quiet, leave=False) as bar:
        result, taken = watched.by_samples(pieces, bar.update)
    if result is not None:
        return result
    pieces = chain(taken, pieces)
    with watched:
        watched.model.eval()
        stream = enumerate(pieces, start=1)
        saved = None
        if path is not None:
            path = rank_path(path, rank, ranks)
            checkpoints.clear_stale(path)
        if watched.ranks is not None:
            coordinated_checkpoints.choose(watched.ranks, path)
        if path is not None:
            saved = _Saved(watched, path, spec.checkpoint_every)
            saved.resume(stream, say=not quiet)
        bar = tqdm(unit="sequence", desc="probe", disable=quiet)
        with torch.no_grad(), bar:
            for done, last in stream:
                if saved is not None:
                    saved.begin(done, last)
                watched.run(last)
                bar.update(batch_rows(last))
                if saved is not None:
                    saved.passed()
        if saved is not None:
            saved.end()
    result = watched.result()
    if saved is not None:
        saved.close()
    return result


def _shuffled(pieces: Iterator[Any], model: nn.Module, spec: ProbeSpec, rank: int) -> Iterator[Any]:
    named = [spec.mask, *(target.entry for target in spec.new_targets())]
    named += [chosen.entry for chosen in spec.new_selections()]
    return shuffled(
        pieces,
        model,
        seed=spec.control_seed,
        rank=rank,
        mask=spec.mask,
        padding=spec.padding,
        reserved=frozenset(name for name in named if isinstance(name, str)),
    )


class _Saved:
    """The checkpoint of a run at ``path``, every so many batches."""

    def __init__(self, watched: Probe, path: Path, every: int) -> None:
        self._watched, self._path, self._every = watched, path, every
        self._done = 0
        self._last: str | None = None  # the digest of the last batch
        self._batch: Any = None
        self._new = False
        watched.tally.save_by(self._write)

    def resume(self, stream: Iterator[tuple[int, Any]], *, say: bool) -> None:
        """Restore the file, if it exists, and take from ``stream`` the batches it has seen."""
        watched, path = self._watched, self._path
        if not path.exists():
            return
        header, arrays = checkpoints.read(path)
        watched.restore(header, arrays)
        self._done, self._last = int(header["batches"]), header["last"]
        if say:
            print(f"probe: going on after batch {self._done} of {path}")
        if not self._done:
            return
        last = next((batch for number, batch in stream if number == self._done), None)
        if last is None or checkpoints.batch_digest(last) != self._last:
            raise ValueError(
                f"batches must be those that checkpoint {path} has seen {self._done} of, got others; "
                "delete it to start anew"
            )

    def begin(self, done: int, batch: Any) -> None:
        """Batch number ``done`` comes."""
        self._done, self._batch, self._new = done, batch, True
        if done % self._every == 0:
            self._watched.tally.save_next()

    def passed(self) -> None:
        """It has been measured."""
        if self._done % self._every == 0 and not self._watched.tally.shared:
            self._write()

    def end(self) -> None:
        """There are no more. Ranks that share out the layers write once all have come here."""
        if self._new and not self._watched.tally.shared:
            self._write()

    def close(self) -> None:
        """The result is there."""
        coordinated_checkpoints.before(self._path).unlink(missing_ok=True)
        del self._watched  # whose moments would live until a collection of cycles

    def _write(self) -> None:
        watched, path = self._watched, self._path
        if watched.plan is None:
            return
        header, arrays = watched.snapshot()
        if self._batch is not None:
            self._last = checkpoints.batch_digest(self._batch)
        if watched.tally.shared:
            coordinated_checkpoints.make_room(path)
        checkpoints.write(path, {**header, "batches": self._done, "last": self._last}, arrays)
        self._new = False
