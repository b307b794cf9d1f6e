# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
name: secret
author: llmfleet developers
version_added: 1.0.0
short_description: A secret that is generated once and kept on the controller
description:
  - Returns the secret of that name from the secrets folder, and generates it when there is none.
  - Where a vault password is in use, a new secret is written encrypted with it.
  - Else it is a file that only its owner can read.
  - In check mode nothing is written; a secret that does not exist yet is then another one at each call.
options:
  _terms:
    description: Names of secrets, of letters, digits, C(_) and C(-).
    type: list
    elements: str
    required: true
  folder:
    description:
      - The secrets folder on the controller. It is made with mode V(0700).
      - By default the folder C(.secrets) beside the inventory. Ansible would read one without the dot as a part of it.
    type: path
    vars:
      - name: serving_secrets_dir
  length:
    description: Number of characters of a new secret. They are letters and digits, 5.95 bits each.
    type: int
    default: 43
  prefix:
    description: What a new secret begins with, before its O(length) characters.
    type: str
    default: ""
  value:
    description:
      - What a secret is to be that does not exist yet, as one from a backup. Without this it is generated.
    type: str
"""

EXAMPLES = r"""
- name: Use a key that is the same on every host and in every run
  ansible.builtin.set_fact:
    key: "{{ lookup('llmfleet.serving.secret', 'vllm_api_key') }}"
  no_log: true
"""

RETURN = r"""
_raw:
  description: The secrets, one for each name.
  type: list
  elements: str
"""

import os
import re
import secrets
import string
import tempfile
from pathlib import Path

from ansible import constants as C  # noqa: N812 - Ansible's own name for it
from ansible.errors import AnsibleLookupError
from ansible.parsing.vault import VaultLib, match_encrypt_secret
from ansible.plugins.lookup import LookupBase

ALPHABET = string.ascii_letters + string.digits
NAME = re.compile(r"[A-Za-z0-9_-]+")


class LookupModule(LookupBase):
    def run(self, terms, variables=None, **kwargs):
        variables = variables or {}
        # Lookups are given variables as they are written, not as they are meant.
        ours = {name: self._templar.template(variables[name]) for name in ("serving_secrets_dir",) if name in variables}
        self.set_options(var_options=ours, direct=kwargs)
        folder = self._folder(variables)
        check_mode = bool(variables.get("ansible_check_mode"))
        return [self._secret(folder, str(term), check_mode) for term in terms]

    def _folder(self, variables) -> Path:
        if self.get_option("folder"):
            return Path(self.get_option("folder"))
        if variables.get("inventory_dir") in (None, "", "None"):  # the word, where the inventory is a list of hosts
            raise AnsibleLookupError(
                "llmfleet.serving.secret: the inventory has no folder of its own to keep secrets beside; "
                "set serving_secrets_dir to a folder on the controller"
            )
        return Path(str(variables["inventory_dir"])) / ".secrets"

    def _secret(self, folder: Path, name: str, check_mode: bool) -> str:
        if not NAME.fullmatch(name):
            raise AnsibleLookupError(f"llmfleet.serving.secret: {name!r} is no name of a secret: use A-Z a-z 0-9 _ -")
        path = folder / name
        if not path.exists():
            random = "".join(secrets.choice(ALPHABET) for _ in range(self.get_option("length")))
            value = self.get_option("value") or self.get_option("prefix") + random
            if check_mode:
                return value
            self._create(path, value)
        value = self._loader.get_text_file_contents(str(path)).strip()
        if not value:
            raise AnsibleLookupError(
                f"llmfleet.serving.secret: {path} is empty; write the secret there or delete the file"
            )
        return value

    def _create(self, path: Path, value: str) -> None:
        """Write the file whole or not at all; when another process was first, its secret stays."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._encrypted(value + "\n"))
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)

    def _encrypted(self, text: str) -> bytes:
        vault_secrets = self._loader._vault.secrets if self._loader._vault else None
        if not vault_secrets:
            return text.encode()
        vault_id, secret = match_encrypt_secret(vault_secrets, C.DEFAULT_VAULT_ENCRYPT_IDENTITY)
        return VaultLib(vault_secrets).encrypt(text, secret, vault_id)
