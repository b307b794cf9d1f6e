# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what the role postgresql decides by. No Ansible import and no I/O here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 1024**2
GIB = 1024**3
CLUSTER = "main"
PORT = 5432  # what the socket is called by, also where nothing listens


# --- the variables ------------------------------------------------------------------------------------------


def problems(settings: Mapping[str, Any]) -> list[str]:
    """One sentence for each variable that cannot be."""
    return list(_problems(settings))


def _problems(settings: Mapping[str, Any]) -> Iterable[str]:
    if not re.fullmatch(r"|[A-Za-z0-9.:*_-]+( *, *[A-Za-z0-9.:*_-]+)*", settings["postgresql_listen_addresses"]):
        yield (
            f"postgresql_listen_addresses is {settings['postgresql_listen_addresses']!r}: "
            "write addresses with commas in between, as 'localhost', or '' for the socket only."
        )
    memory, connections = settings["postgresql_memory"], settings["postgresql_max_connections"]
    if memory != 0 and memory < 128 * MIB:
        yield f"postgresql_memory is {memory}: write at least {128 * MIB} (bytes), or 0 to have it computed."
    if not 20 <= connections <= 1000:
        yield f"postgresql_max_connections is {connections}: write a number from 20 to 1000."


# --- the host -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A line of pg_lsclusters."""

    version: str
    name: str
    port: int
    status: str
    data: str

    @property
    def label(self) -> str:
        return f"{self.version}/{self.name}"

    @property
    def online(self) -> bool:
        return self.status.split(",")[0] == "online"


def parse_clusters(text: str) -> list[Cluster]:
    rows = [line.split() for line in text.splitlines()]
    return [Cluster(row[0], row[1], int(row[2]), row[3], row[5]) for row in rows if len(row) >= 6 and row[2].isdigit()]


def others(databases: Sequence[str], tables: int) -> list[str]:
    """What is somebody else's in a cluster. ``tables`` are those in the database postgres, which every cluster has."""
    return [*databases, *([f"postgres with {tables} table{'s' if tables > 1 else ''}"] if tables else [])]


def host_problems(host: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Why the role cannot work on this host. ``host`` is what postgresql_host_info returns."""
    if not host["version"]:
        return [
            f"This host runs {host['system']}; the role postgresql supports {', '.join(settings['systems'])}. "
            "Use a host with one of these, or a database elsewhere (litellm_database_url)."
        ]
    return [*_cluster_problems(host), *_server_problems(host, settings), *_space_problems(host, settings)]


def _cluster_problems(host: Mapping[str, Any]) -> Iterable[str]:
    ours = f"{host['version']}/{CLUSTER}"
    for other in host["other_clusters"]:
        if other["port"] == PORT or (other["name"] == CLUSTER and not host["cluster"]):
            yield (
                f"This host has the PostgreSQL cluster {other['label']} (port {other['port']}), "
                f"and the role uses {ours} at port {PORT}: take it there with pg_upgradecluster, give it another port, "
                "or use it as a database elsewhere (litellm_database_url)."
            )
    cluster = host["cluster"]
    if cluster and cluster["port"] != PORT:
        yield (
            f"The PostgreSQL cluster {ours} has port {cluster['port']}, and the role uses {PORT}: "
            f"set port = {PORT} in its postgresql.conf and restart it."
        )
    if cluster and cluster["online"] and not host["server"]:
        yield (
            f"The PostgreSQL cluster {ours} runs, but does not let its own superuser in over the socket "
            f"({host['server_error']}): its pg_hba.conf needs the distribution's line `local all postgres peer`."
        )
    if cluster and not cluster["online"] and not host["tuned"]:
        start = f"systemctl start postgresql@{host['version']}-{CLUSTER}"
        if "binaries_missing" in cluster["status"]:
            start = f"apt-get install postgresql-{host['version']}, and {start}"
        yield (
            f"The PostgreSQL cluster {ours} is {cluster['status']}, and might be anybody's: start it ({start}) "
            f"or drop it (pg_dropcluster {host['version']} {CLUSTER}) if nobody needs it."
        )


def _server_problems(host: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterable[str]:
    server = host["server"]
    if not server:
        return
    for error in server["file_errors"] + server["hba_errors"]:
        yield f"PostgreSQL would not take its own configuration any more ({error}): correct that first."
    role, database = server["role"], server["database"]
    name, user = settings["database"], settings["user"]
    if role and role["powers"]:
        powers = role["powers"]
        yield (
            f"PostgreSQL has a role {user} with {', '.join(powers)}, and LiteLLM's is to have no such power: "
            f"take it from that role (ALTER ROLE {user} {' '.join(f'NO{power}' for power in powers)}), or rename it."
        )
    if database and database["owner"] != user:
        yield (
            f"PostgreSQL has a database {name} that belongs to {database['owner']}: rename it, "
            f"or give it to LiteLLM's role (ALTER DATABASE {name} OWNER TO {user})."
        )
    if database and database["encoding"] != "UTF8":
        yield f"PostgreSQL has a database {name} in {database['encoding']}: rename it, or make it anew in UTF8."
    if host["ours"]:
        return
    wanted, there = settings["postgresql_listen_addresses"], server["settings"]["listen_addresses"]
    others = ", ".join(server["others"])
    if wanted != there:
        yield (
            f"The PostgreSQL cluster {host['version']}/{CLUSTER} has other databases ({others}) and listens at "
            f"{there!r}, which the role leaves alone: set postgresql_listen_addresses to {there!r}."
        )
    needed, most = settings["postgresql_max_connections"], int(server["settings"]["max_connections"])
    if needed > most:
        yield (
            f"The PostgreSQL cluster {host['version']}/{CLUSTER} has other databases ({others}) and max_connections "
            f"{most}, which the role leaves alone: raise it there, or lower postgresql_max_connections ({needed})."
        )


def _space_problems(host: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterable[str]:
    needed = settings["disk_bytes"] if not host["cluster"] else settings["disk_bytes"] // 4
    if host["free_bytes"] < needed:
        yield (
            f"/var/lib/postgresql has {host['free_bytes'] // MIB} MiB free, and PostgreSQL needs "
            f"{needed // MIB} MiB: make room on the host's disk."
        )
    memory = settings["postgresql_memory"]
    if host["memory_bytes"] and memory > host["memory_bytes"] // 2:
        yield (
            f"postgresql_memory is {memory}, more than half of the host's {host['memory_bytes']} bytes: "
            "lower it, for the gateway's other services need the rest."
        )


# --- its configuration --------------------------------------------------------------------------------------


def tuning(memory: int, host_memory: int, connections: int) -> dict[str, str]:
    """Settings by size. ``memory`` is what the server may take, 0: an eighth of the host's, from 128 MiB to 1 GiB."""
    budget = memory or min(max(host_memory // 8, 128 * MIB), GIB)
    mib = budget // MIB
    return {
        "max_connections": str(connections),
        # PostgreSQL's own size at least, unless the host is small: the rest of the budget is the backends'.
        "shared_buffers": f"{max(mib // 2, 64)}MB",
        # Twice: the system's cache holds as much again of what is read often.
        "effective_cache_size": f"{max(mib, 128)}MB",
        # Reports sort and hash; few of the connections do so at a time.
        "work_mem": f"{min(max(mib // 64, 2), 16)}MB",
        "maintenance_work_mem": f"{min(max(mib // 8, 16), 256)}MB",
    }
