"""The gate: kernels compiled for architectures that are not here, and the faults that it must see."""

import re

import gate
import gate_units
import pytest
from gate_table import ARCHITECTURES, HERE, ROOT, Table, Taken, differences, faults, listed_spills, read
from gate_units import FLAGS, DeviceSource, TritonRoom, Unit, imported, included, units

PLAIN = Taken(threads=128, registers=40, stack=0, stores=0, loads=0, shared=0)
PLANTED = DeviceSource(ROOT / "csrc" / "cuda" / "tests" / "faults.cu")
PLANTED_TRITON = TritonRoom(HERE / "triton_faults.py")


def needs(unit: Unit, arch: int) -> None:
    if unit.compiler is None:
        pytest.skip(f"{unit.name} is not compiled for sm_{arch}: there is no compiler for it")
    if not unit.knows(arch):
        pytest.skip(f"{unit.name} is not compiled for sm_{arch}, which {unit.compiler} does not know")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.name)
def test_kernels_take_what_their_table_says(unit, arch):
    """Compiles only if sources have changed since the table was written, or the compiler is another one."""
    table = Table.read(unit.table)
    assert table is not None, f"python tests/gate/gate.py --write --only {unit.name} writes the table"
    if unit.matches(table) and unit.compiler in (table.compiler, None):
        assert faults(arch, table.kernels[arch], listed_spills()) == []
    else:
        needs(unit, arch)
        assert gate.check(unit, arch, unit.compiled(arch), table) == []


def test_every_kernel_is_in_a_table_of_every_architecture_that_has_it(emulated_gpu):
    """What the host compiles is what sm_90 has; older GPUs have no clusters."""
    tables = [Table.read(unit.table) for unit in units() if isinstance(unit, DeviceSource)]
    names = {arch: {name for table in tables for name in table.kernels[arch]} for arch in ARCHITECTURES}
    assert names[90] == {name for name in emulated_gpu.kernels() if not name.startswith("rgfast_fault_")}
    assert names[100] == names[90] > set()
    assert names[80] <= names[90]


def test_tables_are_of_the_sources_there_are_and_of_one_compiler_of_each_kind():
    written = sorted((HERE / "tables").glob("*.txt"))
    assert written == sorted(unit.table for unit in units())
    compilers = {table.compiler for path in written if (table := Table.read(path)) is not None}
    assert len({compiler.split()[0] for compiler in compilers}) == len(compilers)


def test_a_listed_spill_has_a_reason_and_still_happens():
    tables = [table for unit in units() if (table := Table.read(unit.table)) is not None]
    for (arch, kernel), why in listed_spills().items():
        assert len(why) > 10
        assert any(t.kernels[arch][kernel].stores for t in tables if kernel in t.kernels[arch]), kernel


def test_the_package_is_compiled_with_the_same_flags():
    text = (gate_units.CUDA / "fatbin.cmake").read_text()
    found = re.search(r"set\(flags -fatbin (.*?) --no-compress", text)
    assert found is not None
    assert tuple(found[1].split()) == FLAGS


def test_a_planted_spill_is_caught():
    needs(PLANTED, 90)
    kernels = PLANTED.compiled(90)
    (fault,) = faults(90, kernels, {})
    assert re.fullmatch(
        r"sm_90 rgfast_fault_spill: \d+ bytes of spills, which .*spills\.txt does not list", fault
    )
    assert kernels["rgfast_fault_spill"].threads == 1024
    assert faults(90, kernels, {(90, "rgfast_fault_spill"): "it is planted"}) == []


def test_a_planted_spill_of_triton_is_caught():
    needs(PLANTED_TRITON, 90)
    kernels = PLANTED_TRITON.compile(90)
    assert kernels["fits"].threads == 32
    (fault,) = faults(90, kernels, {})
    assert re.fullmatch(r"sm_90 spills: \d+ bytes of spills, which .*spills\.txt does not list", fault)


def test_what_does_not_compile_says_what_the_compiler_said(tmp_path):
    needs(PLANTED, 90)
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void rgfast_broken() { nothing(); }')
    with pytest.raises(
        RuntimeError, match=r'nvcc does not compile broken.cu for sm_90:(.|\n)*"nothing" is undefined'
    ):
        DeviceSource(tmp_path / "broken.cu").compile(90)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"threads": 1024, "registers": 65},
            "1024 threads of 65 registers are more than the 65536 registers",
        ),
        ({"threads": 257, "registers": 254}, "257 threads of 254 registers are more than"),
        ({"shared": 163 * 1024 + 1}, "166913 bytes of shared memory, 166912 is the most"),
        ({"stores": 4}, "4 bytes of spills"),
        ({"loads": 8}, "8 bytes of spills"),
    ],
)
def test_what_does_not_fit_is_a_fault(change, sentence):
    (found,) = faults(80, {"fits": PLAIN, "k": PLAIN._replace(**change)}, {})
    assert found.startswith(f"sm_80 k: {sentence}")


