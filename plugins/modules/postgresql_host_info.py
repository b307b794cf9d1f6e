#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: postgresql_host_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a host has that matters before PostgreSQL is configured on it
description:
  - One look at everything that the role's preflight and its steps decide by. Reads, and changes nothing.
  - Asks the server, where one runs, over its socket as the system's user C(postgres).
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  versions:
    description: By distribution and version, as C(debian 12), the major version of PostgreSQL that it has.
    type: dict
    required: true
  packages:
    description: Debian packages of which to tell which are not installed. C(%v) stands for the major version.
    type: list
    elements: str
    default: []
  directories:
    description: Folders of which to tell which are not there. C(%v) stands for the major version.
    type: list
    elements: str
    default: []
  config:
    description: The role's own file of settings. C(%v) stands for the major version.
    type: str
    required: true
  dropin:
    description: The drop-in of the unit. C(%v) stands for the major version.
    type: str
    required: true
  database:
    description: The name of the database.
    type: str
    required: true
  user:
    description: The name of its owner.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Look at the host
  llmfleet.serving.postgresql_host_info:
    versions: {debian 12: "15"}
    config: /etc/postgresql/%v/main/conf.d/llmfleet.conf
    dropin: /etc/systemd/system/postgresql@%v-main.service.d/llmfleet.conf
    database: litellm
    user: litellm
  register: host
"""

RETURN = r"""
system:
  description: Name and version of the distribution, as C(ID) and C(VERSION_ID) of os-release have them.
  returned: always
  type: str
  sample: debian 12
version:
  description: The major version of PostgreSQL that O(versions) has for it. Empty for another system.
  returned: always
  type: str
  sample: "15"
missing_packages:
  description: The asked packages that are not installed.
  returned: always
  type: list
  elements: str
package_lists:
  description: Whether apt has package lists.
  returned: always
  type: bool
missing_directories:
  description: The asked folders that are not there.
  returned: always
  type: list
  elements: str
memory_bytes:
  description: The host's memory. V(0) where it is not known.
  returned: always
  type: int
free_bytes:
  description: What is free where the data lies, or will lie.
  returned: always
  type: int
cluster:
  description: The cluster C(main) of that version. Empty where there is none.
  returned: always
  type: dict
other_clusters:
  description: The other clusters of the host.
  returned: always
  type: list
  elements: dict
tuned:
  description: Whether O(config) is there.
  returned: always
  type: bool
ours:
  description: Whether the cluster is the role's to tune, because it did before, or nobody else has anything in it.
  returned: always
  type: bool
server:
  description:
    - What the server says of its settings, its files, what others have in it, the database and its owner.
    - Empty where none runs, or where it lets nobody in.
  returned: always
  type: dict
server_error:
  description: Why a server that runs did not answer.
  returned: always
  type: str
reload_pending:
  description: Whether the files have changed since the server has read them.
  returned: always
  type: bool
unconfined:
  description: Whether the server was started before O(dropin) was written.
  returned: always
  type: bool
daemon_reload_needed:
  description: Whether systemd has yet to read the drop-in.
  returned: always
  type: bool
