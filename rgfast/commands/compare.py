"""``rgfast compare``: two models over the same texts or arrays, or activations, from disk, a folder with what
was found."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgfast.commands.parser import add_json, print_json
from rgfast.commands.probe import configuration_in, placed
from rgfast.commands.probe_options import numbered

if TYPE_CHECKING:
    from torch import nn

    from rgfast.commands.inputs import Inputs
    from rgfast.commands.models import Loaded
    from rgfast.comparing import Comparison
    from rgfast.probing.sources.activations import Activations

__all__ = ["add_compare"]

FORMAT = "rgfast.compare-run/1"


def add_compare(commands: Any) -> None:
    """Add the subcommand to ``commands`` (what ``add_subparsers`` returned)."""
    compare = commands.add_parser(
        "compare",
        help="compare the layers of two models on disk",
        description="Run two models over the same texts or arrays once, and measure how alike every\n"
        "layer of A is to every layer of B: debiased CKA, and other measures.\n\n"
        "A and B are folders as rgfast probe takes them: two models of any width and\n"
        "depth, or two checkpoints of one. Texts are cut by each model's own tokenizer;\n"
        "where the tokens differ, means over positions are compared.\n\n"
        "Without --text and --inputs, A and B are folders of activations of the same\n"
        "sequences, as rgfast probe takes them.\n\n"
        "Leaves in DIR: result.nc, summary.csv, a figure of each measure, report.html\n"
        "and config.json; DIR is complete or not there.",
        epilog="examples:\n"
        "  rgfast compare models/bert models/mpnet --text corpus.txt --out runs/both\n"
        "  rgfast compare run/step-1000 run/step-9000 --text corpus.txt --groups 8\n"
        "  rgfast compare models/gpt2 models/gpt2-int8 --inputs tokens.npy --null 200\n"
        "  rgfast compare models/a models/b --text corpus.txt --measures cka mutual_knn\n"
        '  rgfast compare saved/a saved/b --axes "N T D"',
    )
    add = compare.add_argument
    add("a", metavar="A", help="the folder of the first model, or of activations")
    add("b", metavar="B", help="the folder of the second one")
    source = compare.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text: a sequence a paragraph, or a line where there are no empty lines; "
        "padding does not count",
    )
    source.add_argument(
        "--inputs",
        metavar="FILE",
        help=".npy or .npz for both models: token ids [n, T], floats [n, T, D] or [n, D], or arrays named as "
        "the forwards name them",
    )
    add("--inputs-b", metavar="FILE", help="what B gets, the same sequences in order (default: --inputs)")
    add("--length", type=int, metavar="T", help="cut texts to T tokens (default: 128, or the models' limit)")
    add("--limit", type=int, metavar="N", help="take the first N sequences (default: all)")
    add("--axes", metavar="AXES", help='of the arrays of activations, such as "N T D" (default: found out)')
    add(
        "--files",
        choices=("auto", "layers", "batches", "requests"),
        default="auto",
        help="what a .safetensors file of activations is (default: found out)",
    )
    for side in "AB":
        add(
            f"--layers-{side.lower()}",
            nargs="+",
            default=["auto"],
            metavar="NAME",
            help=f"names, indices, globs or re:PATTERN of modules of {side} (default: auto, the residual "
            "stream)",
        )
    add(
        "--measures",
        nargs="+",
        default=["cka"],
        choices=("cka", "cka_biased", "mutual_knn", "procrustes", "rsa"),
        metavar="MEASURE",
        help="cka (debiased), cka_biased, mutual_knn, procrustes, rsa (default: cka)",
    )
    add(
        "--views",
        nargs="+",
        choices=("position", "pooled", "mean_pooled", "flattened"),
        metavar="VIEW",
        help="position, pooled, mean_pooled, flattened (default: pooled and mean_pooled, as far as rows "
        "correspond)",
    )
    add("--groups", type=int, default=1, metavar="N", help="groups for standard errors (default: 1, none)")
    add("--null", type=int, default=0, metavar="N", help="permutations for p-values (default: 0, none)")
    add(
        "--sample-limit",
        type=int,
        default=1024,
        metavar="N",
        help="most rows for measures beside CKA and for --null (default: 1024)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the sample and permutations (default: 0)")
    add("--batch-size", type=int, default=256, metavar="N", help="sequences at once (default: 256)")
    add("--memory", default="4GiB", metavar="SIZE", help="what the sums may take (default: 4GiB)")
    add("--allow-pickle", action="store_true", help="take pickled weights, of folders that you trust")
    add("--device", default="cpu", metavar="NAME", help="where the models run, e.g. cuda (default: cpu)")
    add("--out", metavar="DIR", help="output folder (default: runs/compare-A-B)")
    add_json(compare, "a summary of the result")
    compare.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    # torch and all that stands on it is only loaded by the command that needs it.
    from rgfast.commands.inputs import try_one
    from rgfast.comparing import Comparison
    from rgfast.files import check_new_folder

    options = _options(args)
    names = "-".join(Path(model).resolve().name for model in (args.a, args.b))
    out = Path(args.out) if args.out else Path("runs") / f"compare-{names}"
    before = configuration_in(out, FORMAT)
    models: list[Loaded] = []
    inputs: list[Inputs] = []
    saved: list[Activations] = []
    if args.text is None and args.inputs is None:
        saved = _opened(args)
        config = _config(args, options, _facts_of_saved(args, saved))
    else:
        models = [_loaded(args, side) for side in "ab"]
        inputs = _inputs(args, models)
        models = [model.for_inputs(each.batch) for model, each in zip(models, inputs, strict=True)]
        config = _config(args, options, _facts_of_models(models, inputs))
    if before is not None:
        if any(before.get(name) != config[name] for name in ("a", "b", "options")):
            raise ValueError(
                f"out must be a new folder, and {out} holds another result (its config.json tells which)"
            )
        _tell(args, Comparison.load(out / "result.nc"), out, "was there already: nothing was computed")
        return
    modules = [placed(_module(model, each), args.device) for model, each in zip(models, inputs, strict=True)]
    for each, module in zip(inputs, modules, strict=True):
        try_one(each, module)
    check_new_folder(out)
    result = _run(args, saved or modules, inputs, options)
    _write(out, result, config)
    _tell(args, result, out, "result.nc summary.csv report.html config.json and figures (*.png)")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``rgfast.compare`` is asked, checked as far as it can be before anything is loaded."""
    from rgfast.comparing.spec import CompareSpec
    from rgfast.validation import check_positive_int

    for name in ("limit", "length"):
        if getattr(args, name) is not None:
            check_positive_int(getattr(args, name), name)
    for name in ("text", "inputs", "inputs_b"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name.replace('_', '-')} must be a file, and {path} is none")
    if args.length is not None and args.text is None:
        raise ValueError("length cuts texts, and there is no --text")
    if args.inputs_b is not None and args.inputs is None:
        raise ValueError("inputs-b stands beside --inputs, and there is no --inputs")
    if (args.axes is not None or args.files != "auto") and not (args.text is None and args.inputs is None):
        name = "files" if args.axes is None else "axes"
        raise ValueError(f"{name} is of saved activations, which take neither --text nor --inputs")
    kept = ("measures", "views", "groups", "null", "sample_limit", "seed", "memory")
    options = {name: getattr(args, name) for name in kept}
    layers = numbered(args.layers_a), numbered(args.layers_b)
    CompareSpec(layers=layers, batch_size=args.batch_size, **options)  # refuses what it can now
    return {"layers_a": layers[0], "layers_b": layers[1], **options}


