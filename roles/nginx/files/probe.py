# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Tells what the role nginx has to know of a host, as JSON. Runs on the host, changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

RENEW_BEFORE = datetime.timedelta(days=30)
LISTEN = "0A"


def system() -> str:
    values = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return f"{values.get('ID', '?')}-{values.get('VERSION_ID', '?')}".replace('"', "")


def output(*command: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""


def missing_packages(packages: list[str]) -> list[str]:
    known = output("dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *packages)
    return [package for package in packages if f"{package} installed" not in known.splitlines()]


def taken_ports(ports: list[int]) -> dict[int, str]:
    """Ports on which another program than nginx listens, on whatever address."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
                port = int(local.rpartition(":")[2], 16)
                if state == LISTEN and port in ports:
                    sockets[f"socket:[{inode}]"] = port
    taken = dict.fromkeys(sockets.values(), "another program")
    for link in Path("/proc").glob("[0-9]*/fd/*") if sockets else []:
        with contextlib.suppress(OSError):
            port = sockets.get(os.readlink(link))
            if port:
                name = (link.parent.parent / "comm").read_text().strip()
                if name == "nginx":
                    taken.pop(port, None)
                elif port in taken:
                    taken[port] = f"{name} (pid {link.parts[2]})"
    return taken


def started(pid: int) -> float:
    """When a process started, in seconds since the epoch."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def master() -> int:
    with contextlib.suppress(OSError, ValueError):
        pid = int(Path("/run/nginx.pid").read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == "nginx":
            return pid
    return 0


def changed(path: str) -> float:
    """When the file was put in its place: a rename changes ctime, not mtime."""
    try:
        return os.lstat(path).st_ctime
    except OSError:
        return 0


def workers(pid: int) -> list[int]:
    """The workers of a master that take requests; those that only end theirs after a reload are left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*") if pid else []:
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_text()
            if parent == pid and "worker process" in title and "shutting down" not in title:
                found.append(int(folder.name))
    return found


def reload_pending(files: list[str]) -> bool:
    """Whether a file is younger than a worker: every successful reload replaces all workers."""
    with contextlib.suppress(OSError):
        return any(started(worker) < max(map(changed, files)) for worker in workers(master()))
    return False


def certificate_to_do(own_ca: dict[str, str]) -> str:
    """Why the own CA has to sign a certificate, or nothing."""
    if not own_ca:
        return ""
    if not own_ca["ca"]:
        return "there is no CA yet"
    try:
        return certificate_problem(**own_ca)
    except (ImportError, OSError):  # ImportError: python3-cryptography is not there before the first run
        return "it is missing"
    except ValueError as error:
        return f"it cannot be read ({error})"


def certificate_problem(ca: str, key: str, certificate: str, san: str) -> str:
    from cryptography import exceptions, x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa  # noqa: PLC0415

    private_key = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    leaf = x509.load_pem_x509_certificate(Path(certificate).read_bytes())
    problem = ""
    if private_key.public_key().public_numbers() != leaf.public_key().public_numbers():
        problem = "it does not belong to the key"
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    kind, _, name = san.partition(":")
    wanted = ipaddress.ip_address(name) if kind == "IP" else name
    if names.get_values_for_type(x509.IPAddress if kind == "IP" else x509.DNSName) != [wanted]:
        problem = "nginx_server_name has changed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name without _utc is all that Debian 12 has
        end = leaf.not_valid_after.replace(tzinfo=datetime.timezone.utc)
    if end - RENEW_BEFORE < datetime.datetime.now(datetime.timezone.utc):
        problem = f"it expires on {end:%Y-%m-%d}"
    public_key = x509.load_pem_x509_certificate(ca.encode()).public_key()
    digest = leaf.signature_hash_algorithm
    # The role makes an EC key; a CA of the operator's own may have an RSA key.
    scheme = (padding.PKCS1v15(), digest) if isinstance(public_key, rsa.RSAPublicKey) else (ec.ECDSA(digest),)
    try:
        public_key.verify(leaf.signature, leaf.tbs_certificate_bytes, *scheme)
    except exceptions.InvalidSignature:
        problem = "another CA signed it"
    return problem


def main() -> None:
    question = json.loads(sys.argv[1])
    unit = output("systemctl", "show", "nginx.service", "--property", "NeedDaemonReload")
    pid = master()
    answer = {
        "os": system(),
        "ipv6": Path("/proc/net/if_inet6").exists(),
        "missing_packages": missing_packages(question["packages"]),
        "package_lists": any(Path("/var/lib/apt/lists").glob("*_Packages*")),
        "missing_directories": [path for path in question["directories"] if not Path(path).is_dir()],
        "taken_ports": taken_ports(question["ports"]),
        "default_site": os.path.lexists(question["default_link"]),
        "certificate_to_do": certificate_to_do(question["own_ca"]),
        "reload_pending": reload_pending(question["loaded_files"]),
        "running": bool(pid),
        "daemon_reload_needed": "=yes" in unit,
        "unconfined": bool(pid) and started(pid) < (changed(question["dropin"]) or time.time()),
    }
    print(json.dumps(answer))


main()
