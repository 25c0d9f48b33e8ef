import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from fastvid import __version__, cli


@pytest.fixture
def doctor_raises(monkeypatch):
    """Let the verb `doctor`, or something that it calls, end in an error."""

    def plant(error, module="fastvid.cli.doctor"):
        scope = {"__name__": module, "error": error}
        exec("def main(argv):\n    raise error", scope)
        monkeypatch.setitem(sys.modules, "fastvid.cli.doctor", SimpleNamespace(main=scope["main"]))

    return plant


def test_help_has_a_line_for_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "doctor" in cli.verbs()
    for verb, line in cli.verbs().items():
        assert line.endswith("."), f"fastvid/cli/{verb}.py must begin with one sentence of help"
        assert line in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("verb", ["sample", "evaluate", "demo"])
def test_help_tells_every_default_once(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default:" not in shown  # the default of None says nothing: words in brackets do
    for action in import_module(f"fastvid.cli.{verb}")._parser()._actions:
        if type(action.default) in (int, float):
            assert f"[{action.default:g}]" in action.help


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_no_verb_shows_the_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: fastvid" in capsys.readouterr().out


def test_unknown_verb_names_the_close_one(capsys):
    assert cli.main(["docter"]) == 2
    assert "no verb 'docter'; did you mean doctor?" in capsys.readouterr().err


def test_modules_of_python_are_no_verbs(capsys):
    assert cli.main(["__init__"]) == 2
    assert cli.main(["../doctor"]) == 2


@pytest.mark.parametrize(
    "error", [ValueError("size is odd"), RuntimeError("disk is full"), NotImplementedError("D")]
)
def test_what_the_library_says_is_one_line(doctor_raises, capsys, error):
    doctor_raises(error)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == f"fastvid doctor: {error}\n"


def test_what_the_system_says_of_a_file_is_one_line(doctor_raises, capsys):
    doctor_raises(FileNotFoundError(2, "No such file", "clip.mp4"), module="pathlib")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.endswith("No such file: 'clip.mp4'\n")


def test_traceback_is_there_for_the_asking(doctor_raises):
    doctor_raises(ValueError("size is odd"))
    with pytest.raises(ValueError, match="size is odd"):
        cli.main(["--traceback", "doctor"])


@pytest.mark.parametrize(
    ("error", "module"),
    [(KeyError("loss"), "fastvid.cli.doctor"), (RuntimeError("mat1 and mat2"), "torch.nn")],
)
def test_faults_keep_their_traceback(doctor_raises, error, module):
    doctor_raises(error, module)
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_missing_extra_names_the_command_that_brings_it(doctor_raises, capsys):
    doctor_raises(ModuleNotFoundError("No module named 'av'", name="av.container"))
    assert cli.main(["doctor"]) == 1
    assert "pip install 'fastvid[video]'" in capsys.readouterr().err


def test_missing_part_of_the_library_keeps_its_traceback(doctor_raises):
    doctor_raises(ModuleNotFoundError("No module named 'fastvid.gone'", name="fastvid.gone"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_interrupt_is_no_traceback(doctor_raises):
    doctor_raises(KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
