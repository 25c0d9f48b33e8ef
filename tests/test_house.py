"""The rules of the house, read off the syntax trees. Every rule is shown to bite at the end."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted([*ROOT.glob("fastvid/[!k]*/**/*.py"), *ROOT.glob("fastvid/*.py")])
LIBRARY += sorted(ROOT.glob("kernels/**/*.py"))
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
SOURCES = sorted(path for path in ROOT.glob("csrc/*/*") if path.suffix in {".cpp", ".cu", ".h"})
ROOMS = sorted(p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name[0] not in "_.")

# What each floor may import from the floors below it; everyone may import from its own.
BELOW = {
    "kernels": set(),
    "functional": {"kernels"},
    "modules": {"functional"},
    "models": {"functional", "modules"},
    "diffusion": {"functional"},
    "data": set(),
    "metrics": set(),
    "training": {"functional", "modules", "models", "diffusion", "data", "metrics", ""},
    "cli": {"functional", "models", "diffusion", "data", "metrics", "training", "kernels", ""},
    "__main__": {"cli"},
    "": {"functional"},  # fastvid/__init__.py
}
# The reader of training state subclasses the unpickler to allow a short list of names only.
MAY_UNPICKLE = {"fastvid/training/tensors_only.py"}


def module_name(path: str) -> str:
    """`kernels/modulate/op.py` is `fastvid.kernels.modulate.op`."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == "fastvid" else ["fastvid", *parts])


def imports(path: str, source: str):
    """Absolute names that a file imports; `from a import b` gives `a.b`."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*prefix, alias.name]) for alias in node.names)


def direction_faults(path: str, source: str):
    """Imports that do not point down, or reach into another room."""
    name = module_name(path).split(".")
    floor = name[1] if len(name) > 1 else ""
    for imported in imports(path, source):
        parts = imported.split(".")
        if parts[0] in {"kernels", "benchmarks", "tests", "csrc"}:
            yield f"{path} imports {imported}: the library does not know {parts[0]}/"
        if parts[0] != "fastvid":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in BELOW else ""
        if target != floor and target not in BELOW[floor]:
            yield f"{path} imports {imported}: {floor or 'fastvid'} may not know {target or 'it'}"
        if floor == target == "kernels" and parts[2] not in {"_shared", name[2]}:
            yield f"{path} imports {imported}: a room knows _shared and itself"


def nodes_at_import(tree: ast.AST):
    """What runs when the module is imported: everything outside bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [default for default in node.args.kw_defaults if default]
            ran = [*node.decorator_list, *node.args.defaults, *defaults]
        elif isinstance(node, ast.Lambda):
            ran = []
        else:
            yield node
            yield from nodes_at_import(node)
            continue
        for part in ran:
            yield part
            yield from nodes_at_import(part)


