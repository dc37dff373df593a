"""Print every call whose bits differ between two recordings: ``python tests/oracle/compare.py A.npz B.npz``.

Exits 1 where one does. Outputs and calls that only B has are no difference: later versions may say more.
Calls named ``varies/...`` had other bits with another number of threads in 0.1 already, and do not count.
"""

import json
import sys

import numpy as np


def read(path):
    with np.load(path, allow_pickle=False) as file:
        index = json.loads(file["index"].tobytes())
        arrays = {name: file[name] for name in file.files if name != "index"}
    return index, arrays


def difference(a, b, first, second):
    """In words how an output differs; nothing where it does not."""
    if "text" in a or "text" in b:
        return "" if a.get("text") == b.get("text") else f"{a.get('text')!r} became {b.get('text')!r}"
    for what in ("dtype", "shape"):
        if a[what] != b[what]:
            return f"{what} {a[what]} became {b[what]}"
    if a["sha256"] == b["sha256"]:
        return ""
    if "at" not in a or "at" not in b:
        return "other bits (too large to be kept)"
    x, y = first[a["at"]], second[b["at"]]
    if x.dtype.kind not in "fc":
        return f"{int((x != y).sum())} of {x.size} differ"
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        return f"NaN at {int(np.isnan(x).sum())} places became {int(np.isnan(y).sum())}"
    end = np.finfo(x.dtype).max
    x, y = np.nan_to_num(x, posinf=end, neginf=-end), np.nan_to_num(y, posinf=end, neginf=-end)
    differ = (x != y).sum()
    scale = np.maximum(np.abs(x), np.abs(y))
    own = np.abs(x / np.where(scale > 0, scale, 1) - y / np.where(scale > 0, scale, 1)).max(initial=0.0)
    largest = scale.max(initial=0.0) or 1.0
    whole = np.abs(x / largest - y / largest).max(initial=0.0)
    return f"{differ} of {x.size} differ, by {own:.1e} of themselves, {whole:.1e} of the largest"


def differences(a, b):
    """Call -> output -> how the recording ``b`` differs from ``a``."""
    (index, arrays), (other, others) = a, b
    found = {}
    for name, entries in index.items():
        if name not in other:
            found[name] = {"": "missing"}
            continue
        for key, entry in entries.items():
            said = difference(entry, other[name][key], arrays, others) if key in other[name] else "missing"
            if said:
                found.setdefault(name, {})[key] = said
    return found


def main(first, second):
    a, b = read(first), read(second)
    found = differences(a, b)
    counted = [name for name in found if not name.startswith("varies/")]
    for name, outputs in found.items():
        print(name)
        for key, said in list(outputs.items())[:8]:
            print(f"    {key or '-'}: {said}")
        if len(outputs) > 8:
            print(f"    and {len(outputs) - 8} more outputs")
    new = len(set(b[0]) - set(a[0]))
    print(f"{len(counted)} of {len(a[0])} calls differ" + (f"; {new} only in {second}" if new else ""))
    return 1 if counted else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: compare.py A.npz B.npz")
    sys.exit(main(*sys.argv[1:]))
