"""The modules against the real LiteLLM: each checked and done, twice; rotation, strangers, hostile inputs."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import support
from service import serving
from testinfra.host import Host

GATEWAY = "gw"
TEAM = "trial"
HUGE = "x" * 100_000


def master_key() -> str:
    return support.secret("litellm_master_key")


def url() -> str:
    """Of the instance that serves."""
    return f"http://127.0.0.1:{serving(support.host(GATEWAY))}"


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def literal(value: Any) -> str:
    """As YAML that Ansible takes no template from."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r'"(?:[^"\\]|\\.)*\{\{(?:[^"\\]|\\.)*"', lambda found: f"!unsafe {found[0]}", text)


Call = tuple[str, dict[str, Any]]


def modules(
    calls: list[Call], *, check: Sequence[bool] = (), verbose: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """What modules of the collection answer on the gateway, one after the other, and all that Ansible says."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        access = {"url": url(), "master_key": master_key()}
        tasks = [
            f"{{name: Call, llmfleet.serving.{name}: {literal({**access, **options})}, "
            f"check_mode: {json.dumps(checked)}, register: answer{number}, ignore_errors: true}}"
            for number, ((name, options), checked) in enumerate(zip_longest(calls, check, fillvalue=False))
        ]
        content = "{{{{ [{}] | to_json }}}}".format(", ".join(f"answer{number}" for number in range(len(calls))))
        copy = {"content": content, "dest": str(answers), "mode": "0600"}
        keep = {"ansible.builtin.copy": copy, "name": "Keep", "delegate_to": "localhost", "become": False}
        keep |= {"diff": False, "no_log": True, "vars": {"ansible_connection": "local"}}
        play = f"[{{hosts: {GATEWAY}, become: true, tasks: [{', '.join([*tasks, json.dumps(keep)])}]}}]"
        book = Path(folder) / "play.yml"
        book.write_text(play, encoding="utf-8")
        run = support.play(str(book), "--diff", *["-vvv"] * verbose)
        assert answers.exists(), run.output
        return json.loads(answers.read_text()), run.output


def module(name: str, /, *, check: bool = False, **options: Any) -> dict[str, Any]:
    return modules([(name, options)], check=[check])[0][0]


def ok(name: str, /, **options: Any) -> dict[str, Any]:
    answer = module(name, **options)
    assert not answer.get("failed"), answer["msg"]
    return answer


def twice(name: str, /, **options: Any) -> dict[str, Any]:
    """Checked and then done, which changes something; checked and done again, which does not. What the first said."""
    answers, _ = modules([(name, options)] * 4, check=[True, False, True, False])
    assert [answer.get("changed") for answer in answers] == [True, True, False, False], answers
    checked, done, *_ = answers
    assert checked["changes"] == done["changes"]
    return done


@pytest.fixture(autouse=True)
def swept(gateway: Host) -> Iterator[None]:
    yield
    _, teams = ask(gateway, master_key(), "/team/list")
    left = [team["team_id"] for team in teams if team["team_id"].startswith(TEAM)]
    if left:
        assert ask(gateway, master_key(), "/team/delete", {"team_ids": left})[0] == 200


@pytest.fixture
def team() -> str:
    ok("litellm_team", name=TEAM)
    return TEAM


def ask(gateway: Host, key: str, path: str = "/v1/models", body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and answer of LiteLLM to somebody with this key."""
    program = (
        "import json, sys, urllib.request as u, urllib.error\n"
        "url, key, body = json.load(sys.stdin)\n"
        "data = json.dumps(body).encode() if body is not None else None\n"
        "r = u.Request(url, data, {'Authorization': 'Bearer ' + key, 'Content-Type': 'application/json'})\n"
        "try:\n    a = u.urlopen(r, timeout=60)\n    print(json.dumps([a.status, json.load(a)]))\n"
        "except urllib.error.HTTPError as e:\n    print(json.dumps([e.code, e.read().decode()]))\n"
    )
    asked = json.dumps([url() + path, key, body])
    status, answer = json.loads(gateway.check_output("printf %%s %s | python3 -c %s", asked, program))
    return status, answer


def usable(gateway: Host, key: str) -> list[str] | None:
    """What the key may use, or nothing where it is not let in."""
    status, answer = ask(gateway, key)
    return sorted(model["id"] for model in answer["data"]) if status == 200 else None


def settles(gateway: Host, key: str, let_in: bool) -> None:
    """Waits until all workers see the key so: each keeps what it has read of a key for a minute."""
    support.wait_until(lambda: all((usable(gateway, key) is not None) == let_in for _ in range(8)), 90)


def snapshot() -> str:
    info = ok("litellm_tenants_info", usage_days=0)
    return json.dumps([info["teams"], info["keys"]], sort_keys=True)


def as_declared(info: dict[str, Any]) -> list[dict[str, Any]]:
    """All that is there, as somebody would have declared it."""

    def fields(row: dict[str, Any]) -> dict[str, Any]:
        names = (
            "models",
            "max_budget",
            "budget_duration",
            "rpm_limit",
            "tpm_limit",
            "max_parallel_requests",
            "metadata",
        )
        said = {name: row[name] for name in names if row.get(name)}
        return {**said, "state": "blocked" if row["blocked"] else "present"}

    return [
        {
            "team": team["name"],
            **fields(team),
            "keys": [
                {"name": key["name"].partition("/")[2], **fields(key)}
                for key in info["keys"]
                if key["team"] == team["name"] and re.fullmatch(r"[^/]+/[^/@]+", key["name"])
            ],
        }
        for team in info["teams"]
    ]


# --- one thing at a time ------------------------------------------------------------------------------------


@pytest.mark.long
def test_team(gateway: Host) -> None:
    made = twice(
        "litellm_team", name=TEAM, max_budget=50, budget_duration="30d", rpm_limit=600, metadata={"cost": "4711"}
    )
    assert made["changes"] == ["team trial: create"]
    assert 'metadata: {"cost": "4711"}' in made["diff"]["after"]
    changed = twice("litellm_team", name=TEAM, max_budget=60, tpm_limit=1000, metadata={})
    assert changed["diff"]["before"].splitlines() == [
        "team trial:",
        "  max_budget: 50.0",
        '  metadata: {"cost": "4711"}',
        "  tpm_limit: null",
    ]
    assert (changed["team"]["rpm_limit"], changed["team"]["budget_duration"]) == (600, "30d")
    cleared = twice("litellm_team", name=TEAM, max_budget=-1, budget_duration="", rpm_limit=-1, tpm_limit=-1)
    assert {cleared["team"][name] for name in ("max_budget", "budget_duration", "rpm_limit", "tpm_limit")} == {None}

    key = ok("litellm_key", team=TEAM, name="ci")["key"]
    assert usable(gateway, key)
    assert twice("litellm_team", name=TEAM, state="blocked")["changes"] == ["team trial: block"]
    assert ask(gateway, key, "/v1/chat/completions", {"model": "tiny", "messages": []})[0] in (401, 403)
    assert twice("litellm_team", name=TEAM)["changes"] == ["team trial: unblock"]
    settles(gateway, key, let_in=True)
    assert twice("litellm_team", name=TEAM, state="absent")["changes"] == ["team trial: delete"]
    settles(gateway, key, let_in=False)


@pytest.mark.long
def test_key(gateway: Host, team: str) -> None:
    first, second = new_key(), new_key()
    twice("litellm_key", team=team, name="ci", key=first, max_budget=5, max_parallel_requests=3)
    assert "tiny" in usable(gateway, first)
    changed = twice("litellm_key", team=team, name="ci", key=first, max_budget=6, budget_duration="1mo")
    assert changed["diff"]["before"].splitlines() == ["key trial/ci:", "  budget_duration: null", "  max_budget: 5.0"]

    ask(gateway, master_key(), "/key/update", {"key": sha256(first), "spend": 2.5})
    rotated = twice("litellm_key", team=team, name="ci", key=second)
    assert rotated["changes"] == ["key trial/ci: retire", "key trial/ci: rotate"]
    assert rotated["sha256"] == sha256(second)
    assert usable(gateway, first)
    assert usable(gateway, second)
    rows = {row["sha256"]: row for row in ok("litellm_tenants_info")["keys"] if row["team"] == team}
    assert (rows[sha256(second)]["spend"], rows[sha256(second)]["expires"]) == (2.5, None)
    assert rows[sha256(first)]["expires"]

    assert "key trial/ci: block" in twice("litellm_key", team=team, name="ci", state="blocked")["changes"]
    settles(gateway, first, let_in=False)
    settles(gateway, second, let_in=False)
    twice("litellm_key", team=team, name="ci")
    settles(gateway, second, let_in=True)
    twice("litellm_key", team=team, name="ci", state="absent")
    settles(gateway, first, let_in=False)
    settles(gateway, second, let_in=False)


@pytest.mark.long
def test_key_that_was_rotated_ends(gateway: Host, team: str) -> None:
    first, second, third = new_key(), new_key(), new_key()
    ok("litellm_key", team=team, name="ci", key=first)
    ok("litellm_key", team=team, name="ci", key=second, overlap=30)
    assert usable(gateway, first)
    settles(gateway, first, let_in=False)
    assert ok("litellm_key", team=team, name="ci", key=second)["changes"] == [
        f"key trial/ci@{sha256(first)[:8]}: delete"
    ]
    ok("litellm_key", team=team, name="ci", key=third, overlap=0)
    settles(gateway, second, let_in=False)
    assert usable(gateway, third)


@pytest.mark.long
def test_key_is_made_and_shown_once(gateway: Host, team: str) -> None:
    assert "key" not in ok("litellm_key", team=team, name="ci", check=True)
    made = ok("litellm_key", team=team, name="ci")
    assert usable(gateway, made["key"])
    assert "key" not in ok("litellm_key", team=team, name="ci")


@pytest.mark.long
def test_key_may_use_what_its_team_may(gateway: Host) -> None:
    ok("litellm_team", name=TEAM, models=["tiny"])
    key = ok("litellm_key", team=TEAM, name="ci")["key"]
    assert usable(gateway, key) == ["tiny"]
    assert ask(gateway, key, "/v1/chat/completions", {"model": "nothing", "messages": []})[0] in (400, 401, 403, 404)


# --- all of them --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_tenants_and_strangers(gateway: Host) -> None:
    others = as_declared(ok("litellm_tenants_info"))
    ci, lab, stranger = new_key(), new_key(), new_key()
    mine = {
        "team": TEAM,
        "max_budget": 50,
        "keys": [{"name": "ci", "key": ci}, {"name": "lab", "key": lab, "state": "blocked"}],
    }
    made = twice("litellm_tenants", tenants=[*others, mine])
    assert len(made["changes"]) == 3
    assert {"name": "trial/ci", "sha256": sha256(ci)} in made["accepted"]
    assert sha256(lab) not in json.dumps(made["accepted"])

    hand_made = {"team_id": f"{TEAM}-hand", "key_alias": 'by "hand"; x', "key": stranger}
    assert ask(gateway, master_key(), "/team/new", {"team_id": f"{TEAM}-hand", "team_alias": "by hand"})[0] == 200
    assert ask(gateway, master_key(), "/key/generate", hand_made)[0] == 200
    seen = ok("litellm_tenants", tenants=[*others, mine])
    assert not seen["changed"]
    assert f"team {TEAM}-hand" in seen["undeclared"]
    assert {"name": f"key-{sha256(stranger)[:8]}", "sha256": sha256(stranger)} in seen["accepted"]
    # Prune would take what the scenario itself has made by hand with it, too.
    assert twice("litellm_tenants", tenants=[*others, mine], prune=True)["undeclared"] == []
    settles(gateway, stranger, let_in=False)
    assert usable(gateway, ci)

    swapped = {**mine, "keys": [{"name": "ci", "key": lab}, {"name": "lab", "key": ci}]}
    twice("litellm_tenants", tenants=[*others, swapped])
    rows = {row["name"]: row["sha256"] for row in ok("litellm_tenants_info")["keys"]}
    assert (rows["trial/ci"], rows["trial/lab"]) == (sha256(lab), sha256(ci))


@pytest.mark.long
def test_no_key_is_ever_said(gateway: Host) -> None:
    """By Ansible at its loudest, or in the journal."""
    first, second = new_key(), new_key()
    calls = [
        ("litellm_tenants", {"tenants": [{"team": TEAM, "keys": keys}]})
        for keys in (
            [{"name": "ci", "key": first}],
            [{"name": "ci", "key": second}],
            [{"name": "a", "key": first}, {"name": "b", "key": first}],
        )
    ]
    (made, rotated, refused), said = modules(calls, verbose=True)
    assert (made["changed"], rotated["changed"]) == (True, True)
    assert "has the same key" in refused["msg"]
    journal = gateway.check_output("journalctl --quiet --no-pager --since -10min")
    assert "litellm" in journal
    said += journal
    for secret in (first, second, master_key()):
        assert secret not in said


HOSTILE_NAMES = [
    '\'; DROP TABLE "LiteLLM_TeamTable"; --',
    "x' OR '1'='1",
    "../../etc/passwd",
    "..",
    "a..b",
    ".hidden",
    "a/b",
    "a@0123abcd",
    "%2e%2e%2f",
    "a b",
    "a\nb",
    "a\r\nX-Evil: 1",
    "a\x00b",
    "a\x1b[31mb",
    "tr\u0456al",  # a Ukrainian letter
    "trial\u200b",
    "\u202etrial",
    "\uff54rial",
    "team\U0001f4a9",
    "$(reboot)",
    "{{ 7 * 7 }}",
    "",
    "x" * 65,
    HUGE,
]


@pytest.mark.long
def test_hostile_names() -> None:
    before = snapshot()
    answers, _ = modules(
        [
            ("litellm_tenants", {"tenants": [{"team": team, "keys": [{"name": key, "key": new_key()}]}]})
            for name in HOSTILE_NAMES
            for team, key in ((name, "ci"), (TEAM, name))
        ]
    )
    for answer in answers:
        assert answer["failed"]
        assert not answer.get("changed")
        assert re.search(r"use (A-Z|1 to 64)|no two dots", answer["msg"])
        assert len(answer["msg"]) < 1000
        assert answer["msg"].isprintable()
    assert snapshot() == before


HOSTILE_TEAMS: list[dict[str, Any]] = [
    {"max_budget": -1},
    {"max_budget": "nan"},
    {"max_budget": "inf"},
    {"max_budget": 1e300},
    {"rpm_limit": -5},
    {"rpm_limit": 2**63},
    {"tpm_limit": 0},
    {"max_parallel_requests": 10**9},
    {"budget_duration": "1y", "max_budget": 1},
    {"budget_duration": "-30d", "max_budget": 1},
    {"budget_duration": "9999999999d", "max_budget": 1},
    {"budget_duration": "30d; DROP", "max_budget": 1},
    {"metadata": {"tags": ["x"]}},
    {"metadata": {"model_rpm_limit": {"tiny": 10**9}}},
    {"metadata": {"x": HUGE}},
    {"metadata": {"x": "\x00"}},
    {"models": []},
    {"keys": [{"name": "ci", "key": "sk-\r\nX-Evil: 0123456789abcdefghij"}]},
    {"keys": [{"name": "ci", "key": "sk-\u0430bcdefghijklmnopqrstuvwxyz"}]},
    {"keys": [{"name": "ci", "key": "sk-short"}]},
    {"keys": [{"name": "ci", "key": "sk-aaaaaaaaaaaaaaaaaaaaaaaaaaa"}]},
    {"keys": [{"name": "ci", "key": "0123456789-abcdefghijklmnopqrst"}]},
    {"keys": [{"name": "ci", "key": "sk-" + "0123456789abcdef" * 1000}]},
    {"keys": [{"name": "ci"}]},
    {"keys": [{"name": "ci", "key": new_key()}, {"name": "CI", "key": new_key()}]},
    {"state": "gone"},
    {"max_bugdet": 5},
]


def test_hostile_values() -> None:
    before = snapshot()
    answers, _ = modules([("litellm_tenants", {"tenants": [{"team": TEAM, **fields}]}) for fields in HOSTILE_TEAMS])
    for fields, answer in zip(HOSTILE_TEAMS, answers, strict=True):
        assert answer["failed"], fields
        assert not answer.get("changed")
        for key in fields.get("keys", []):
            assert key.get("key", "-")[3:20] not in answer["msg"] or "key" not in key
    assert snapshot() == before


@pytest.mark.long
def test_odd_text_is_kept_as_it_is(team: str) -> None:
    """What PostgreSQL and JSON can hold is nobody's business."""
    odd = {
        "who": 'O\'Brien "x"; DROP TABLE users; --',
        "\u540d\u524d": "\U0001f4a9 \u202e",
        "n": [1, 2.5, None, {"a": True}],
    }
    assert twice("litellm_team", name=team, metadata=odd)["team"]["metadata"] == odd


# --- the playbooks ------------------------------------------------------------------------------------------


def test_playbooks_apply_and_show() -> None:
    support.apply("tenants")
    again = support.apply("tenants", "--check", "--diff")
    assert again.total("changed") == 0
    shown = support.apply("tenants_report")
    assert shown.total("changed") == 0
    for run in (again, shown):
        assert re.search(r"^ +team, key +state +spend +tokens rpm/tpm/par used$", run.output, re.MULTILINE)
        assert max(map(len, re.findall(r"^ {8}(.*)$", run.output, re.MULTILINE))) <= 72
    wrong = support.play("tenants", variables={"serving_tenants": [{"team": TEAM, "max_bugdet": 5}]})
    assert wrong.code != 0
    assert "do you mean max_budget?" in wrong.output
    assert wrong.total("changed") == 0
