#!/usr/bin/python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Would nginx (or systemd, for a drop-in) accept FILE in the place of TARGET? Called before each replacement.

usage: llmfleet-nginx-check TARGET FILE
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NGINX = Path("/etc/nginx")
MAIN = NGINX / "nginx.conf"
SITE = NGINX / "sites-available/llmfleet.conf"
HTTP_SITE = NGINX / "sites-available/llmfleet-http.conf"
SITES = NGINX / "sites-enabled"
INCLUDE = re.compile(r"^\s*include\s+(/etc/nginx/)?sites-enabled/\*[^;]*;", re.MULTILINE)
UNIT_DIRS = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")


def temporary(text: str) -> Path:
    # Beside nginx.conf, because its relative includes are relative to its own folder.
    handle, name = tempfile.mkstemp(dir=NGINX, prefix=".llmfleet-check-")
    os.write(handle, text.encode())
    os.close(handle)
    return Path(name)


def check_nginx(target: str, staged: str) -> int:
    """nginx -t on the host's own nginx.conf, with our site as it would be."""
    changed = HTTP_SITE if target == str(HTTP_SITE) else SITE
    main_text = Path(staged if target == str(MAIN) else MAIN).read_text()
    if target == str(MAIN):
        site = SITE.read_text() if (SITES / SITE.name).exists() else ""
    elif target == str(changed):
        site = Path(staged).read_text()
    elif SITE.exists() and target in SITE.read_text():
        site = SITE.read_text().replace(target, staged)
    elif target.endswith(".js"):
        site = f"js_import llmfleet from {staged};"
    elif target.endswith(".json"):
        site = f"js_preload_object llmfleet_keys from {staged};"
    else:
        site = f"include {staged};"
    site_file = temporary(site)
    files = [file for file in sorted(SITES.glob("[!.]*")) if file.name not in {changed.name, "default"}]
    includes = "\n".join(f"include {file};" for file in [*files, site_file])
    main, found = INCLUDE.subn(lambda _: includes, main_text, count=1)
    main_file = temporary(main)
    try:
        if not found:
            print(f"{MAIN} lacks 'include {SITES}/*;': restore the distribution's file", file=sys.stderr)
            return 1
        return subprocess.run(["nginx", "-t", "-q", "-c", str(main_file)], check=False).returncode
    finally:
        site_file.unlink()
        main_file.unlink()


def check_dropin(target: str, staged: str) -> int:
    """systemd-analyze verify on the unit with the drop-in; any complaint about the drop-in is an error."""
    unit = Path(target).parent.name.removesuffix(".d")
    known = [Path(folder) / unit for folder in UNIT_DIRS if (Path(folder) / unit).exists()]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / unit).write_text(known[0].read_text() if known else "[Service]\nExecStart=/bin/true\n")
        dropin = Path(folder) / f"{unit}.d" / Path(target).name
        dropin.parent.mkdir()
        dropin.write_text(Path(staged).read_text())
        command = ["systemd-analyze", "verify", "--man=no", f"{folder}/{unit}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in result.stderr.splitlines() if str(dropin) in line]
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    target, staged = sys.argv[1:]
    os.umask(0o027)  # nginx -t makes the log files that are not there yet
    return (check_dropin if ".service.d/" in target else check_nginx)(target, staged)


sys.exit(main())
