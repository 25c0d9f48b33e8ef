"""The options of `pytest benchmarks/`, as those of `python -m benchmarks kernels`."""

from benchmarks import run


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    group.addoption("--full", action="store_true", help="the sizes of the published tables")
    group.addoption("--room", action="append", choices=run.rooms(), help="default: every room")
    group.addoption("--name", default="", help="a part of the case's name, such as backward")
    group.addoption("--shape", nargs="+", default=[], metavar="N=64", help="all of these")
    group.addoption("--dtype", nargs="+", default=[], help="one of these, such as bfloat16")
    group.addoption("--rival", nargs="+", help="beside fastvid and eager; default: all")
