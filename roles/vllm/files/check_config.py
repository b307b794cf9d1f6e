"""Reads an instance's config as `vllm serve --config` would, and ends with vLLM's own message where it cannot.

Usage: python check_config.py FILE. Run by the environment that is to serve the model; starts nothing.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ModuleNotFoundError:  # where it lay before vLLM 0.32
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

with tempfile.TemporaryDirectory() as folder:
    config = Path(folder) / "config.yaml"  # vLLM goes by the file's ending
    shutil.copyfile(sys.argv[1], config)
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", add_help=False))
    validate_parsed_serve_args(parser.parse_args(["--config", str(config)]))
