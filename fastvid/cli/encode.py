"""Encode the clips of a recipe once, so that training reads latents.

  fastvid encode vdt-sky --out data/sky-latents --data.train data/sky
  fastvid train vdt-sky --data.kind latents --data.train data/sky-latents/train \\
      --data.validation data/sky-latents/validation
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from fastvid.cli._recipe import parse_recipe

_EPILOG = """\
Files are cut into clips that lie side by side, and every clip is encoded once: the same command
writes the same latents. Files that cannot be read are skipped, counted and named. An interrupted
command goes on where it stopped; the folder gets its name when all of it is written.
"""


def main(argv: Sequence[str]) -> int:
    flags = {"out": {"type": str, "required": True, "help": "folder for the latents"}}
    config, own = parse_recipe("encode", argv, flags, (__doc__ or "").strip(), _EPILOG)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from fastvid.training.encode import encode_sets

    for name, (clips, report) in encode_sets(config, own["out"]).items():
        files, *skipped = str(report).splitlines()
        print(f"{own['out']}/{name}: {clips} clips from {files}")
        for line in skipped:
            print(f"  {line}", file=sys.stderr)
    return 0
