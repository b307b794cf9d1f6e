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
SITES = NGINX / "sites-enabled"
MODULES = NGINX / "modules-enabled"
UNIT_DIRS = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")


def temporary(text: str) -> Path:
    # Beside nginx.conf, because its relative includes are relative to its own folder.
    handle, name = tempfile.mkstemp(dir=NGINX, prefix=".llmfleet-check-")
    os.write(handle, text.encode())
    os.close(handle)
    return Path(name)


def including(text: str, folder: Path, files: list[Path], added: str) -> str:
    """``text`` with these files, and one more line, in place of its include of the folder."""
    lines = "\n".join([*(f"include {file};" for file in files), added])
    pattern = re.compile(rf"^\s*include\s+(/etc/nginx/)?{folder.name}/\*[^;]*;", re.MULTILINE)
    changed, found = pattern.subn(lambda _: lines, text, count=1)
    if not found:
        sys.exit(f"{MAIN} lacks 'include {folder}/*': restore the distribution's file")
    return changed


def check_nginx(target: str, staged: str) -> int:
    """nginx -t on the host's own nginx.conf and sites, with the file as it would be.

    The site is written last, and is checked with all that it needs. The other files are checked without it, because the
    site that is still there may need what they had before.
    """
    lines = {".js": f"js_import llmfleet from {staged};", ".json": f"js_preload_object llmfleet_keys from {staged};"}
    added = lines.get(Path(target).suffix, f"include {staged};")
    folder = MODULES if Path(target).parent == MODULES else SITES
    main = Path(staged if target == str(MAIN) else MAIN).read_text()
    if target != str(MAIN):
        left_out = {Path(target).name, "default", *([SITE.name] if folder == SITES else [])}
        files = [file for file in sorted(folder.glob("[!.]*")) if file.name not in left_out]
        main = including(main, folder, files, added)
    main_file = temporary(main)
    try:
        return subprocess.run(["nginx", "-t", "-q", "-c", str(main_file)], check=False).returncode
    finally:
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