def _opened(args: argparse.Namespace) -> list[Activations]:
    from rgfast.commands.activations import holds_model, open_activations

    for path in (args.a, args.b):
        if holds_model(Path(path)):
            raise ValueError(f"one of --text and --inputs must say what the model in {path} runs on")
    return [open_activations(args, path) for path in (args.a, args.b)]


def _loaded(args: argparse.Namespace, side: str) -> Loaded:
    from rgfast.commands.models import load_model

    try:
        return load_model(getattr(args, side), allow_pickle=args.allow_pickle)
    except ValueError as error:
        raise ValueError(str(error).replace("MODEL", side.upper(), 1)) from error


def _inputs(args: argparse.Namespace, models: list[Loaded]) -> list[Inputs]:
    """What each model is fed, of the same sequences."""
    from rgfast.commands.inputs import default_length, hide, read_arrays, read_text

    if args.text is not None:
        length = args.length or min(default_length(model) for model in models)
        found = [read_text(args.text, model, limit=args.limit, length=length) for model in models]
    else:
        paths = args.inputs, args.inputs_b or args.inputs
        found = [
            read_arrays(path, model, limit=args.limit) for path, model in zip(paths, models, strict=True)
        ]
    counts = [len(each.batch[each.main]) for each in found]
    if len(set(counts)) > 1:
        raise ValueError(
            f"inputs-b must hold the sequences of --inputs, {counts[0]} of them, got {counts[1]}"
        )
    checked = zip(found, models, strict=True)
    return [hide(each, model.for_inputs(each.batch), "none", 0) for each, model in checked]


