"""The command line of verbs that start from a recipe."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fastvid.training.config import TrainConfig, TrainVDT, config_from, read_config
from fastvid.training.recipes import RECIPES

_NO_DEFAULTS = "\nDefaults are those of RECIPE: name one before --help to see them."


def parse_recipe(
    verb: str, argv: Sequence[str], flags: dict[str, dict[str, Any]], about: str, epilog: str
) -> tuple[TrainConfig, dict[str, Any]]:
    """The config that a command line means, and the values of the verb's own flags.

    A recipe's values lie lowest, those of `--config` above, single options on top. With `--resume`
    the config.yaml of the run folder takes the recipe's place. Exits with status 2, and the reason,
    where a recipe, key, type or value is refused.

    Args:
        flags: the verb's own, each with the keywords of `add_argument`.
        about, epilog: text before and after the list of options.
    """
    start = RECIPES[argv[0]]() if argv and argv[0] in RECIPES else None
    parser = _parser(verb, flags, about, epilog, start)
    options = parser.parse_args(list(argv)).as_dict()
    if start is None:
        return parser.error("RECIPE comes first")
    saved = Path(options["run"]["folder"], "config.yaml")
    if options.get("resume") and saved.is_file():
        start = read_config(saved)
        parser = _parser(verb, flags, about, epilog, start)
        options = parser.parse_args(list(argv)).as_dict()
    try:
        config = config_from({field.name: options[field.name] for field in fields(start)})
    except ValueError as error:
        parser.error(str(error))
    return config, {name: options[name] for name in flags}


def _parser(
    verb: str,
    flags: dict[str, dict[str, Any]],
    about: str,
    epilog: str,
    start: TrainConfig | None,
) -> Any:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Our paragraphs as they are, every option with its type, and the default of a recipe."""

        def _get_help_string(self, action):
            text = super()._get_help_string(action)
            return text if start else text.replace(", default: %(default)s", "")

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    lines = [f"  {name:22}{(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()]
    own = "".join(f" [--{name}]" for name in flags)
    parser = ArgumentParser(
        prog=f"fastvid {verb}",
        usage=f"%(prog)s RECIPE{own} [--config FILE] [--print_config] [--GROUP.NAME VALUE ...]",
        description="\n".join([about, "", "recipes:", *lines, *([] if start else [_NO_DEFAULTS])]),
        epilog=epilog,
        formatter_class=Help,
    )
    parser.add_argument(
        "recipe", choices=list(RECIPES), metavar="RECIPE", help="where the values come from"
    )
    for name, keywords in flags.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_argument("--config", action="config", help="YAML file with some or all values")
    parser.add_class_arguments(type(start) if start else TrainVDT)
    if start:
        parser.set_defaults(asdict(start))
    return parser