def dotted(node: ast.AST) -> str:
    """`os.environ` of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def environment_faults(path: str, source: str):
    for node in nodes_at_import(ast.parse(source)):
        if dotted(node) in {"os.environ", "os.getenv", "environ", "getenv"}:
            yield f"{path}:{node.lineno} reads the environment at import"


def triton_faults(path: str, source: str):
    """Triton is imported by kernel files only: not by an op, its reference or anything above."""
    allowed = path.startswith("kernels/") and Path(path).name not in {"op.py", "reference.py"}
    if not allowed and any(name.split(".")[0] == "triton" for name in imports(path, source)):
        yield f"{path} imports Triton; only kernel files of a room may"


def name_faults(path: str, source: str):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, defined)]
    for name in [*Path(path).with_suffix("").parts, *names]:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
        if {"util", "utils", "helper", "helpers", "manager", "v2"} & set(words):
            yield f"{path}: {name} does not say what it does"


def security_faults(path: str, source: str):
    """No way to run code that came in a file or a string."""
    for name in imports(path, source):
        top = name.split(".")[0]
        if top in {"pickle", "dill", "cloudpickle", "shelve"} and path not in MAY_UNPICKLE:
            yield f"{path} imports {top}"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if called in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
            yield f"{path}:{node.lineno} calls {called}"
        if called == "torch.load" and keywords.get("weights_only") is not True:
            yield f"{path}:{node.lineno} calls torch.load without weights_only=True"
        if keywords.get("shell") is True:
            yield f"{path}:{node.lineno} runs a shell"


def device_faults(path: str, source: str):
    """An op launches on the device of its tensors, whichever device is the current one."""
    tree = ast.parse(source)
    if not any(dotted(node) == "torch.library.impl" for node in ast.walk(tree)):
        return
    guarded = {
        call
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        for item in block.items
        if isinstance(item.context_expr, ast.Call)
        if dotted(item.context_expr.func) == "torch.cuda.device_of"
        for call in ast.walk(block)
    }
    for node in ast.walk(tree):
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        if called.split(".")[-1].startswith("launch") and node not in guarded:
            yield f"{path}:{node.lineno} launches outside torch.cuda.device_of"


def length_faults(path: str, source: str):
    lines = source.count("\n")
    if lines > 500:
        yield f"{path} has {lines} lines; split it by subject"


def all_faults(rule, paths):
    texts = ((p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in paths)
    return [fault for path, text in texts for fault in rule(path, text)]


def test_imports_point_down():
    assert all_faults(direction_faults, LIBRARY) == []


def test_nothing_reads_the_environment_at_import():
    assert all_faults(environment_faults, LIBRARY) == []


def test_triton_is_imported_by_kernel_files_only():
    assert all_faults(triton_faults, LIBRARY) == []


def test_names_say_what_things_do():
    assert all_faults(name_faults, LIBRARY + BENCHMARKS) == []


def test_no_code_out_of_files_or_strings():
    assert all_faults(security_faults, LIBRARY + BENCHMARKS) == []


def test_ops_launch_on_the_device_of_their_tensors():
    assert all_faults(device_faults, LIBRARY) == []


def test_files_are_short():
    assert all_faults(length_faults, LIBRARY + BENCHMARKS + TESTS + SOURCES) == []


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_complete(room):
    wanted = [f"kernels/{room}/{n}" for n in ("README.md", "reference.py", "kernel.py", "op.py")]
    wanted += [f"tests/kernels/test_{room}.py", f"benchmarks/kernels/bench_{room}.py"]
    assert [path for path in wanted if not (ROOT / path).is_file()] == []


def test_compiled_sources_carry_names_of_rooms():
    assert {path.parent.name for path in SOURCES} <= {*ROOMS, "_shared"}


def test_every_folder_is_a_package_but_kernels():
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    folders = {path.parent for path in ROOT.glob("fastvid/[!k]*/**/*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


PLANTED = [
    (direction_faults, "kernels/a/op.py", "from fastvid.functional import b"),
    (direction_faults, "kernels/a/op.py", "from ..b import reference"),
    (direction_faults, "kernels/a/op.py", "from fastvid.kernels.b.op import b"),
    (direction_faults, "fastvid/modules/a.py", "from fastvid.kernels.b.op import b"),
    (direction_faults, "fastvid/modules/a.py", "def f():\n    from ..models import vdt"),
    (direction_faults, "fastvid/models/a.py", "import fastvid.training.loop"),
    (direction_faults, "fastvid/diffusion/a.py", "from fastvid import models"),
    (direction_faults, "fastvid/data/a.py", "from fastvid.functional import b"),
    (direction_faults, "fastvid/metrics/a.py", "from fastvid import __version__"),
    (direction_faults, "fastvid/training/a.py", "from fastvid.cli import main"),
    (direction_faults, "fastvid/models/a.py", "from kernels.modulate import op"),
    (environment_faults, "a.py", "import os\nfast = os.environ['FAST']"),
    (environment_faults, "a.py", "import os\nclass A:\n    fast = os.getenv('FAST')"),
    (environment_faults, "a.py", "import os\ndef f(fast=os.environ): ..."),
    (triton_faults, "kernels/a/op.py", "import triton.language as tl"),
    (triton_faults, "fastvid/models/a.py", "def f():\n    from triton import jit"),
    (name_faults, "fastvid/utils.py", ""),
    (name_faults, "fastvid/a.py", "class RunManager: ..."),
    (name_faults, "fastvid/a.py", "def attention_v2(): ..."),
    (security_faults, "a.py", "import pickle"),
    (security_faults, "a.py", "def f():\n    from pickle import loads"),
    (security_faults, "a.py", "eval('1')"),
    (security_faults, "a.py", "import os\nos.system('ls')"),
    (security_faults, "a.py", "yaml.load(text)"),
    (security_faults, "a.py", "subprocess.run('ls', shell=True)"),
    (security_faults, "a.py", "torch.load(path)"),
    (security_faults, "a.py", "torch.load(path, weights_only=False)"),
    (device_faults, "a.py", "@torch.library.impl('a', 'CUDA')\ndef _(x):\n    return launch(x)"),
    (length_faults, "a.py", "\n" * 501),
]
ALLOWED = [
    (direction_faults, "kernels/a/op.py", "from .._shared import native\nfrom . import kernel"),
    (direction_faults, "fastvid/models/a.py", "from fastvid.modules.mlp import MLP\nimport torch"),
    (direction_faults, "fastvid/cli/a.py", "from fastvid import __version__"),
    (environment_faults, "a.py", "import os\ndef f():\n    return os.environ"),
    (triton_faults, "kernels/a/backward.py", "import triton"),
    (name_faults, "fastvid/a.py", "def futile(): ..."),
    (security_faults, "a.py", "model.eval()\ntorch.load(path, weights_only=True)"),
    (
        device_faults,
        "a.py",
        "@torch.library.impl('a', 'CUDA')\n"
        "def _(x):\n    with torch.cuda.device_of(x):\n        return launch(x)",
    ),
    (length_faults, "a.py", "\n" * 500),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_rule_bites(rule, path, source):
    assert len(list(rule(path, source))) == 1


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_rule_lets_good_code_pass(rule, path, source):
    assert list(rule(path, source)) == []


def test_the_files_are_found():
    found = {path.relative_to(ROOT).as_posix() for path in LIBRARY}
    wanted = {"fastvid/__init__.py", "fastvid/cli/doctor.py", "kernels/_shared/native.py"}
    assert wanted <= found
