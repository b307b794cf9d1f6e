"""Reads LiteLLM's configuration as LiteLLM does, and ends with LiteLLM's own message where it cannot.

Usage: python check_config.py FILE. Run by the environment that is to serve; starts nothing and asks nobody.
"""

import os
import sys

# LiteLLM reads its environment while it is imported.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_BACKEND_KEY": "of no account"}

import llmfleet_usage  # noqa: F401 - fails where this LiteLLM lacks what it goes into
import yaml
from litellm import Router
from litellm.proxy._types import ConfigYAML

with open(sys.argv[1]) as file:
    config = yaml.safe_load(file)
ConfigYAML.model_validate(config)
Router(model_list=config["model_list"], **config["router_settings"])
