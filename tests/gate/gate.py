"""Compiles kernels for GPUs that are not here, and compares what they take with what they should take.

    python tests/gate/gate.py                 # sources that changed since their table was written
    python tests/gate/gate.py --all           # all, or make gate
    python tests/gate/gate.py --write         # write the tables of those that changed
    python tests/gate/gate.py --only moments  # names that have a part

Tables are tests/gate/tables/<source>.txt: registers, stack, spills and shared memory of every kernel. By the
compiler that a table names every number must be the same. By any other, kernels must compile, fit, and spill
only if tests/gate/spills.txt has the reason.
"""

from __future__ import annotations

import argparse
import sys
import time

from gate_table import ARCHITECTURES, Kernels, Table, differences, faults, listed_spills
from gate_units import Unit, units


def check(unit: Unit, arch: int, kernels: Kernels, table: Table | None) -> list[str]:
    """What is wrong with ``kernels``, which the compiler that is here made."""
    found = faults(arch, kernels, listed_spills())
    if table is None:
        return [*found, f"{unit.name} has no table"]
    assert unit.compiler is not None
    return found + differences(arch, kernels, table, unit.compiler)


def _gate(unit: Unit, *, everything: bool, write: bool) -> bool:
    """Whether all is well with a unit; says what is not."""
    table = Table.read(unit.table)
    if unit.compiler is None:
        print(f"{unit.name}: not compiled, since there is no compiler for it", flush=True)
        return False
    current = table is not None and unit.matches(table) and table.compiler == unit.compiler
    if current and not everything:
        print(f"{unit.name}: unchanged", flush=True)
        return True
    by_arch, wrong = {}, []
    for arch in ARCHITECTURES:
        began = time.perf_counter()
        if not unit.knows(arch):
            wrong.append(f"{unit.compiler} does not know sm_{arch}")
            continue
        try:
            kernels = unit.compile(arch) if everything else unit.compiled(arch)
        except RuntimeError as error:
            wrong.append(str(error))
            continue
        by_arch[arch] = kernels
        wrong += faults(arch, kernels, listed_spills()) if write else check(unit, arch, kernels, table)
        seconds = time.perf_counter() - began
        print(f"{unit.name} sm_{arch}: {len(kernels)} kernels, {seconds:.1f} s", flush=True)
    if write and not wrong:
        Table(unit.compiler, unit.digest, by_arch).write(unit.table)
        print(f"{unit.name}: {unit.table.name} is written", flush=True)
    elif not write and not wrong and table is not None and not unit.matches(table):
        wrong.append(
            f"{unit.name}: the sources have changed, and the numbers have not: --write says so in the table"
        )
    for each in wrong:
        print(each, flush=True)
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="what has not changed, too")
    parser.add_argument("--write", action="store_true", help="write tables instead of comparing with them")
    parser.add_argument("--only", default="", metavar="PART", help="of a name")
    chosen = parser.parse_args()
    picked = [unit for unit in units() if chosen.only in unit.name]
    if not picked:
        print(f"no source has '{chosen.only}' in its name")
    well = [_gate(unit, everything=chosen.all, write=chosen.write) for unit in picked]
    return 0 if picked and all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
