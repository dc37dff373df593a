"""``rgfast probe``: a model and inputs from disk, a folder with everything measured."""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgfast.commands.parser import add_json, print_json
from rgfast.commands.probe_options import options_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rgfast.commands.inputs import Inputs
    from rgfast.commands.models import Loaded
    from rgfast.probing import ProbeResult

__all__ = ["add_probe", "configuration_in", "placed"]

FORMAT = "rgfast.probe-run/1"
_DONE_BEFORE = "was there already: nothing was computed"
_WRITTEN = "result.nc summary.csv report.html config.json and figures (*.png)"


def add_probe(commands: Any) -> None:
    """Add the subcommand to ``commands`` (what ``add_subparsers`` returned)."""
    probe = commands.add_parser(
        "probe",
        help="measure every layer and position of a model on disk",
        description="Run a model over texts or arrays once, and measure every layer and position\n"
        "of its residual stream: effective rank and other ranks, drift, CKA, spectra.\n\n"
        "MODEL is a folder: a Hugging Face folder (config.json and safetensors; needs\n"
        "transformers), or what MaskedTokenModel.save left (model.json). Nothing is\n"
        "downloaded, nothing is unpickled, no code of the folder is run. Of an\n"
        "encoder-decoder (T5, BART) the encoder is probed, unless --inputs has\n"
        "decoder_input_ids.\n\n"
        "Without --text and --inputs, MODEL is a folder of activations that exist\n"
        "already: .npy files, one per layer, or .safetensors files of layers, batches\n"
        "or requests, or what --keep left.\n\n"
        "Leaves in DIR: result.nc, summary.csv, figures, report.html and config.json;\n"
        "DIR is complete or not there. With --checkpoint, a run that was stopped goes\n"
        "on where it was when the same command is given again. Under torchrun each\n"
        "rank takes its share of the sequences, and rank 0 writes.",
        epilog="examples:\n"
        "  rgfast probe models/bert --text corpus.txt --length 64 --out runs/bert\n"
        "  rgfast probe models/bert --text corpus.txt --mask 0.15 --groups 8\n"
        "  rgfast probe models/gpt2 --inputs tokens.npy --pairs all --layers 0 6 12\n"
        "  rgfast probe runs/stack --inputs batch.npz --mask hidden --json\n"
        "  rgfast probe models/bert --inputs batch.npz --rows nouns=pos_tags:3 ends=last\n"
        "  torchrun --nproc-per-node 4 -m rgfast probe models/bert --text corpus.txt\n"
        '  rgfast probe saved/bert --axes "N T D" --groups 8',
    )
    add = probe.add_argument
    add("model", metavar="MODEL", help="the folder of the model, or of activations")
    source = probe.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text: a sequence a paragraph, or a line where there are no empty lines; "
        "tokenised by the folder's tokenizer, padding does not count",
    )
    source.add_argument(
        "--inputs",
        metavar="FILE",
        help=".npy or .npz: token ids [n, T], floats [n, T, D] or [n, D], or arrays named as "
        "the model's forward names them (input_ids, attention_mask, …)",
    )
    add("--length", type=int, metavar="T", help="cut texts to T tokens (default: 128, or the model's limit)")
    add("--limit", type=int, metavar="N", help="take the first N sequences (default: all)")
    add(
        "--mask",
        metavar="WHAT",
        help="which tokens are hidden, for the views visible and masked: a share such as 0.15 to "
        "hide, a bool array of the .npz, or none (default: those that hold the mask token)",
    )
    add(
        "--rows",
        nargs="+",
        metavar="NAME=WHAT",
        help="views of some rows: a bool array of the .npz, whole numbers and those that are meant "
        "(nouns=pos_tags:3,4), or each sequence's first or last token (ends=last) (default: none)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the hidden share and of --control (default: 0)")
    add(
        "--layers",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="names, indices, globs or re:PATTERN of modules (default: auto, the residual stream)",
    )
    add(
        "--positions",
        nargs="+",
        default=["auto"],
        metavar="T",
        help="indices, first, last, all, or auto (default: auto, all that fit the memory, else log-spaced); "
        "with padding, those from the end are each sequence's own",
    )
    add(
        "--origin",
        choices=("column", "token"),
        default="column",
        help="where position 0 is with padding: the first column, or each sequence's first token "
        "(default: column)",
    )
    add(
        "--padding",
        default="auto",
        metavar="NAME",
        help="the array that says what is padding, or none: every position counts (default: auto)",
    )
    add("--axes", metavar="AXES", help='of the layers\' tensors, such as "T N D" (default: found out)')
    add(
        "--files",
        choices=("auto", "layers", "batches", "requests"),
        default="auto",
        help="what a .safetensors file of activations is (default: found out)",
    )
    add(
        "--views",
        nargs="+",
        metavar="VIEW",
        help="visible, masked, position, pooled, mean_pooled, flattened, and names of --rows "
        "(default: all that the inputs allow)",
    )
    add(
        "--pairs",
        nargs="+",
        default=["adjacent"],
        metavar="PAIR",
        help="of which layers CKA is taken: adjacent, all, or pairs such as 0-3 2-5 (default: adjacent)",
    )
    add("--groups", type=int, default=1, metavar="N", help="groups for standard errors (default: 1, none)")
    add(
        "--control",
        choices=("random_weights", "shuffled_tokens"),
        help="probe a control instead: the model with random weights, or on shuffled tokens (default: none)",
    )
    add("--batch-size", type=int, default=256, metavar="N", help="sequences at once (default: 256)")
    add("--memory", default="4GiB", metavar="SIZE", help="what the state may take (default: 4GiB)")
    add(
        "--refine",
        action=argparse.BooleanOptionalAction,
        help="keep factors for small singular values (default: for widths up to 512)",
    )
    add("--keep", metavar="DIR", help="write activations of a sample of the sequences here (default: none)")
    add("--keep-bytes", default="1GiB", metavar="SIZE", help="what they may take (default: 1GiB)")
    add("--checkpoint", metavar="FILE", help="write the state here and go on from it (default: none)")
    add("--checkpoint-every", type=int, default=16, metavar="N", help="batches between writes (default: 16)")
    add("--moments", action="store_true", help="keep the moments in result.nc, to merge it with others later")
    add("--allow-pickle", action="store_true", help="take pickled weights, of a folder that you trust")
    add("--device", default="cpu", metavar="NAME", help="where the model runs, e.g. cuda (default: cpu)")
    add("--out", metavar="DIR", help="output folder (default: runs/probe-NAME of MODEL, with -CONTROL)")
    add_json(probe, "a summary of the result")
    probe.set_defaults(run=_probe)


