# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The checks of serving_tenants, the keys from the secrets folder, and the report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.llmfleet.serving.plugins.module_utils import _tenants
from ansible_collections.llmfleet.serving.plugins.modules import litellm_tenants
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/litellm"
RunPlaybook = Callable[..., subprocess.CompletedProcess[str]]
KEY = "sk-0123456789-abcdefghij"
OTHER = "sk-0123456789-ABCDEFGHIJ"
NOW = datetime(2026, 11, 21, 20, 0, tzinfo=timezone.utc)


def team(**fields: Any) -> list[dict[str, Any]]:
    return [{"team": "research", **fields}]


def key(**fields: Any) -> list[dict[str, Any]]:
    return team(keys=[{"name": "ci", "key": KEY, **fields}])


def declare(folder: Path, variables: dict[str, Any]) -> None:
    """In the inventory of run_playbook's first host."""
    (folder / "inventory/host_vars").mkdir(parents=True)
    (folder / "inventory/host_vars/host1.yml").write_text(json.dumps(variables))


def test_what_is_right_has_no_problems() -> None:
    tenants = [
        {
            "team": "research",
            "models": ["qwen"],
            "max_budget": 50,
            "budget_duration": "30d",
            "rpm_limit": 600,
            "tpm_limit": "200000",  # as a template of Ansible's makes it
            "max_parallel_requests": 20,
            "metadata": {"cost_centre": "4711"},
            "state": "present",
            "keys": [
                {"name": "ci", "key": KEY, "max_budget": 60, "budget_duration": "3mo", "models": ["qwen"]},
                {"name": "lab", "state": "blocked"},
            ],
        },
        {"team": "sales.eu"},
        {"team": "old", "state": "absent"},
    ]
    assert _tenants.inventory_problems(tenants, ["qwen", "tiny"]) == []
    assert _tenants.inventory_problems([]) == []


