"""The `fastvid` command. A verb is a module of this folder with `main(argv) -> int`.

The first line of its docstring is its line in `fastvid --help`, read without importing it.
"""

import ast
import difflib
import importlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

EXTRAS = {  # what to install for a module that a verb or class imports when it runs
    "av": "video",
    "PIL": "video",
    "diffusers": "models",
    "transformers": "text",
    "sentencepiece": "text",
    "jsonargparse": "train",
    "tensorboard": "train",
    "tqdm": "train",
    "scipy": "metrics",
    "webdataset": "data",
    "matplotlib": "train",
    "pynvml": "bench",
    "pytest_benchmark": "bench",
    "gradio": "demo",
}


def verbs() -> dict[str, str]:
    """Name of every verb with its one line of help."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.partition("\n")[0]
    return found


def usage() -> str:
    from fastvid import __version__

    lines = [
        textwrap.fill(line, 100, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
        for name, line in verbs().items()
    ]
    return "\n".join(
        [
            f"fastvid {__version__}: custom kernels for efficient video diffusion",
            "",
            "usage: fastvid [--traceback] VERB [OPTIONS]",
            "",
            *lines,
            "",
            "`fastvid VERB --help` lists the options of a verb.",
            "`--traceback` shows where an error came from.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 0 done, 1 failed, 2 not understood."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = argv[:1] == ["--traceback"]
    if traceback:
        argv.pop(0)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from fastvid import __version__

        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in verbs():
        close = difflib.get_close_matches(verb, verbs(), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        print(f"fastvid: no verb {verb!r}{meant}\nVerbs: {', '.join(verbs())}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"fastvid.cli.{verb}").main(rest)
    except KeyboardInterrupt:
        print(f"fastvid {verb}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if traceback or extra is None:
            raise
        remedy = f"pip install 'fastvid[{extra}]'"
        print(f"fastvid {verb}: {error.name} is not installed: {remedy}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if traceback or not _is_for_the_user(error):
            raise
        print(f"fastvid {verb}: {error}", file=sys.stderr)
        return 1


def _is_for_the_user(error: Exception) -> bool:
    """What this package says itself, or the system of a file; other errors keep their traceback."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    raised_in = place.tb_frame.f_globals.get("__name__", "") if place else ""
    return isinstance(error, OSError) or raised_in.partition(".")[0] == "fastvid"
