"""The native ONNX Runtime operator against the float64 reference, its refusals, and its build."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from support.ort_op_cases import (
    LIMITS,
    NAMES,
    REAL,
    built_library,
    draw,
    error,
    instruction_sets,
    one_node,
    solve,
    use_instruction_set,
)
from support.ort_op_fuzz import run_many

from sessa_cli.main import main
from sessa_common.errors import SessaError
from sessa_export import native
from sessa_export.operator_body import add_function

FLOAT, HALF, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
FUZZ_CASES = 300


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest, library: Path):
    """The set of that name; the newest again afterwards."""
    available = instruction_sets(library)
    if request.param not in available:
        pytest.skip(f"this processor has {', '.join(available)}")
    use_instruction_set(library, request.param)
    yield request.param
    use_instruction_set(library, available[-1])


X86 = platform.machine() in ("x86_64", "AMD64")
every_set = pytest.mark.parametrize(
    "instruction_set", ["sse2", "avx2", "avx512"] if X86 else ["neon"], indirect=True
)


@every_set
@pytest.mark.parametrize("P", [0, 1, 5])
@pytest.mark.parametrize("T", [1, 2, 8, 9, 15, 16, 17, 63, 130, 257])
def test_lengths(library, instruction_set, T, P):
    for mask in (None, "holes"):
        arrays = draw([T, P], T=T, P=P, mask=mask)
        assert error(solve(library, arrays), arrays) < LIMITS[FLOAT], mask


@every_set
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("D, K", [(1, 1), (3, 67), (16, 32), (33, 1), (129, 65)])
def test_widths(library, instruction_set, D, K, T):
    arrays = draw([D, K, T], T=T, D=D, K=K, P=9, mask="left")
    assert error(solve(library, arrays), arrays) < LIMITS[FLOAT]


@every_set
@pytest.mark.parametrize("T", [1, 3, 8])
def test_a_long_past_is_read_in_parts(library, instruction_set, T):
    arrays = draw(T, T=T, D=300, K=201, P=700, mask="holes")
    for hidden in (slice(0), slice(0, 300), slice(200, 650)):
        arrays["key_mask"][1, hidden] = False
        assert error(solve(library, arrays), arrays) < LIMITS[FLOAT], hidden


@pytest.mark.parametrize("gain", [0.0, -0.5, 0.999, -0.999])
@pytest.mark.parametrize("logits", [0.5, 80.0])
@pytest.mark.parametrize("T", [1, 130])
def test_gains_and_large_scores(library, T, logits, gain):
    arrays = draw(7, T=T, P=40, gain=gain, logits=logits)
    # Scores of 80 carry rounding of 80 * 6e-8, and a gain of 0.999 repeats it along the rows.
    limit = LIMITS[FLOAT] if logits < 1 else 1e-5
    assert error(solve(library, arrays), arrays) < limit
    if gain == 0:
        assert (solve(library, arrays) == arrays["f"]).all()


@pytest.mark.parametrize("mask", ["open", "left", "holes", "closed"])
@pytest.mark.parametrize("T, P", [(1, 0), (1, 70), (70, 0), (70, 1), (33, 5)])
def test_masks(library, T, P, mask):
    arrays = draw([T, P], T=T, P=P, mask=mask)
    s = solve(library, arrays)
    assert error(s, arrays) < LIMITS[FLOAT]
    if mask == "closed":
        assert (s == arrays["f"]).all()


@pytest.mark.parametrize("T", [1, 30])
def test_what_a_masked_key_holds_has_no_influence(library, T):
    arrays = draw(3, T=T, P=20, mask="left")
    changed = {name: value.copy() for name, value in arrays.items()}
    hidden = ~arrays["key_mask"][:, :20]
    changed["k"][:, :20][hidden], changed["past_s"][hidden] = 1e4, -1e6
    assert (solve(library, arrays) == solve(library, changed)).all()


def test_a_closed_mask_and_no_past_are_the_same(library):
    arrays = draw(5, T=50, P=1, mask="open")
    arrays["key_mask"][:, 0] = False
    bare = {name: arrays[name] for name in ("f", "q", "gamma")} | {"k": arrays["k"][:, 1:]}
    assert np.abs(solve(library, arrays) - solve(library, bare)).max() < 1e-5


@pytest.mark.parametrize("f", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("others", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("T", [1, 65])
def test_types_may_differ(library, T, f, others):
    types = dict.fromkeys(REAL, others) | {"f": f}
    arrays = draw([T, f, others], T=T, P=6, mask="holes")
    assert error(solve(library, arrays, types), arrays, types) < LIMITS[f]


def test_tiny_and_huge_half_precision_states_survive(library):
    arrays = draw(1, T=1, P=3, D=64)
    arrays["f"][:], arrays["gamma"][:] = 0, 1
    arrays["past_s"][:] = np.float32([6e-8, 3e-5, 65504, -65504] * 16)
    s = solve(library, arrays, dict.fromkeys(("f", "past_s"), HALF))
    expected = arrays["past_s"][:, :1].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(s, expected, rtol=1e-3, atol=6e-8)


def test_memory_does_not_grow_with_the_square_of_the_length(library):
    """T = 32768: one T x T matrix of float32 would be 4 GiB."""
    script = (
        "import resource, sys; from pathlib import Path; from support.ort_op_cases import *\n"
        "a = draw(0, B=1, T=64, D=8, K=8); T = 32768\n"
        "a = {n: np.resize(v, (1, T, *v.shape[2:])) for n, v in a.items()}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert np.isfinite(solve(Path(sys.argv[1]), a)).all()\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) / (2**20 if sys.platform == 'darwin' else 2**10))"
    )
    command = [sys.executable, "-c", script, str(library)]
    grown = subprocess.check_output(command, cwd=Path(__file__).parents[1], text=True)
    assert float(grown) < 150, f"{grown} MiB"


def test_four_threads_on_one_session_agree(library):
    arrays = draw(2, B=3, T=150, P=5, mask="left")
    expected = solve(library, arrays)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: solve(library, arrays), range(40)))
    assert all((s == expected).all() for s in found)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_result(library, threads):
    arrays = draw(4, T=200, P=100)
    assert (solve(library, arrays, threads=threads) == solve(library, arrays)).all()


def test_it_takes_the_place_of_the_function_in_a_model(library):
    model = add_function(onnx.load_from_string(one_node(NAMES)))
    model.functions[0].node[0].Clear()  # a body that could not run
    model.functions[0].node[0].CopyFrom(onnx.helper.make_node("Identity", ["f"], ["zero"]))
    options = onnxruntime.SessionOptions()
    native.register(options, library)
    run = onnxruntime.InferenceSession(model.SerializeToString(), options)
    arrays = draw(1, P=3, mask="holes")
    assert error(run.run(None, arrays)[0], arrays) < LIMITS[FLOAT]


REFUSED = {
    "f": lambda a: {"f": a["f"][0]},
    "q": lambda a: {"q": a["q"][:, 1:]},
    "k": lambda a: {"k": a["k"][:, :, 1:]},
    "k short": lambda a: {"k": a["k"][:, :20]},
    "gamma": lambda a: {"gamma": a["gamma"][..., None]},
    "past_s": lambda a: {"past_s": a["past_s"][:, 1:]},
    "past_s width": lambda a: {"past_s": a["past_s"][:, :, 1:]},
    "key_mask": lambda a: {"key_mask": a["key_mask"][:, 5:]},
    "q empty": lambda a: {"q": a["q"][:, :, :0], "k": a["k"][:, :, :0]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_shapes_that_do_not_fit_are_refused_by_name(library, case):
    arrays = draw(1, P=5, mask="open")
    with pytest.raises(Exception, match=f"input {case.split()[0]} has shape .*expected"):
        solve(library, arrays | REFUSED[case](arrays))
    assert error(solve(library, arrays), arrays) < LIMITS[FLOAT]


def test_a_past_without_its_states_is_refused(library):
    arrays = draw(1, P=5)
    del arrays["past_s"]
    with pytest.raises(Exception, match=r"input past_s is missing, expected shape \(2, 5, 41\)"):
        solve(library, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_types_are_refused_by_name(library, name):
    arrays = draw(1, P=5, mask="open")
    with pytest.raises(Exception, match=rf"input {name} |input parameter \({name}\)|inferencing"):
        solve(library, arrays, {name: TensorProto.INT32})


def test_keys_of_another_type_than_queries_are_refused(library):
    with pytest.raises(Exception, match="input k has another element type than q"):
        solve(library, draw(1), {"k": HALF})


def test_random_shapes_and_types(library):
    outcomes = run_many(library, FUZZ_CASES)
    assert min(outcomes.values()) > FUZZ_CASES // 5


FAKE_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && echo built > "$2" && echo "$2" >> "$(dirname "$0")/log"
    shift
done
"""


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that writes its output file and logs its name."""
    path = tmp_path / "fake"
    path.write_text(FAKE_COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(native.INCLUDE_VARIABLE, raising=False)
    return path


def test_a_library_is_built_once(fake_compiler):
    assert native.library_path() is None
    path = native.build()
    written = fake_compiler.with_name("log").read_text().splitlines()
    assert len(written) == len(list(native.source_folder().glob("*.cpp"))) + 1
    assert path == native.library_path() == native.build()
    assert fake_compiler.with_name("log").read_text().splitlines() == written
    assert sorted(file.name for file in path.parent.iterdir()) == [
        native.library_name(),
        native.library_name() + ".sha256",
    ]
    native.build(force=True)
    assert len(fake_compiler.with_name("log").read_text().splitlines()) == 2 * len(written)


def test_the_cache_knows_sources_compiler_and_options(fake_compiler, tmp_path, monkeypatch):
    keys = [native.make_recipe().key(), native.make_recipe(sanitize=True).key()]
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / native.HEADER).write_text("#define ORT_API_VERSION 20\n")
    monkeypatch.setenv(native.INCLUDE_VARIABLE, str(headers))
    keys.append(native.make_recipe().key())
    sources = tmp_path / "sources"
    sources.mkdir()
    for text in ("int x;", "int y;"):
        (sources / "a.cpp").write_text(text)
        recipe = native.Recipe(sources, (str(fake_compiler),), None, False)
        keys.append(recipe.key())
    assert len(set(keys)) == len(keys)


@pytest.fixture
def fake_toolkit(fake_compiler, tmp_path, monkeypatch) -> Path:
    """A CUDA toolkit whose nvcc is the fake compiler."""
    folder = tmp_path / "toolkit"
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "bin" / "nvcc").symlink_to(fake_compiler)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("CUDAARCHS", "80;90")
    return folder


def test_cuda_kernels_are_built_on_request(fake_toolkit, fake_compiler, capsys):
    plain = native.build()
    main_ok(["build-op", "--cuda", "--json"])
    built = Path(json.loads(capsys.readouterr().out)["library"])
    assert built == native.library_path(cuda=True) != plain
    written = (fake_toolkit / "bin" / "log").read_text().splitlines()
    assert [Path(line).name for line in written] == ["cuda_solve.o", native.library_name()]
    compilations, link = native.make_recipe(cuda=True).commands(Path("/scratch"))
    (kernels,) = (command for command in compilations if command[-3].endswith(".cu"))
    (operator,) = (command for command in compilations if command[-3].endswith("operator.cpp"))
    for command in (kernels, link):
        assert command[0] == str(fake_toolkit / "bin" / "nvcc")
        assert command[command.index("-ccbin") + 1] == str(fake_compiler)
    assert "arch=compute_80,code=sm_80" in kernels and "arch=compute_90,code=sm_90" in kernels
    assert "-DSESSA_CUDA" in operator and "/scratch/cuda_solve.o" in link


def test_what_cuda_needs_is_said(fake_toolkit, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDAARCHS", "sm_90")
    with pytest.raises(SessaError, match=r"CUDAARCHS is 'sm_90', expected numbers"):
        native.build(cuda=True)
    monkeypatch.delenv("CUDAARCHS")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SessaError, match="no NVIDIA GPU found; name the architecture"):
        native.build(cuda=True)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\necho 8.6\necho 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    toolkit = native.make_recipe(cuda=True).cuda
    assert toolkit is not None and toolkit.architectures == ("86", "90")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    with pytest.raises(SessaError, match=r"no CUDA compiler found .*nothing/bin/nvcc"):
        native.build(cuda=True)


def test_a_failing_compiler_leaves_nothing_and_is_quoted(tmp_path, monkeypatch):
    fake = tmp_path / "fails"
    fake.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(SessaError, match=r"x\.cpp:1: error: no such thing"):
        native.build(cache=tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as exit:
        main(["build-op"])
    assert exit.value.code == 2
    assert "no C++ compiler found (looked for no-such-compiler)" in capsys.readouterr().err
    monkeypatch.setenv(native.INCLUDE_VARIABLE, str(tmp_path))
    with pytest.raises(SessaError, match=r"expected a folder with onnxruntime_c_api\.h"):
        native.find_headers()


def test_registering_says_what_is_wrong(fake_compiler):
    options = onnxruntime.SessionOptions()
    with pytest.raises(SessaError, match="not built; build it with `sessa build-op`"):
        native.register(options)
    with pytest.raises(SessaError, match=r"nowhere\.so: no such file"):
        native.register(options, "nowhere.so")
    with pytest.raises(SessaError, match="ONNX Runtime cannot load it"):
        native.register(options, native.build())


def test_the_cache_is_private_and_what_was_built_is_what_is_loaded(fake_compiler):
    path = native.build()
    for folder in (path.parent, path.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    path.write_text("changed\n")
    with pytest.raises(SessaError, match="is not the file that was built here"):
        native.library_path()
    with pytest.raises(SessaError, match="is not the file that was built here"):
        native.build()
    assert native.build(force=True).read_text() == "built\n"
    path.with_name(path.name + ".sha256").unlink()
    with pytest.raises(SessaError, match="is not the file that was built here"):
        native.library_path()


@pytest.mark.parametrize("level", range(4))
def test_a_library_in_a_place_that_others_may_write_to_is_not_loaded(fake_compiler, level):
    path = native.build()
    place = [path, *path.parents][level]
    place.chmod(0o777)
    with pytest.raises(SessaError, match="other users may write here"):
        native.library_path()


def test_a_library_of_another_user_is_not_loaded(fake_compiler, monkeypatch):
    native.build()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(SessaError, match="belongs to another user"):
        native.library_path()


def test_a_cxx_that_is_no_command_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O3'")
    with pytest.raises(SessaError, match=r"CXX is .*, which is not a command"):
        native.find_compiler()


def test_the_command_builds_and_copies(fake_compiler, tmp_path, capsys):
    main_ok(["build-op", "--json", "--output", str(tmp_path / "out" / "op.so")])
    report = json.loads(capsys.readouterr().out)
    assert Path(report["library"]).read_text() == "built\n"
    assert os.listdir(tmp_path / "out") == ["op.so"]


def main_ok(arguments: list[str]) -> None:
    """Run the command; its exit code must be 0 or None."""
    try:
        main(arguments)
    except SystemExit as exit:
        assert not exit.code


@pytest.mark.slow
def test_two_thousand_random_shapes_and_types_under_sanitizers(library):
    if sys.platform != "linux":
        pytest.skip("the sanitizers' runtime is preloaded on Linux only")
    fuzz = Path(__file__).parents[1] / "support" / "ort_op_fuzz.py"
    subprocess.run([sys.executable, fuzz, "--count", "2000", "--sanitize"], check=True)
