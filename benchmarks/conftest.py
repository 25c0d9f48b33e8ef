"""The one option of `pytest benchmarks/`."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the sizes of the published tables")