@pytest.mark.parametrize(
    ("tenants", "problem"),
    [
        (None, "serving_tenants is empty (null): write [], or declare a team."),
        ("research", "serving_tenants is 'research': write a list"),
        ({"research": {}}, "serving_tenants is a dictionary"),
        (["research"], "serving_tenants[0] is 'research'"),
        ([{}], "serving_tenants[0]: team is not set"),
        (team(max_bugdet=5), "has 'max_bugdet', which is no field of it: do you mean max_budget?"),
        (team(zzz=5), "has 'zzz', which is no field of it: use team, keys"),
        (team(keys={"ci": KEY}), "keys is a dictionary"),
        (team(keys=[KEY]), "keys[0] is no key with its fields"),
        (team(keys=[{}]), "keys[0]: name is not set"),
        ([{"team": 5}], "team is 5, which is no text"),
        ([{"team": ""}], "team has 0 characters"),
        ([{"team": "x" * 65}], "team has 65 characters"),
        ([{"team": "a b"}], "which has SPACE"),
        ([{"team": "a/b"}], "which has a /"),
        ([{"team": ".a"}], "which has a . at the beginning"),
        ([{"team": "a..b"}], "no two dots"),
        ([{"team": "rese\u0430rch"}], "which has CYRILLIC SMALL LETTER A"),
        ([{"team": "research\n"}], "which has the character U+000A"),
        (team() + team(), "has the team 'research' twice"),
        ([*team(), {"team": "Research"}], "differ by case alone"),
        (team(keys=[{"name": "a", "key": KEY}, {"name": "A", "key": OTHER}]), "has the name of"),
        (team(keys=[{"name": "a", "key": KEY}, {"name": "b", "key": KEY}]), "has the same key as"),
        (
            [{"team": "a_b", "keys": [{"name": "c"}]}, {"team": "a", "keys": [{"name": "b_c"}]}],
            "in one file, key_a_b_c",
        ),
        (team(state="gone"), "state is 'gone': use present, blocked, absent"),
        (team(max_budget=-1), "max_budget is -1: use more than 0"),
        (team(max_budget=0), "to let nothing through, use state: blocked"),
        (team(max_budget=float("nan")), "max_budget is nan, which is no number"),
        (team(max_budget=float("inf")), "max_budget is inf, which is no number"),
        (team(max_budget=1e12), "use at most 1000000000"),
        (team(max_budget=True), "max_budget is True, which is no number"),
        (team(max_budget="much"), "max_budget is 'much', which is no number"),
        (team(rpm_limit=1.5), "write a whole number"),
        (team(rpm_limit=10**400), "which is no number"),
        (team(max_parallel_requests=[]), "max_parallel_requests is a list"),
        (team(budget_duration="30d"), "budget_duration is 30d without a max_budget"),
        (team(max_budget=1, budget_duration="1y"), "budget_duration is '1y': write 30d"),
        (team(max_budget=1, budget_duration="0d"), "budget_duration is '0d'"),
        (team(max_budget=1, budget_duration="4000d"), "at most ten years"),
        (team(max_budget=1, budget_duration=30), "budget_duration is 30"),
        (team(models=[]), "models is empty"),
        (team(models="qwen"), "models is 'qwen': write a list"),
        (team(models=["qwen", "qwen"]), "has a name twice"),
        (team(models=["qwem"]), "do you mean qwen?"),
        (team(metadata=[]), "metadata is a list"),
        (team(metadata={1: 2}), "metadata is a dictionary: write names"),
        (team(metadata={"x": float("nan")}), "a value that JSON has not"),
        (team(metadata={"x": "y" * 9000}), "use at most 8192"),
        (team(metadata={"x": "\0"}), "a NUL character"),
        (team(metadata={"tags": []}), "metadata has tags, which is a setting of LiteLLM"),
        (key(key="0123456789-abcdefghij"), "does not begin with sk-"),
        (key(key="sk-short"), "key has 8 characters"),
        (key(key=f"{KEY}\r\nX: y"), "a character that is not one of"),
        (key(key=f"{KEY}\u0430"), "a character that is not one of"),
        (key(key="sk-aaaaaaaaaaaaaaaaaaaaaaa"), "fewer than 8 different"),
        (key(key="sk-" + KEY * 20), "make one of 20 to 256"),
        (key(key=12345678901234567890), "key is no text"),
        (team(max_budget=5, keys=[{"name": "a", "max_budget": 6}]), "and the team's is 5, which ends first"),
        (team(models=["qwen"], keys=[{"name": "a", "models": ["tiny"]}]), "which the team may not use"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_problems_name_the_place_and_the_remedy(tenants: Any, problem: str) -> None:
    found = _tenants.inventory_problems(tenants, ["qwen", "tiny"])
    assert any(problem in each for each in found), found
    for secret in (KEY, OTHER, "12345678901234567890", "0123456789-abc"):
        assert secret not in str(found)


# --- with the variables that they hang on ---------------------------------------------------------------------

PRICED = {"input": 1, "output": 2}


@pytest.mark.parametrize(
    ("tenants", "prices", "problem"),
    [
        (team(max_budget=50), {"qwen": PRICED, "tiny": PRICED}, ""),
        (team(max_budget=50), {"qwen": PRICED, "tiny": {"input": 0, "output": 0}}, ""),
        (team(max_budget=50, models=["qwen"]), {"qwen": PRICED}, ""),
        (team(), {}, ""),
        (team(max_budget=50, state="absent"), {}, ""),
        (team(keys=[{"name": "ci", "max_budget": 5, "state": "absent"}]), {}, ""),
        (team(models=["qwen"], keys=[{"name": "ci", "max_budget": 5}]), {"qwen": PRICED}, ""),
        (
            team(max_budget=50),
            {"tiny": PRICED},
            "serving_tenants[0] (research): max_budget is 50, and qwen has no price in litellm_prices: "
            "give it one, or {input: 0, output: 0} if it is free.",
        ),
        (
            team(max_budget=50, keys=[{"name": "ci", "max_budget": 5}]),
            {},
            "serving_tenants[0] (research): max_budget is 50, and qwen, tiny have no price in litellm_prices: "
            "give each one, or {input: 0, output: 0} if it is free.",
        ),
        (
            team(keys=[{"name": "a"}, {"name": "ci", "max_budget": 5, "models": ["tiny"]}]),
            {"qwen": PRICED},
            "serving_tenants[0] (research).keys[1] (ci): max_budget is 5, and tiny has no price in litellm_prices: "
            "give it one, or {input: 0, output: 0} if it is free.",
        ),
    ],
)
def test_budgets_are_over_models_with_prices(
    tenants: list[dict[str, Any]], prices: dict[str, Any], problem: str
) -> None:
    assert _tenants.inventory_problems(tenants, ["qwen", "tiny"], prices) == ([problem] if problem else [])


def test_overlap_is_checked_under_its_own_name() -> None:
    assert _tenants.inventory_problems(team(), [], {}, "86400") == []
    (problem,) = _tenants.inventory_problems(team(), [], {}, -1)
    assert problem.startswith("serving_tenants_overlap is -1: use 0 to ")


CHECK = [{"ansible.builtin.include_tasks": str(ROLE / "tasks/tenants_preflight.yml")}]
FILES = [str(ROLE.parent / name) for name in ("litellm/defaults/main.yml", "litellm/vars/main.yml")]
LOCKED_OUT = (
    "nginx_keys is set, and with serving_tenants nginx lets in the tenants' keys alone: declare these clients as"
)
WRONG = {
    "serving_tenants": [{"team": "research", "max_budget": 5}],
    "serving_tenants_overlap": -1,
    "litellm_models": [{"model": "qwen", "servers": ["h:1"]}],
}


@pytest.mark.parametrize(
    ("inventory", "says"),
    [
        ({"serving_tenants": team()}, []),
        ({"nginx_keys": [{"name": "a", "key": KEY}]}, []),
        ({"serving_tenants": [], "nginx_keys": [{"name": "a", "key": KEY}]}, []),
        ({"serving_tenants": team(), "nginx_keys": [{"name": "a", "key": KEY}]}, [LOCKED_OUT]),
        ({"serving_tenants": None}, ["serving_tenants is empty (null): write [], or declare a team."]),
        (WRONG, ["serving_tenants_overlap is -1: use", "(research): max_budget is 5, and qwen has no price"]),
    ],
)
def test_tenants_are_checked_with_what_the_inventory_says(
    run_playbook: RunPlaybook, tmp_path: Path, inventory: dict[str, Any], says: list[str]
) -> None:
    """The role nginx has nginx_keys by default, and with tenants they are theirs: those are not meant."""
    declare(tmp_path, inventory)
    own = {name: inventory[name] for name in ("litellm_models",) if name in inventory}
    theirs = {"nginx_keys": "{{ litellm_keys }}"} if "nginx_keys" not in inventory else {}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars_files": FILES,
        "vars": theirs,
        "tasks": [{**CHECK[0], "vars": own}],
    }
    done = run_playbook([play])
    assert (done.returncode == 0) == (not says), done.stdout
    for sentence in says:
        assert sentence in done.stdout
    assert KEY not in done.stdout


@pytest.mark.parametrize("prune", [True, "true", "YES", 1, False, "no", 0])
def test_prune_is_a_switch(prune: Any) -> None:
    assert _tenants.inventory_problems(team(), prune=prune) == []


def test_prune_that_is_none_or_deletes_all_is_refused() -> None:
    assert _tenants.inventory_problems(team(), prune="maybe") == [
        "serving_tenants_prune is 'maybe': write true or false."
    ]
    (problem,) = _tenants.inventory_problems([], prune="true")
    assert problem.startswith("serving_tenants_prune is true and serving_tenants is empty, which would delete every")
    assert _tenants.inventory_problems([]) == []


def test_a_little_is_not_nothing() -> None:
    assert [_tenants._money(value) for value in (0, 0.000001, 0.0049, 0.006, 0.27)] == [
        "0",
        "<0.01",
        "<0.01",
        "0.01",
        "0.27",
    ]


def test_tenants_are_checked_before_anything_and_before_they_are_applied() -> None:
    before = yaml.safe_load((ROOT / "playbooks/tasks/litellm_preflight.yml").read_text())
    assert "tenants_preflight" in [task["ansible.builtin.include_role"].get("tasks_from") for task in before]
    first = yaml.safe_load((ROLE / "tasks/tenants.yml").read_text())[0]
    assert first["ansible.builtin.import_tasks"] == "tenants_preflight.yml"


def test_specs_tell_of_all_fields_as_the_module_does() -> None:
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["tenants"]["options"]
    fields = options["serving_tenants"]["options"]
    assert set(fields) == set(_tenants.TEAM_FIELDS)
    assert set(fields["keys"]["options"]) == set(_tenants.KEY_FIELDS)
    module = yaml.safe_load(litellm_tenants.DOCUMENTATION)["options"]["tenants"]["suboptions"]

    def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        for name, option in ours.items():
            for what in ("type", "elements", "required", "choices"):
                assert option.get(what) == theirs[name].get(what), name
            same(option.get("options", {}), theirs[name].get("suboptions", {}))

    same(fields, module)
    assert options["serving_tenants_overlap"]["description"].startswith(f"Seconds, V(0) to V({_tenants.OVERLAP_MAX}),")


def apply(run_playbook: RunPlaybook, *arguments: str) -> str:
    """The role's tasks_from: tenants, where no LiteLLM answers; and all that is said."""
    models = [{"model": "qwen", "servers": ["127.0.0.1:8000"]}]
    given = {"litellm_models": models, "litellm_server": "127.0.0.1:1", "litellm_master_key": "sk-master-0123456789abc"}
    task = {"ansible.builtin.include_role": {"name": "llmfleet.serving.litellm", "tasks_from": "tenants"}}
    done = run_playbook([{"hosts": "all", "gather_facts": False, "vars": given, "tasks": [task]}], "-vvv", *arguments)
    assert done.returncode == 2, done.stdout
    said = f"{done.stdout}{done.stderr}"
    assert KEY not in said
    assert "Validation of arguments" not in said
    return " ".join(said.split())


def test_what_is_wrong_is_said_by_the_role_and_not_by_ansible(run_playbook: RunPlaybook, tmp_path: Path) -> None:
    wrong = team(max_budget="much", state="gone", keys=[KEY, {"name": 5, "key": [KEY]}])
    declare(tmp_path, {"serving_tenants": wrong, "serving_tenants_overlap": "soon", "serving_tenants_prune": "perhaps"})
    said = apply(run_playbook)
    for sentence in (
        "serving_tenants[0] (research): max_budget is 'much', which is no number",
        "serving_tenants[0] (research): state is 'gone': use present, blocked, absent.",
        "serving_tenants[0] (research).keys[0] is no key with its fields: write it as name: ci.",
        "serving_tenants[0] (research).keys[1]: key is no text: put it into quotes.",
        "serving_tenants_overlap is 'soon': use 0 to 31622400 seconds.",
        "serving_tenants_prune is 'perhaps': write true or false.",
    ):
        assert sentence in said


def test_keys_may_come_from_a_vault(run_playbook: RunPlaybook, tmp_path: Path) -> None:
    vaulted = VaultLib([("default", VaultSecret(b"secret"))]).encrypt(KEY).decode()
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "inventory/host_vars").mkdir(parents=True)
    (tmp_path / "inventory/host_vars/host1.yml").write_text(
        "serving_tenants: [{team: a, keys: [{name: a, key: '{{ vault_a }}'}, {name: b, key: '{{ vault_a }}b'}]}]\n"
        "vault_a: !vault |\n" + "".join(f"  {line}\n" for line in vaulted.splitlines())
    )
    assert "LiteLLM at http://127.0.0.1:1 cannot be reached" in apply(
        run_playbook, "--vault-password-file", str(tmp_path / "password")
    )


@pytest.mark.parametrize(
    ("tenants", "says"),
    [
        (None, "serving_tenants is empty (null): write [], or declare a team."),
        ({"research": {}}, "serving_tenants is a dictionary: write a list of teams, or [] for none."),
        (5, "serving_tenants is 5: write a list of teams, or [] for none."),
    ],
)
def test_tenants_that_are_no_list_are_said_to_be(
    run_playbook: RunPlaybook, tmp_path: Path, tenants: Any, says: str
) -> None:
    declare(tmp_path, {"serving_tenants": tenants})
    (tmp_path / "inventory/groups").write_text("[engines]\nhost1\n[gateways]\nhost1\n")
    done = run_playbook("- ansible.builtin.import_playbook: llmfleet.serving.instances\n")
    assert done.returncode == 2
    assert says in done.stdout
    assert "Ask the inventory what runs where" not in done.stdout


@pytest.mark.parametrize(("own", "used"), [("", KEY), (OTHER, OTHER)])
def test_verification_takes_a_tenants_key_unless_the_inventory_has_one(
    run_playbook: RunPlaybook, tmp_path: Path, own: str, used: str
) -> None:
    declare(tmp_path, {"serving_tenants": key(), "serving_backends": [], **({"nginx_verify_key": own} if own else {})})
    choose = yaml.safe_load((ROOT / "playbooks/verify.yml").read_text())[1]["tasks"][0]
    tasks = [choose, {"ansible.builtin.assert": {"that": f"nginx_verify_key == '{used}'"}}]
    done = run_playbook([{"hosts": "all", "gather_facts": False, "tasks": tasks}])
    assert done.returncode == 0, done.stdout


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [*("team", "name", "key", "keys", "models", "max_budget", "budget_duration", "rpm_limit", "metadata", "state")]
)