def test_what_just_fits_is_none():
    threads = [PLAIN._replace(threads=1024, registers=64), PLAIN._replace(threads=256, registers=255)]
    assert faults(80, dict(enumerate([*threads, PLAIN._replace(shared=163 * 1024)])), {}) == []
    assert faults(90, {"k": PLAIN._replace(shared=227 * 1024)}, {}) == []


def table_of(**kernels: Taken) -> Table:
    return Table("nvcc 13.0.88", "0" * 32, {80: {}, 90: kernels, 100: {}})


def test_differences_from_a_table_are_named():
    table = table_of(same=PLAIN, gone=PLAIN, other=PLAIN)
    now = {"same": PLAIN, "other": PLAIN._replace(registers=41, stack=8), "new": PLAIN}
    listed = ["sm_90 gone: the table has it, the sources do not", "sm_90 new: it is not in the table"]
    numbers = ["sm_90 other: registers 41, in the table 40", "sm_90 other: stack 8, in the table 0"]
    assert differences(90, now, table, "nvcc 13.0.88") == listed + numbers
    assert differences(90, now, table, "nvcc 12.8.93") == listed


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = table_of(**{"k": PLAIN, "a name of words": PLAIN._replace(shared=123456)})
    table.write(tmp_path / "of" / "k.txt")
    assert Table.read(tmp_path / "of" / "k.txt") == table
    assert Table.read(tmp_path / "no.txt") is None


def test_the_digest_is_of_what_nvcc_reads():
    names = {path.relative_to(PLANTED.path.parents[1]).as_posix() for path in included(PLANTED.path)}
    assert names == {"tests/faults.cu", "common/async_copy.cuh", "common/device.cuh"}


def test_the_digest_of_a_list_is_of_the_modules_that_it_imports():
    (listed,) = [unit for unit in units() if unit.name == "residual_mlp.triton"]
    names = {path.name for path in imported(listed.path)}
    assert {"triton_gate.py", "forward.py", "backward.py", "elements.py", "table.py"} <= names
    assert "wide.py" not in names


def test_spills_of_functions_that_a_kernel_calls_are_its_own():
    log = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Function properties for _Z1fPdi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    no_sections = bytes(64)
    assert read(log, no_sections) == {
        "first": Taken(1024, 34, 48, 12, 8, 1024),
        "second": Taken(1024, 8, 0, 0, 0, 0),
    }


class Pretended(DeviceSource):
    """A source whose compiler is not there, or another one."""

    @property
    def compiler(self):
        return None

    @property
    def table(self):
        return self.path.with_suffix(".txt")


def test_the_command_fails_if_there_is_no_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gate, "units", lambda: [Pretended(tmp_path / "k.cu")])
    monkeypatch.setattr("sys.argv", ["gate.py", "--all"])
    assert gate.main() == 1
    assert capsys.readouterr().out == "k: not compiled, since there is no compiler for it\n"


def test_the_command_fails_if_it_has_nothing_to_do(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gate.py", "--only", "nothing of this name"])
    assert gate.main() == 1
    assert "no source has" in capsys.readouterr().out


def test_the_command_writes_a_table_and_compares_with_it(monkeypatch, capsys, tmp_path):
    class Written(Pretended):
        registers = 40

        @property
        def compiler(self):
            return "nvcc 99.0.1"

        @property
        def digest(self):
            return f"{self.registers:032d}"

        def knows(self, arch):
            return True

        def compile(self, arch):
            return {"k": PLAIN._replace(registers=self.registers, stores=8 * (self.registers > 255))}

        def compiled(self, arch):
            return self.compile(arch)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["gate.py", *words])
        return gate.main(), capsys.readouterr().out

    monkeypatch.setattr(gate, "units", lambda: [Written(tmp_path / "k.cu")])
    code, said = run()
    assert (code, said.count("k has no table")) == (1, 3)
    assert run("--write")[0] == 0
    assert run() == (0, "k: unchanged\n")
    assert run("--all")[0] == 0
    Written.registers = 41
    code, said = run()
    assert code == 1
    assert "sm_90 k: registers 41, in the table 40" in said
    Written.registers = 256
    code, said = run("--write")
    assert code == 1
    assert "does not list" in said
    assert Table.read(tmp_path / "k.txt").kernels[90]["k"].registers == 40
