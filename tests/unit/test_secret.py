# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The lookup secret: through real ansible-playbook runs, and alone."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleLookupError
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.llmfleet.serving.plugins.lookup import secret

COLLECTIONS = Path(__file__).parents[2] / "collections"
KEY = "lookup('llmfleet.serving.secret', 'key')"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- through ansible-playbook -------------------------------------------------------------------------------

LookUp = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def look_up(run_playbook: Any, tmp_path: Path) -> LookUp:
    """Evaluates an expression on each host, and returns what each of them got."""

    def run(
        *arguments: str, expression: str = KEY, hosts: int = 1, variables: dict[str, str] | None = None
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        seen = tmp_path / "seen"
        shutil.rmtree(seen, ignore_errors=True)
        seen.mkdir()
        task = {
            "ansible.builtin.copy": {
                "content": "{{ " + expression + " }}",
                "dest": str(seen / "{{ inventory_hostname }}"),
            },
            "check_mode": False,
            "no_log": True,
        }
        play = {"hosts": "all", "gather_facts": False, "vars": variables or {}, "tasks": [task]}
        done = run_playbook([play], *arguments, hosts=hosts)
        return done, [path.read_text() for path in sorted(seen.iterdir())]

    return run


def test_secret_is_made_once_and_is_the_same_for_all_hosts(look_up: LookUp, tmp_path: Path) -> None:
    done, seen = look_up("--forks", "4", "-vvv", hosts=4)
    assert done.returncode == 0, done.stdout
    file = tmp_path / "inventory/.secrets/key"
    value = file.read_text().removesuffix("\n")
    assert re.fullmatch(r"[A-Za-z0-9]{43}", value)
    assert seen == [value] * 4
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert [path.name for path in file.parent.iterdir()] == ["key"], "nothing else is left there"
    assert value not in done.stdout + done.stderr
    assert look_up("--check")[1] == [value]


def test_check_mode_writes_nothing(look_up: LookUp, tmp_path: Path) -> None:
    done, seen = look_up("--check")
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"[A-Za-z0-9]{43}", seen[0])
    assert not (tmp_path / "inventory/.secrets").exists()