@given(anything | st.lists(st.dictionaries(fields, anything | st.lists(st.dictionaries(fields, anything)))))
def test_anything_at_all_ends_in_sentences(tenants: Any) -> None:
    for problem in _tenants.inventory_problems(tenants, ["qwen"], {}):
        assert problem.startswith("serving_tenants")
        assert problem.isascii()
        assert problem.isprintable()
        assert len(problem) < 600


def test_keys_come_from_the_secrets_folder() -> None:
    tenants = [
        {
            "team": "sales.eu",
            "keys": [{"name": "bot"}, {"name": "own", "key": KEY}, {"name": "gone", "state": "absent"}],
        },
        {"team": "old", "state": "absent", "keys": [{"name": "x"}]},
        {"team": "none"},
    ]
    assert _tenants.secret_names(tenants) == ["key_sales-eu_bot"]
    whole = _tenants.with_keys(tenants, {"key_sales-eu_bot": OTHER})
    assert [each.get("key") for each in whole[0]["keys"]] == [OTHER, KEY, None]
    assert [each["keys"] for each in whole[1:]] == [[{"name": "x"}], []]
    assert _tenants.names(tenants)[:3] == ["sales.eu", "sales.eu/bot", "sales.eu/own"]
    assert _tenants.names(tenants, absent=True) == ["sales.eu/gone", "old", "old/x"]


