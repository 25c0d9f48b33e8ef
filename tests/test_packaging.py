"""What is shipped, and what comes with `import fastvid`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
HEAVY = ["triton", "diffusers", "transformers", "av", "scipy", "matplotlib", "jsonargparse", "PIL"]


def python(code, *args, cwd, **variables):
    """Standard output of `code` in a fresh process that knows nothing of the checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def build(kind, source, out):
    """Build `wheel` or `sdist` of the tree in `source` without a network; returns the file."""
    out.mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
    python(code.format(kind), out, cwd=source, FASTVID_CSRC="0")
    return next(out.iterdir())


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A wheel from a copy of the tree, an sdist of it, and the wheel built from that sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("shipped")
    tree = folder / "tree"
    junk = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fastvid", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=junk)
    for name in SHIPPED:
        shutil.copy(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests/__init__.py").touch()
    sdist = build("sdist", tree, folder / "sdist")
    wheel = build("wheel", tree, folder / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    rebuilt = build("wheel", next((folder / "unpacked").iterdir()), folder / "rebuilt")
    return {"wheel": wheel, "sdist": sdist, "rebuilt": rebuilt}


@pytest.fixture(scope="session")
def site(shipped, tmp_path_factory):
    """A folder with the wheel unpacked, as an installer would do it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(shipped["wheel"]) as archive:
        archive.extractall(folder)
    return folder


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_source_and_nothing_else(shipped):
    skipped = {"__pycache__"}
    for folder in ("fastvid", "kernels"):
        files = [p for p in (ROOT / folder).rglob("*.py") if not skipped & set(p.parts)]
        prefix = "fastvid/" if folder == "kernels" else ""
        wanted = {prefix + path.relative_to(ROOT).as_posix() for path in files}
        assert wanted <= names(shipped["wheel"])
    others = {name for name in names(shipped["wheel"]) if not name.startswith("fastvid")}
    assert others == set()


def test_rooms_travel_with_their_readme(shipped):
    readmes = {f"fastvid/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("kernels/*/*.md")}
    assert readmes <= names(shipped["wheel"])


def test_wheel_is_small_and_pure(shipped):
    assert shipped["wheel"].stat().st_size < 1_000_000
    assert shipped["wheel"].name.endswith("py3-none-any.whl")


def test_wheel_built_from_sdist_is_the_same(shipped):
    assert names(shipped["rebuilt"]) == names(shipped["wheel"])


def test_sdist_holds_the_compiled_sources(shipped):
    with tarfile.open(shipped["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/*/*")} <= held


def test_version_has_one_source(shipped):
    import fastvid

    assert f"-{fastvid.__version__}-" in shipped["wheel"].name


INSTALLED = """
import importlib.util, json, sys
site = sys.argv[1]
sys.path.insert(0, site)
found = importlib.util.find_spec("kernels")
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("blocked", name=name)
sys.meta_path.insert(0, NoTriton())
import torch
from fastvid.kernels.modulate import op
y = op.norm_modulate(torch.randn(2, 4, 8), torch.zeros(2, 8), torch.zeros(2, 8))
print(json.dumps({"kernels": found is not None, "file": op.__file__, "shape": list(y.shape)}))
"""


def test_installed_wheel_works_without_triton_and_claims_no_other_name(site, tmp_path):
    seen = json.loads(python(INSTALLED, site, cwd=tmp_path))
    assert seen["kernels"] is False
    assert seen["file"].startswith(str(site))
    assert seen["shape"] == [2, 4, 8]


IMPORT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
start = time.perf_counter()
import fastvid, fastvid.functional
spent = time.perf_counter() - start
heavy = [name for name in sys.argv[2:] if name in sys.modules]
print(json.dumps({"heavy": heavy, "seconds": spent}))
"""


def test_import_is_light(site, tmp_path, record_property):
    seen = json.loads(python(IMPORT, site, *HEAVY, cwd=tmp_path))
    record_property("seconds_beyond_torch", seen["seconds"])
    assert seen["heavy"] == []


HELP = """
import sys
sys.path.insert(0, sys.argv[1])
from fastvid.cli import main
status = main(["--help"])
print("heavy:", [name for name in sys.argv[2:] if name in sys.modules], status)
"""


def test_help_is_light(site, tmp_path):
    assert "heavy: [] 0" in python(HELP, site, *HEAVY, cwd=tmp_path)


@pytest.fixture
def check_install(tmp_path):
    """Run `.ci/check_install.py` with one more distribution installed, or another torch pinned."""

    def run(distribution=None, torch_pin=None):
        import torch

        pin = torch_pin or torch.__version__.partition("+")[0]
        (tmp_path / "constraints.txt").write_text(f"# pinned\ntorch=={pin}\n")
        if distribution:
            folder = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.0\n")
        return subprocess.run(
            [sys.executable, ROOT / ".ci/check_install.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("distribution", ["torchvision", "nvidia-cublas", "nvidia-nccl-cu13"])
def test_check_of_the_installation_finds_what_nothing_may_need(check_install, distribution):
    run = check_install(distribution)
    assert run.returncode == 1
    assert distribution in run.stderr


def test_check_of_the_installation_finds_a_replaced_torch(check_install):
    run = check_install(torch_pin="0.0.1")
    assert run.returncode == 1
    assert "constraints.txt says torch==0.0.1" in run.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="CUDA packages belong here")
def test_check_of_the_installation_passes_here(check_install):
    assert check_install("nvidia-ml-py").returncode == 0


@pytest.mark.parametrize(
    ("pin", "version", "fine"),
    [
        ("torch==2.13.0", "2.13.0", True),
        ("torch==2.13.0", "2.13.0+cpu", True),  # which build it is, the index decides
        ("torch==2.13.0", "2.13.0+cu130", True),
        ("torch==2.13.0", "2.14.0", False),
        ("torch==2.13.0", "2.14.0+cpu", False),
        ("torch==2.13.0", "2.13.0a0+git1234567", False),
        ("torch==2.13.0", "2.13.0.dev20260801+cpu", False),
        ("torch==2.13.0+cpu", "2.13.0+cu130", False),  # a pin that names its build means it
    ],
)
def test_check_of_the_installation_takes_any_build_of_the_pinned_release(pin, version, fine):
    requirements = pytest.importorskip("packaging.requirements")
    spec = importlib.util.spec_from_file_location("check_install", ROOT / ".ci/check_install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.faults([requirements.Requirement(pin)], {"torch": version}, gpu=True)
    assert found == ([] if fine else [f"torch is {version}, constraints.txt says {pin}"])


EXTENSION = """
import json, os, sys, torch
from torch.utils import cpp_extension
import setuptools
torch.version.cuda, cpp_extension.CUDA_HOME = sys.argv[1] or None, sys.argv[2] or None
cpp_extension.library_paths = lambda *args, **kwargs: []
os.environ["CUDA_HOME"] = sys.argv[2]
def setup(ext_modules=(), **rest):
    for e in ext_modules:
        seen = {"sources": e.sources, "flags": e.extra_compile_args, "libs": e.libraries}
        print(json.dumps(seen))
setuptools.setup = setup
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__name__": "__main__"})
"""


@pytest.fixture
def extension(tmp_path):
    """What `setup.py` builds for a torch of this CUDA and an nvcc of that, either may be None."""

    def read(cuda, nvcc):
        home = tmp_path / "cuda"
        if nvcc:
            (home / "bin").mkdir(parents=True)
            (home / "bin/nvcc").write_text(f"#!/bin/sh\necho Cuda tools, release {nvcc}, V{nvcc}.1")
            (home / "bin/nvcc").chmod(0o755)
        printed = python(EXTENSION, cuda or "", home if nvcc else "", cwd=ROOT)
        return json.loads(printed.splitlines()[-1])

    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    return read


def test_cuda_kernels_are_built_where_torch_and_nvcc_are_of_one_release(extension):
    built = extension("13.0", "13.2")
    kernels = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.cu")}
    assert kernels <= set(built["sources"])
    assert "torch_cuda" in built["libs"]
    gpus = [flag for flag in built["flags"]["nvcc"] if "gencode" in flag]
    assert any("code=sm_90a" in flag for flag in gpus)
    assert any("sm_80,compute_80" in flag for flag in gpus)


@pytest.mark.parametrize(("cuda", "nvcc"), [(None, "13.0"), ("13.0", None), ("13.0", "12.8")])
def test_without_an_nvcc_of_torch_the_cpp_alone_is_built(extension, cuda, nvcc):
    built = extension(cuda, nvcc)
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.cpp")}
    assert set(built["sources"]) == sources
    assert "nvcc" not in built["flags"]


@pytest.mark.parametrize("lacking", [{"CXX": "no-such-compiler"}, {"FASTVID_CSRC": "0"}])
def test_without_a_compiler_the_package_is_python_alone(lacking):
    assert python(EXTENSION, "", "", cwd=ROOT, **lacking) == ""


def test_compiled_sources_have_objects_of_their_own():
    """Setuptools names an object after its source without the suffix: `a.cpp` and `a.cu` clash."""
    objects = [path.with_suffix("") for path in ROOT.glob("csrc/*/*") if path.suffix[:2] == ".c"]
    assert len(objects) == len(set(objects)) > 2
