"""Record every call: ``python tests/oracle/record.py OUT.npz`` in two checkouts, then ``compare.py A B``.

``OUT.npz`` holds the bits, ``OUT.json`` the values that ``test_oracle.py`` keeps (``values.json`` is 0.1's).
``--only PATTERN`` records the calls that match; into an existing JSON file it puts these alone.
"""

import argparse
import fnmatch
import hashlib
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from calls import CALLS
from registry import outputs

# Arrays up to this size are kept whole beside their hash, so that a difference has a size.
KEPT = 65536


def bits_of(array):
    """SHA-256 of the raw bits, every NaN counting as the same."""
    if array.dtype.kind in "fc":
        array = np.where(np.isnan(array), np.asarray(np.nan, array.dtype), array)
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def write_bits(path, recorded):
    index, arrays = {}, {}
    for name, found in recorded.items():
        entry = index[name] = {}
        for key, value in found.items():
            if isinstance(value, str):
                entry[key] = {"text": value}
                continue
            entry[key] = {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": bits_of(value)}
            if value.size <= KEPT:
                entry[key]["at"] = f"a{len(arrays)}"
                arrays[f"a{len(arrays)}"] = value
    np.savez_compressed(path, index=np.frombuffer(json.dumps(index).encode(), np.uint8), **arrays)


def write_values(path, recorded):
    from values import summarized

    held = json.loads(path.read_text()) if path.exists() else {}
    held.update({name: summarized(found, CALLS[name].tol) for name, found in recorded.items()})
    held = {name: held[name] for name in CALLS if name in held}
    lines = [
        f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in held.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="*")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    if options.out.suffix not in (".npz", ".json"):
        parser.error(f"out must end in .npz or .json, got {str(options.out)!r}")
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("error")
    recorded, started = {}, time.perf_counter()
    for name, call in CALLS.items():
        if fnmatch.fnmatch(name, options.only):
            begun = time.perf_counter()
            try:
                recorded[name] = outputs(call.run())
            except Exception as error:
                recorded[name] = {"raised": f"{type(error).__name__}: {error}"}
            if options.times and time.perf_counter() - begun > 0.2:
                print(f"{time.perf_counter() - begun:6.2f} s  {name}")
    (write_bits if options.out.suffix == ".npz" else write_values)(options.out, recorded)
    raised = [f"{name}: {found['raised']}" for name, found in recorded.items() if "raised" in found]
    print("\n".join(raised))
    sizes = sum(len(found) for found in recorded.values())
    print(
        f"{len(recorded)} calls, {sizes} outputs, {len(raised)} raised, {time.perf_counter() - started:.1f} s"
    )


if __name__ == "__main__":
    main()