# --- the report ---------------------------------------------------------------------------------------------

LIMITS = {"max_budget": None, "budget_duration": None, "rpm_limit": None, "tpm_limit": None}


def report() -> dict[str, Any]:
    teams = [
        {"name": "research", "blocked": False, "spend": 12.345, "declared": True, **LIMITS},
        {"name": "a-team-with-quite-a-long-name-indeed", "blocked": True, "spend": 0, "declared": False, **LIMITS},
    ]
    teams[0] |= {"max_budget": 50.0, "budget_duration": "30d", "rpm_limit": 600, "tpm_limit": 200_000}
    base = {"blocked": False, "expires": None, "spend": 0, "tokens": 0, "last_used": None, "declared": True, **LIMITS}
    soon, past = NOW + timedelta(hours=23, minutes=30), NOW - timedelta(seconds=1)
    keys = [
        {**base, "name": "research/ci", "spend": 5, "max_budget": 5.0, "tokens": 1_234_567, "team": "research"},
        {**base, "name": "research/ci@0123abcd", "expires": soon.isoformat(), "team": "research"},
        {**base, "name": "research/old", "expires": past.isoformat(), "team": "research"},
        {**base, "name": "sk-...aB\x1b[31m", "declared": False, "team": None, "max_parallel_requests": 4},
    ]
    keys[0]["last_used"] = (NOW - timedelta(minutes=3)).isoformat().replace("+00:00", "Z")
    return {"teams": teams, "keys": keys, "now": NOW.isoformat(), "usage_days": 30}


