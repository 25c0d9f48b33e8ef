"""A GPU machine has torch, Triton, pytest and little else: `pytest -m gpu` has to start there."""

import os
import re
import subprocess
import sys

from benchmarks.machine import ROOT

# Modules that such a machine lacks, and the plugins of pytest that come with them.
LACKING = ["hypothesis", "diffusers", "av", "jsonargparse", "skimage", "tensorboard"]
LACKING += ["pytest_timeout"]
BARE = f"import sys; sys.modules.update(dict.fromkeys({LACKING}))"  # their import raises


def test_gpu_tests_are_found_on_a_bare_machine(tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-p", "bare", "-m", "gpu", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "tests"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\bpytest\.mark\.gpu\b", path.read_text())
    }
    assert found == marked  # a file that skips itself would be missing
