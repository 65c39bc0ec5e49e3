"""The static report: what it reads from machine code, what its gate finds, and that our kernels pass it."""

import importlib.metadata
import importlib.util
import json
import pathlib

import pytest

from benchmarks import machine_code, reporting, static

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or machine_code.find_tool("cuobjdump") is None,
    reason="needs triton and its cuobjdump",
)
needs_nvcc = pytest.mark.skipif(static.shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Rows of the kernels in static_kernels.py on sm_90 by label, and the cache they left."""
    cache = tmp_path_factory.mktemp("cache")
    rows = static.measure_triton(["static_kernels"], capabilities=(90,), cache=cache)
    return {row["case"]: row for row in rows}, cache


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E.128", 128),
        ("LDG.E.64.CONSTANT", 64),
        ("STG.E", 32),
        ("LDG.E.U16", 16),
        ("STG.E.U8", 8),
        ("LDG.E.ENL2.256", 256),
    ],
)
def test_width_of_an_instruction(opcode, bits):
    assert machine_code.access_bits(opcode) == bits


def test_instructions_are_counted_under_predicates_too():
    code = """
        /*0170*/              @!P0 LDG.E.128 R8, desc[UR4][R4.64] ;   /* 0x0000000404088981 */
                                                                       /* 0x000ea2000c1e1d00 */
        /*0180*/                   LDGSTS.E.BYPASS.64 [R1], [R2] ;
        /*0190*/              @UP1 STG.E [R2], R3 ;
        /*01a0*/                   LDL.LU R3, [R1+0x4] ;
        /*01b0*/                   STL.64 [R1], R2 ;
        /*01c0*/                   LDS.128 R3, [R1] ;
    """
    found = machine_code.count_accesses(code)
    assert found["loads"] == {"64": 1, "128": 1} and found["stores"] == {"32": 1}
    assert (found["local_loads"], found["local_stores"]) == (1, 1)
    assert (found["load_bits"], found["store_bits"]) == (128, 32)


def test_addresses_are_followed_to_their_arguments():
    ptx = """
        ld.param.b64 	%rd1, [f_param_0];
        ld.param.b64 	%rd2, [f_param_1];
        ld.param.b32 	%r9, [f_param_2];
        mul.wide.s32 	%rd3, %r9, 4;
    $L__BB0_1:
        add.s64 	%rd4, %rd5, %rd3;
        @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd4 + 0 ];
        add.s64 	%rd6, %rd2, %rd3;
        @%p1 st.global.b16 [ %rd6 + 8 ], { %rs1 };
        cp.async.cg.shared.global [ %r3 ], [ %rd6 ], 0x10;
        mov.b64 	%rd5, %rd1;
    """
    found = machine_code.pointer_accesses(ptx, ["x", "z", "n"])
    assert found == {"x": {"load": [64]}, "z": {"load": [128], "store": [16]}}


def test_occupancy_is_limited_by_registers_warps_and_shared_memory():
    warps = machine_code.resident_warps
    assert warps(90, registers=32, shared=0, warps=4) == 64
    assert warps(90, registers=228, shared=0, warps=4) == 8
    assert warps(90, registers=32, shared=100 << 10, warps=4) == 8
    assert warps(75, registers=32, shared=0, warps=4) is None


@needs_triton
def test_vector_copy_passes(known):
    row = known[0]["copy"]
    assert (row["load_bits"], row["store_bits"]) == (128, 128)
    assert row["arguments"] == {"x_ptr": {"load": [128]}, "y_ptr": {"store": [128]}}
    assert 0 < row["registers"] < 64 and not row["stack"] and not row["local_loads"] and not row["local_stores"]
    assert static.failures([row]) == []


@needs_triton
@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("copy unaligned", "a load of x_ptr moves 32 bits, 64 are demanded; a store of y_ptr moves 32 bits"),
        ("copy unaligned, widest", "the widest global load moves 32 bits"),
        ("scale", "a load of x_ptr moves 32 bits"),
        ("hungry", "of spilled registers"),
        ("misnamed", "does not compile: ValueError: arguments unknown to the kernel: ['z_ptr']"),
    ],
)
def test_gate_finds(known, case, complaint):
    (line,) = static.failures([known[0][case]])
    assert line.startswith(f"{case} on sm_90: ") and complaint in line


@needs_triton
def test_a_wide_load_of_a_vector_hides_narrow_ones_from_the_weaker_demand(known):
    assert static.failures([known[0]["scale, widest"]]) == []


@needs_triton
def test_spills_stand_in_the_tables(known):
    (row,) = static.all_rows([known[0]["hungry"]])
    assert row["spills"] > 0 and row["stack"] > 0 and row["registers"] == 64
    worst = {row["kernel"]: row for row in static.summary([*known[0].values()])}
    assert worst["copy_kernel"]["cases"] == 4 and worst["copy_kernel"]["demanded_bits"] == 32
    assert "hungry_kernel" in reporting.table([*worst.values()])


@needs_triton
def test_rows_come_from_the_cache_and_only_good_ones(known):
    rows, cache = known
    place = cache / f"{rows['copy']['key']}-90.json"
    kept = json.loads(place.read_text())
    place.write_text(json.dumps({**kept, "registers": 1}))
    again = static.measure_triton(["static_kernels"], capabilities=(90,), match="copy", per_kernel=1, cache=cache)
    place.write_text(json.dumps(kept))
    assert [(row["case"], row["registers"]) for row in again] == [("copy", 1)]
    assert not (cache / f"{rows['misnamed']['key']}-90.json").exists()
    assert len({row["key"] for row in rows.values()}) == len(rows)


@needs_triton
def test_a_crash_of_the_compiler_is_told(tmp_path, monkeypatch):
    (tmp_path / "crashing_kernels.py").write_text("import os\ndef static_cases():\n    os._exit(3)\n")
    (tmp_path / "incomplete_kernels.py").write_text("def static_cases():\n    yield 'label'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="died with status 3"):
        static.measure_triton(["crashing_kernels"])
    with pytest.raises(RuntimeError, match="case 0 of incomplete_kernels.static_cases.. has no label, kernel"):
        static.measure_triton(["incomplete_kernels"])


@needs_triton
@pytest.mark.parametrize(
    ("match", "status", "words"),
    [
        ("copy", 1, "2 break the gate"),
        ("scale, widest", 0, "1 compilations, 0 break the gate"),
        ("nonsense", 2, "no case's label holds 'nonsense'"),
    ],
    ids=["failing", "passing", "no such case"],
)
def test_exit_status_and_json(known, tmp_path, monkeypatch, capsys, match, status, words):
    monkeypatch.setattr(static, "cache_folder", lambda: known[1])
    arguments = ["--module", "static_kernels", "--sm", "90", "--match", match, "--output", str(tmp_path)]
    assert static.main(arguments) == status
    printed = capsys.readouterr()
    assert words in printed.out + printed.err
    if status < 2:
        stored = json.loads((tmp_path / "static.json").read_text())
        assert stored["triton"] == importlib.metadata.version("triton") and stored["circumstances"]["date"]
        assert stored["capabilities"] == [90] and {row["sm"] for row in stored["rows"]} == {90}
        assert static.failures(stored["rows"]) == [line[2:] for line in printed.out.splitlines() if line[:2] == "- "]


@needs_triton
def test_all_three_architectures_compile_the_copy(known):
    rows = static.measure_triton(["static_kernels"], match="copy", per_kernel=1, cache=known[1])
    assert [row["sm"] for row in rows] == [80, 90, 100] and static.failures(rows) == []


@needs_nvcc
@needs_triton
def test_cuda_files_are_read(tmp_path):
    (tmp_path / "broken.cu").write_text("nonsense")
    (tmp_path / "twice.cu").write_text(
        "namespace fast { template <class T> __global__ void twice_kernel(T* x) { x[threadIdx.x] *= T(2); }\n"
        "template __global__ void twice_kernel<float4x>(float4x*); }".replace("float4x", "float")
    )
    broken, row = static.measure_native(capabilities=(90,), folder=tmp_path)
    assert "nvcc failed" in broken["error"] and static.failures([broken])
    assert row["kernel"].startswith("twice_kernel") and row["load_bits"] == 32 and static.failures([row]) == []


@pytest.fixture(scope="module")
def our_modules():
    if importlib.util.find_spec("fastcifar.kernels.triton") is None:
        pytest.skip("this tree has no Triton kernels")
    return static.kernel_modules()


@needs_triton
@pytest.mark.slow
def test_one_case_of_each_of_our_kernels_passes(our_modules):
    rows = static.measure_triton(our_modules, capabilities=(90,), per_kernel=1, cache=static.cache_folder())
    assert rows and static.failures(rows) == []


@needs_triton
def test_the_stored_report_is_of_these_kernels_and_passes(our_modules):
    place = reporting.RESULTS / "static.json"
    assert place.exists(), "no stored report: run `python -m benchmarks.static` and keep its JSON"
    stored = json.loads(place.read_text())
    assert static.failures(stored["rows"]) == []
    assert set(stored["capabilities"]) >= set(static.CAPABILITIES)
    if stored["triton"] != importlib.metadata.version("triton"):
        pytest.skip(f"the stored report is of Triton {stored['triton']}, which is not installed")
    current, compiled = static.current_keys(our_modules), {row.get("key") for row in stored["rows"]}
    stale = [label for key, label in current.items() if key not in compiled]
    assert not stale, "the kernels have changed: run `python -m benchmarks.static` and keep its JSON"


def test_the_report_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(static, "kernel_modules", lambda: (_ for _ in ()).throw(ImportError("no kernels here")))
    assert static.main([]) == 2
    assert "no kernels here" in capsys.readouterr().err
    assert isinstance(static.cache_folder(), pathlib.Path)