def test_table() -> None:
    assert _tenants.table(report()) == [
        "team, key                state    spend                 tokens rpm/tpm/par used",
        "-" * 80,
        "research                 active   12.35/50 30d   [#...] 1.2M   600/200k/-  3m",
        "  ci                     used up  5/5            [####] 1.2M               3m",
        "  ci@0123abcd            ends 23h 0                     0                  never",
        "  old                    expired  0                     0                  never",
        "a-team-with-quite-a-long-name-indeed",
        "                         blocked  0                                        never",
        "(no team)",
        "  sk-...aB?[31m          stranger 0                     0      -/-/4       never",
        "(tokens: of the last 30 days)",
    ]


def test_table_shows_what_is_missing() -> None:
    lines = _tenants.table({**report(), "missing": ["apps", "research/lab", "apps/chat"]})
    assert [(line[:22].strip(), line[22:].strip()) for line in lines if "missing" in line or "old" in line] == [
        ("old", "expired  0                     0                  never"),
        ("lab", "missing"),
        ("apps", "missing"),
        ("chat", "missing"),
    ]
    nothing = {"teams": [], "keys": [], "missing": ["apps"]}
    assert _tenants.table(nothing)[2:] == ["apps                     missing"]


def test_table_says_where_there_is_nothing() -> None:
    assert _tenants.table({"teams": [], "keys": []})[-1] == "LiteLLM has no teams and no keys."