def _module(model: Loaded, inputs: Inputs) -> nn.Module:
    """What is run: of our own models fed with floats the stack alone."""
    stream = model.kind == "rgfast" and inputs.main == model.floats
    module: nn.Module = model.module.stack if stream else model.module  # type: ignore[assignment]
    return module


def _facts_of_saved(args: argparse.Namespace, saved: list[Activations]) -> dict[str, Any]:
    from rgfast.commands.activations import facts_of

    return {
        side: {"kind": "activations", "layers": list(acts.layers), **facts_of(args, path, acts)}
        for side, path, acts in zip("ab", (args.a, args.b), saved, strict=True)
    }


def _facts_of_models(models: list[Loaded], inputs: list[Inputs]) -> dict[str, Any]:
    from rgfast.probing.checkpoint import batch_digest, model_digest

    return {
        side: {
            "folder": str(model.folder),
            "class": type(model.module).__name__,
            "digest": model_digest(model.module),
            "arrays": {name: list(value.shape) for name, value in each.batch.items()},
            "inputs": batch_digest(each.batch),
        }
        for side, model, each in zip("ab", models, inputs, strict=True)
    }


def _config(args: argparse.Namespace, options: dict[str, Any], sides: dict[str, Any]) -> dict[str, Any]:
    """What decides the numbers, as JSON gives it back, and what they were made with."""
    from rgfast.runtime.environment import facts

    files = {name: getattr(args, name) for name in ("text", "inputs", "inputs_b")}
    chosen = {**options, "batch_size": args.batch_size, "device": args.device}
    whole = {"format": FORMAT, **sides, "files": files, "options": chosen, "environment": facts()}
    plain: dict[str, Any] = json.loads(json.dumps(whole))
    return plain


def _run(
    args: argparse.Namespace, sides: list[Any], inputs: list[Inputs], options: dict[str, Any]
) -> Comparison:
    from rgfast.comparing import compare

    batches: list[Any] = [each.batch for each in inputs] or [None, None]
    watched = sys.stderr.isatty() and not args.json
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no result
        return compare(
            sides[0],
            sides[1],
            batches[0],
            batches_b=batches[1],
            batch_size=args.batch_size,
            progress=None if watched else False,
            **options,
        )


def _write(out: Path, result: Comparison, config: dict[str, Any]) -> None:
    from rgfast.files import as_json, write_folder_atomically, write_text
    from rgfast.report.figures import plot_comparison, save_figure

    def fill(folder: Path) -> None:
        result.save(folder / "result.nc")
        write_text(folder / "summary.csv", result.to_dataframe().to_csv(index=False, lineterminator="\n"))
        for measure in result.measures:
            save_figure(plot_comparison(result, measure=measure), folder / f"{measure}.png")
        result.report(folder / "report.html")
        write_text(folder / "config.json", as_json(config))

    write_folder_atomically(out, fill)


def _tell(args: argparse.Namespace, result: Comparison, out: Path, what: str) -> None:
    if args.json:
        print_json({"format": "rgfast.compare-summary/1", "out": str(out), **_summary(result)})
    else:
        print(result)
        print(f"\n{out}: {what}")


def _summary(result: Comparison) -> dict[str, Any]:
    """A result in short: its layers, and for every view and measure the matrix and the best matches."""
    views: dict[str, dict[str, Any]] = {}
    for view in result.views:
        views[view] = {}
        for measure in result.measures:
            best = result.best_match(measure, view)
            views[view][measure] = {
                "n": list(result.rows(view, measure)),
                "matrix": result.matrix(measure, view).values,
                "best_match": best.match.tolist(),
                "p": best.p.tolist(),
            }
    return {
        "sequences": int(result.dataset.attrs["sequences"]),
        "layers_a": list(result.layers_a),
        "layers_b": list(result.layers_b),
        "views": views,
        "notes": list(result.notes),
    }
