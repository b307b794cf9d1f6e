"""Prints the text of a streamed chat completion as its events arrive on standard input."""

import json
import sys

PREFIX = "data: "
seen = False
for line in sys.stdin:
    if line.startswith(PREFIX) and line.strip() != PREFIX + "[DONE]":
        choices = json.loads(line.removeprefix(PREFIX))["choices"]
        text = choices[0]["delta"].get("content") if choices else None
        seen = seen or bool(text)
        print(text or "", end="", flush=True)
    elif line.startswith("{"):
        sys.exit(line)
print()
sys.exit(0 if seen else "No answer came.")