@given(st.integers(72, 200), st.text(max_size=90), st.floats(0, 1e15), st.integers(0, 10**15))
def test_no_line_of_the_table_is_longer(width: int, name: str, spend: float, tokens: int) -> None:
    whole = {**report(), "missing": [name, f"research/{name}"]}
    whole["teams"][0] |= {"name": name, "spend": spend, "max_budget": 1e9, "tpm_limit": 10**11}
    whole["keys"][0] |= {"team": name, "tokens": tokens, "last_used": "1970-01-01T00:00:00Z"}
    lines = _tenants.table(json.loads(json.dumps(whole)), width)
    assert all(len(line) <= width and line.isascii() and (line.isprintable() or not line) for line in lines)


def test_probe_takes_the_key_that_may_use_the_most() -> None:
    """Of those that are neither blocked nor absent, and within what their team may use."""
    tenants = [
        {"team": "a", "state": "blocked", "keys": [{"name": "all", "key": "sk-blocked-team"}]},
        {
            "team": "b",
            "models": ["qwen", "llama"],
            "keys": [
                {"name": "one", "key": "sk-one", "models": ["qwen"]},
                {"name": "gone", "key": "sk-gone", "state": "absent"},
                {"name": "both", "key": "sk-both"},
            ],
        },
    ]
    assert _tenants.probe(tenants, ["qwen", "llama", "other"]) == {"key": "sk-both", "models": ["qwen", "llama"]}
    assert _tenants.probe(tenants[:1], ["qwen"]) == {"key": "", "models": []}