def _probe(args: argparse.Namespace) -> None:
    # torch and all that stands on it is only loaded by the command that needs it.
    from rgfast.commands.inputs import hide, read_arrays, read_text, try_one
    from rgfast.commands.models import load_model
    from rgfast.files import check_new_folder
    from rgfast.probing import ProbeResult
    from rgfast.probing.spec import ProbeSpec

    options = options_of(args)
    name = f"probe-{Path(args.model).resolve().name}" + (f"-{args.control}" if args.control else "")
    out = Path(args.out) if args.out else Path("runs") / name
    held = configuration_in(out, FORMAT)
    if args.text is None and args.inputs is None:
        _probe_saved(args, options, out, held)
        return
    model = load_model(args.model, allow_pickle=args.allow_pickle, seed=args.seed)
    if args.text is not None:
        inputs = read_text(args.text, model, limit=args.limit, length=args.length)
    else:
        inputs = read_arrays(args.inputs, model, limit=args.limit)
    whole, model = model, model.for_inputs(inputs.batch)
    selections = ProbeSpec(rows=options.get("rows")).new_selections()
    named = frozenset(chosen.entry for chosen in selections if chosen.entry is not None)
    inputs = hide(replace(inputs, named=named), model, args.mask, args.seed)
    config = _config(args, options, model, inputs)
    rank, ranks = _rank()
    if model is not whole and rank == 0:
        told = f"the encoder of {type(whole.module).__name__} is probed"
        print(f"rgfast: {told} (--inputs with decoder_input_ids runs the decoder, too)", file=sys.stderr)
    if held is not None:
        _check_same(held, config, out)
        if rank == 0:
            _tell(args, ProbeResult.load(out / "result.nc"), out, _DONE_BEFORE)
        return
    module = placed(model.module.stack if _is_stream(model, inputs) else model.module, args.device)
    try_one(inputs, module)
    if rank == 0:
        check_new_folder(out)
    with _resumable(args.checkpoint):
        share = inputs.share(rank, ranks)
        result = _run(args, module, share.batch, share.mask, options)
        if rank == 0:
            _write(out, result, config, moments=args.moments)
    if rank == 0:
        _tell(args, result, out, _WRITTEN)