enabled:
  description: Whether C(postgresql.service) starts with the host.
  returned: always
  type: bool
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._host import (
    changed,
    free_bytes,
    has_package_lists,
    memory_bytes,
    missing_packages,
    output,
    system,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._postgresql import (
    CLUSTER,
    PORT,
    Cluster,
    others,
    parse_clusters,
)

DATA = Path("/var/lib/postgresql")
SOCKETS = "/run/postgresql"
PSQL = ("psql", "-XAtq", "--set=ON_ERROR_STOP=1", "--no-password", "--file=-")
# "setting could not be applied" is what a setting says that waits for a restart. Oids below 16384 are the server's own.
QUERY = r"""
SELECT json_build_object(
  'settings', (SELECT json_object_agg(name, setting) FROM pg_settings
    WHERE name IN ('listen_addresses', 'max_connections', 'data_checksums', 'hba_file')),
  'pending_restart', (SELECT coalesce(json_agg(name ORDER BY name), '[]') FROM pg_settings WHERE pending_restart),
  'loaded', extract(epoch FROM pg_conf_load_time()),
  'started', extract(epoch FROM pg_postmaster_start_time()),
  'file_errors', (SELECT coalesce(json_agg(concat(sourcefile, ' line ', sourceline, ': ', name, ' ', error)), '[]')
    FROM pg_file_settings WHERE error IS NOT NULL AND error <> 'setting could not be applied'),
  'hba_errors', (SELECT coalesce(json_agg(concat('pg_hba.conf line ', line_number, ': ', error)), '[]')
    FROM pg_hba_file_rules WHERE error IS NOT NULL),
  'databases', (SELECT coalesce(json_agg(datname ORDER BY datname), '[]') FROM pg_database
    WHERE NOT datistemplate AND datname NOT IN ('postgres', :'database')
      AND datname NOT LIKE :'database' || '\_llmfleet\_%'),
  'tables', (SELECT count(*) FROM pg_class
    WHERE relkind IN ('r', 'p', 'm', 'f') AND relpersistence <> 't' AND oid >= 16384),
  'database', (SELECT json_build_object('owner', pg_get_userbyid(datdba), 'encoding', pg_encoding_to_char(encoding),
      'bytes', pg_database_size(oid), 'public', EXISTS (
        SELECT FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) WHERE grantee = 0),
      'comment', coalesce(shobj_description(oid, 'pg_database'), ''))
    FROM pg_database WHERE datname = :'database'),
  'role', (SELECT json_build_object('login', rolcanlogin, 'powers', array_remove(ARRAY[
      CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
      CASE WHEN rolcreatedb THEN 'CREATEDB' END, CASE WHEN rolreplication THEN 'REPLICATION' END,
      CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL),
      'comment', coalesce(shobj_description(oid, 'pg_authid'), ''))
    FROM pg_authid WHERE rolname = :'user'))
"""


def clusters(module: AnsibleModule) -> list[Cluster]:
    return parse_clusters(output(module, "pg_lsclusters", "--no-header"))


def server(module: AnsibleModule, asked: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the server says, and why it says nothing."""
    command = ["runuser", "-u", "postgres", "--", *PSQL, f"--host={SOCKETS}", f"--port={PORT}", "--dbname=postgres"]
    command += [f"--set=database={asked['database']}", f"--set=user={asked['user']}"]
    code, said, error = module.run_command(command, data=QUERY, cwd="/", expand_user_and_vars=False)
    if code:
        return {}, " ".join(error.split())
    answer = json.loads(said)
    return {**answer, "others": others(answer["databases"], answer["tables"])}, ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "versions": {"type": "dict", "required": True},
            "packages": {"type": "list", "elements": "str", "default": []},
            "directories": {"type": "list", "elements": "str", "default": []},
            "config": {"type": "str", "required": True},
            "dropin": {"type": "str", "required": True},
            "database": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    asked = module.params
    here = system()
    version = str(asked["versions"].get(here, ""))
    packages, directories = (
        [each.replace("%v", version) for each in asked[key]] for key in ("packages", "directories")
    )
    config, dropin = (asked[key].replace("%v", version) for key in ("config", "dropin"))
    found = clusters(module)
    cluster = next((each for each in found if (each.version, each.name) == (version, CLUSTER)), None)
    said, error = server(module, asked) if cluster and cluster.online and cluster.port == PORT else ({}, "")
    loaded, began = (float(said[key]) if said else 0.0 for key in ("loaded", "started"))
    files = [config, said["settings"]["hba_file"]] if said else []
    units = (f"postgresql@{version}-{CLUSTER}.service", "postgresql.service")
    tuned = Path(config).exists()
    module.exit_json(
        changed=False,
        system=here,
        version=version,
        missing_packages=missing_packages(module, packages),
        package_lists=has_package_lists(),
        missing_directories=[path for path in directories if not Path(path).is_dir()],
        memory_bytes=memory_bytes(),
        free_bytes=free_bytes(Path(cluster.data) if cluster else DATA),
        cluster={**asdict(cluster), "online": cluster.online} if cluster else {},
        other_clusters=[{**asdict(each), "label": each.label} for each in found if each != cluster],
        tuned=tuned,
        ours=tuned or not cluster or bool(said and not said["others"]),
        server=said,
        server_error=error,
        reload_pending=bool(said) and any(changed(path) > loaded for path in files),
        unconfined=bool(said) and changed(dropin) > began,
        daemon_reload_needed="=yes" in output(module, "systemctl", "show", "--property", "NeedDaemonReload", *units),
        enabled=output(module, "systemctl", "is-enabled", units[1]).strip() == "enabled",
    )


if __name__ == "__main__":
    main()