def test_secret_is_encrypted_where_there_is_a_vault(look_up: LookUp, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("of the vault\n")
    done, seen = look_up("--vault-password-file", str(password))
    assert done.returncode == 0, done.stdout
    file = tmp_path / "inventory/.secrets/key"
    text = file.read_text()
    assert text.startswith("$ANSIBLE_VAULT;1.1;AES256\n")
    assert mode(file) == 0o600
    vault = VaultLib([("default", VaultSecret(b"of the vault"))])
    assert vault.decrypt(text).decode() == f"{seen[0]}\n"
    without, nothing = look_up()
    assert without.returncode != 0
    assert nothing == []
    assert file.read_text() == text, "a secret that cannot be read is not made anew"


def test_folder_and_length_can_be_chosen(look_up: LookUp, tmp_path: Path) -> None:
    """By a value with a template in it, too: an inventory says where it lies itself."""
    expression = "query('llmfleet.serving.secret', 'a', 'b-2', 'a', length=64) | join(' ')"
    done, seen = look_up(expression=expression, variables={"serving_secrets_dir": "{{ inventory_dir }}/elsewhere"})
    assert done.returncode == 0, done.stdout
    first, second, again = seen[0].split()
    assert first == again != second
    assert (len(first), len(second)) == (64, 64)
    assert {path.name: path.read_text() for path in (tmp_path / "inventory/elsewhere").iterdir()} == {
        "a": f"{first}\n",
        "b-2": f"{second}\n",
    }
    assert not (tmp_path / "inventory/.secrets").exists()


def test_prefix_is_part_of_a_new_secret(plugin: secret.LookupModule, tmp_path: Path) -> None:
    plugin.get_option = {"length": 20, "prefix": "sk-"}.get
    made = plugin._secret(tmp_path, "key", False)
    assert re.fullmatch(r"sk-[A-Za-z0-9]{20}", made)
    plugin.get_option = {"length": 20, "prefix": "other-"}.get
    assert plugin._secret(tmp_path, "key", False) == made


# --- the plugin alone ---------------------------------------------------------------------------------------


@pytest.fixture
def plugin() -> secret.LookupModule:
    plugin = secret.LookupModule(loader=DataLoader())
    plugin.get_option = {"length": 43, "folder": None, "prefix": ""}.get
    return plugin


def test_given_value_is_written_once_and_replaces_nothing(plugin: secret.LookupModule, tmp_path: Path) -> None:
    for value in ("from-a-backup", "another"):
        plugin.get_option = {"length": 43, "value": value}.get
        assert plugin._secret(tmp_path, "key", False) == "from-a-backup"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


# One process: waits for the others, then asks for the same twenty secrets as they do.
RACER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ansible.parsing.dataloader import DataLoader
from ansible_collections.llmfleet.serving.plugins.lookup.secret import LookupModule
plugin = LookupModule(loader=DataLoader())
plugin.get_option = {"length": 43, "prefix": ""}.get
print(flush=True)
sys.stdin.read()
print(*(plugin._secret(Path(sys.argv[2]), f"key{number}", False) for number in range(20)))
"""


def test_runs_at_the_same_time_agree(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    command = [sys.executable, "-c", RACER, str(COLLECTIONS), str(folder)]
    with ExitStack() as stack:
        racers = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(3)
        ]
        for racer in racers:
            racer.stdout.readline()
        for racer in racers:
            racer.stdin.close()
        outputs = {racer.stdout.read() for racer in racers}
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 20
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"key{number}" for number in range(20))


def test_first_of_several_vaults_is_used_for_a_new_secret(plugin: secret.LookupModule, tmp_path: Path) -> None:
    secrets = [(name, VaultSecret(name.encode())) for name in ("first", "second")]
    plugin._loader.set_vault_secrets(secrets)
    made = plugin._secret(tmp_path, "key", False)
    assert (tmp_path / "key").read_text().splitlines()[0] == "$ANSIBLE_VAULT;1.2;AES256;first"
    assert VaultLib(secrets[:1]).decrypt((tmp_path / "key").read_bytes()).decode() == f"{made}\n"
    assert plugin._secret(tmp_path, "key", False) == made


@pytest.mark.parametrize("name", ["", "a/b", "../key", ".key", "a b", "key\n", "é", "a.b"])
def test_what_is_no_name_is_refused(plugin: secret.LookupModule, tmp_path: Path, name: str) -> None:
    with pytest.raises(AnsibleLookupError, match="is no name of a secret: use A-Z a-z 0-9 _ -") as caught:
        plugin._secret(tmp_path, name, False)
    assert repr(name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_empty_file_is_refused_and_kept(plugin: secret.LookupModule, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(AnsibleLookupError, match="key is empty; write the secret there or delete the file"):
        plugin._secret(tmp_path, "key", False)
    assert (tmp_path / "key").read_text() == " \n"


def test_secret_given_by_hand_is_used(plugin: secret.LookupModule, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("given by hand\n")
    assert plugin._secret(tmp_path, "key", False) == "given by hand"


@pytest.mark.parametrize("variables", [{}, {"inventory_dir": None}, {"inventory_dir": "None"}])
def test_inventory_without_a_folder_is_told_what_to_set(plugin: secret.LookupModule, variables: dict[str, Any]) -> None:
    """With `ansible -i host1,` ansible-core 2.19 says "None", the word."""
    with pytest.raises(AnsibleLookupError, match="set serving_secrets_dir to a folder on the controller"):
        plugin._folder(variables)


def test_secrets_differ(plugin: secret.LookupModule, tmp_path: Path) -> None:
    made = {plugin._secret(tmp_path / "secrets", f"key{number}", number % 2 == 0) for number in range(50)}
    assert len(made) == 50
    assert all(re.fullmatch(r"[A-Za-z0-9]{43}", value) for value in made)
    assert {character for value in made for character in value} == set(secret.ALPHABET)


def test_secret_that_another_process_has_just_made_stays(plugin: secret.LookupModule, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("theirs\n")
    plugin._create(tmp_path / "key", "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert plugin._secret(tmp_path, "key", False) == "theirs"


def test_interrupted_write_leaves_nothing(
    plugin: secret.LookupModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_text: str) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr(plugin, "_encrypted", fail)
    with pytest.raises(OSError, match="no space left"):
        plugin._create(tmp_path / "key", "ours")
    assert list(tmp_path.iterdir()) == []