def _probe_saved(
    args: argparse.Namespace, options: dict[str, Any], out: Path, held: dict[str, Any] | None
) -> None:
    from rgfast.commands.activations import describe, holds_model, mask_of, open_activations
    from rgfast.files import check_new_folder
    from rgfast.probing import ProbeResult

    if holds_model(Path(args.model)):
        raise ValueError(f"one of --text and --inputs must say what the model in {args.model} runs on")
    if _rank()[1] > 1:
        raise ValueError("saved activations are probed by one process, without torchrun")
    acts = open_activations(args, args.model)
    mask = mask_of(args, acts)
    config = _settings(args, options, describe(args, acts))
    if held is not None:
        _check_same(held, config, out)
        _tell(args, ProbeResult.load(out / "result.nc"), out, _DONE_BEFORE)
        return
    check_new_folder(out)
    with _resumable(args.checkpoint):
        result = _run(args, acts, None, mask, options)
        _write(out, result, config, moments=args.moments)
    _tell(args, result, out, _WRITTEN)


def _check_same(held: dict[str, Any], config: dict[str, Any], out: Path) -> None:
    if any(held.get(name) != config[name] for name in ("model", "inputs", "options")):
        raise ValueError(
            f"out must be a new folder, and {out} holds another result (its config.json tells which)"
        )


def _rank() -> tuple[int, int]:
    """This process's number and how many torchrun started; (0, 1) without it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def configuration_in(out: Path, format_: str) -> dict[str, Any] | None:
    """The configuration of the result that ``out`` holds; None where it is new. ValueError for others."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, and {out} is a file")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"out must be in a folder, and {above} is a file")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("format") != format_ or not (out / "result.nc").is_file():
        raise ValueError(f"out must be a new folder, and {out} holds other files")
    return config


def _config(
    args: argparse.Namespace, options: dict[str, Any], model: Loaded, inputs: Inputs
) -> dict[str, Any]:
    """What decides the numbers, as JSON gives it back, and what they were made with."""
    from rgfast.probing.checkpoint import batch_digest, model_digest

    source = {
        "model": {
            "folder": str(model.folder),
            "kind": model.kind,
            "class": type(model.module).__name__,
            "digest": model_digest(model.module),
        },
        "inputs": {
            "file": str(args.text if args.text is not None else args.inputs),
            "arrays": {name: list(value.shape) for name, value in inputs.batch.items()},
            "mask": inputs.mask,
            "digest": batch_digest(inputs.batch),
        },
    }
    return _settings(args, options, source)


