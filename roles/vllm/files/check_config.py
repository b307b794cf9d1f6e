"""Reads an instance's config as `vllm serve --config` would, and ends with vLLM's own message where it cannot.

Usage: python check_config.py FILE. Run by the environment that is to serve the model; starts nothing.
"""

import difflib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ModuleNotFoundError:  # where it lay before vLLM 0.32
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args


def refuse(message: str) -> NoReturn:
    """In place of argparse's own, which lists all flags before it says what is wrong."""
    flags = parser._option_string_actions
    unknown = [flag for flag in re.findall(r"--[\w-]+", message) if flag not in flags]
    near = [match for flag in unknown for match in difflib.get_close_matches(flag, flags, n=1)]
    hint = f" Do you mean {', '.join(near)}?" if near else ""
    sys.exit(f"vllm_models[].flags has what vLLM does not take: {message}.{hint}")


with tempfile.TemporaryDirectory() as folder:
    config = Path(folder) / "config.yaml"  # vLLM goes by the file's ending
    shutil.copyfile(sys.argv[1], config)
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", add_help=False))
    parser.error = refuse
    validate_parsed_serve_args(parser.parse_args(["--config", str(config)]))