def _settings(args: argparse.Namespace, options: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    from rgfast.runtime.environment import facts

    config = {
        "format": FORMAT,
        **source,
        "options": {**options, "batch_size": args.batch_size, "device": args.device, "moments": args.moments},
        "environment": facts(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _is_stream(model: Loaded, inputs: Inputs) -> bool:
    return model.kind == "rgfast" and inputs.main == model.floats


def placed(module: Any, device: str) -> Any:
    """``module`` on a device. Raises ValueError for one that torch does not have here."""
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that torch has here, got {device!r} ({error})") from error


def _run(
    args: argparse.Namespace, source: Any, batches: Any, mask: str | None, options: dict[str, Any]
) -> ProbeResult:
    from rgfast.probing import probe

    watched = sys.stderr.isatty() and not args.json
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no result
        return probe(
            source,
            batches,
            mask=mask,
            batch_size=args.batch_size,
            checkpoint=args.checkpoint,
            checkpoint_every=args.checkpoint_every,
            keep=args.keep,
            keep_bytes=args.keep_bytes,
            progress=None if watched else False,
            **options,
        )


@contextlib.contextmanager
def _resumable(checkpoint: str | None) -> Iterator[None]:
    """Inside, an interrupt says whether the same command would go on from a checkpoint."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if checkpoint is None:
            told = "nothing was kept (with --checkpoint FILE the same command goes on)"
        elif any(
            Path(checkpoint).parent.glob(f"{glob.escape(Path(checkpoint).name)}*")
        ):  # each rank has its own
            told = f"the same command goes on from {checkpoint}"
        else:
            told = f"{checkpoint} was not written yet (--checkpoint-every says how often)"
        stop.args = (told,)
        raise


def _write(out: Path, result: ProbeResult, config: dict[str, Any], *, moments: bool) -> None:
    from rgfast.files import as_json, write_folder_atomically, write_text

    def fill(folder: Path) -> None:
        result.save(folder / "result.nc", moments=moments)
        table = result.to_dataframe().to_csv(index=False, lineterminator="\n")
        write_text(folder / "summary.csv", table)
        for name, draw in _figures(result).items():
            _draw(folder / f"{name}.png", draw)
        result.report(folder / "report.html")
        write_text(folder / "config.json", as_json(config))

    write_folder_atomically(out, fill)


def _figures(result: ProbeResult) -> dict[str, Callable[[Axes], object]]:
    """The figures that the result has data for."""
    figures: dict[str, Callable[[Axes], object]] = {"order_parameter": lambda ax: result.plot_rank(ax=ax)}
    if len(result.layers) > 1:
        figures["drift"] = lambda ax: result.plot_drift(ax=ax)
        figures["cka"] = lambda ax: result.plot_cka(ax=ax)
    if result.views != ("flattened",):
        figures["spectra"] = lambda ax: result.plot_spectra(ax=ax)
    return figures


def _draw(path: Path, draw: Callable[[Axes], object]) -> None:
    from rgfast.report.canvas import canvas, figure_of, save_figure

    axes = canvas(None, 1, columns=1, size=(7, 4.1))
    figure = figure_of(axes)
    figure.set_layout_engine("constrained")
    draw(axes[0])
    save_figure(figure, path)


def _tell(args: argparse.Namespace, result: ProbeResult, out: Path, what: str) -> None:
    if args.json:
        print_json({"format": "rgfast.probe-summary/1", "out": str(out), **summary(result)})
    else:
        print(result)
        print(f"\n{out}: {what}")


def summary(result: ProbeResult) -> dict[str, Any]:
    """A result in short: its layers, and for every view n, effective rank and drift by layer."""
    views = {}
    for view in result.views:
        ranks = result.order_parameter(view).values
        views[view] = {
            "n": list(result.rows(view)),
            "sample_limited": result.sample_limited(view),
            "effective_rank": ranks,
            "last_over_first": ranks[-1] / ranks[0] if ranks[0] else None,
            "kernel_drift": result.order_parameter(view, "kernel_drift").values,
        }
    return {
        "sequences": int(result.dataset.attrs["sequences"]),
        "layers": list(result.layers),
        "views": views,
        "notes": list(result.notes),
    }
