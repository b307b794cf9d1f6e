# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""LiteLLM's teams and keys: what has to change, in which order, and what happens where something goes wrong.

The LiteLLM here is a stand-in of a few lines, for the logic and the error paths alone; how the modules get on with the
real one, molecule/tenants tests.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

litellm = importlib.import_module("ansible_collections.llmfleet.serving.plugins.module_utils._litellm")

MASTER = "sk-master-0123456789-abcdefgh"
NOW = datetime(2026, 11, 21, 20, 0, tzinfo=timezone.utc)
DAY = 86400


def value(number: int) -> str:
    return f"sk-{number:04d}-abcdefghijklmnopqrstuvwxyz"


# --- a stand-in for LiteLLM's management API ----------------------------------------------------------------


@dataclass
class LiteLLM:
    """Teams and keys as rows, and what LiteLLM does with a request. ``fails`` may answer in its place."""

    teams: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    now: datetime = NOW
    fails: Callable[[str, dict[str, Any]], tuple[int, Any] | None] = lambda path, body: None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.calls.append((path, body))
        if answer := self.fails(path, body):
            return answer
        return getattr(self, path.strip("/").replace("/", "_"))(dict(body))

    def team_new(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["team_id"] in self.teams:
            return 400, {"error": {"message": f"Team id = {body['team_id']} already exists."}}
        self.teams[body["team_id"]] = {"spend": 0.0, **body}
        return 200, {}

    def team_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.teams[body["team_id"]].update(body)
        return 200, {}

    def team_delete(self, body: dict[str, Any]) -> tuple[int, Any]:
        for name in body["team_ids"]:
            del self.teams[name]
            self.keys = {token: row for token, row in self.keys.items() if row.get("team_id") != name}
        return 200, {}

    def _alias_taken(self, body: dict[str, Any], token: str) -> bool:
        alias = body.get("key_alias")
        return alias is not None and any(r["key_alias"] == alias and r["token"] != token for r in self.keys.values())

    def _expiry(self, body: dict[str, Any]) -> None:
        if "duration" in body:
            duration = body.pop("duration")
            end = duration and self.now + timedelta(seconds=int(duration.rstrip("s")))
            body["expires"] = end and end.isoformat()

    def key_generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        token = litellm.token_of(body.pop("key"))
        if self._alias_taken(body, token) or token in self.keys:
            return 400, {"error": {"message": f"Key with alias '{body['key_alias']}' already exists."}}
        self._expiry(body)
        self.keys[token] = {"token": token, "spend": 0.0, **body}
        return 200, {}

    def key_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        token = body.pop("key")
        if self._alias_taken(body, token):
            return 400, {"error": {"message": f"Key with alias '{body['key_alias']}' already exists."}}
        self._expiry(body)
        self.keys[token].update(body)
        return 200, {}

    def key_delete(self, body: dict[str, Any]) -> tuple[int, Any]:
        for token in body["keys"]:
            del self.keys[token]
        return 200, {}

    def get(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        if answer := self.fails(path, query):
            return answer
        if path == "/team/daily/activity/aggregated/keys":
            first, size = int(query["offset"]), int(query["limit"])
            rows = [{"api_key": token, "metrics": {"total_tokens": 7}} for token in self.keys]
            return 200, {"api_keys": rows[first : first + size], "total_api_keys": len(rows)}
        rows = list(self.teams.values()) if path == "/v2/team/list" else list(self.keys.values())
        rows = [row for row in rows if query.get("team_id") in (None, row.get("team_id"))]
        rows = [row for row in rows if query.get("key_hash") in (None, row.get("token"))]
        size = int(query.get("page_size") or query["size"])
        assert size <= 100
        first = (int(query["page"]) - 1) * size
        what = "teams" if path == "/v2/team/list" else "keys"
        return 200, {what: rows[first : first + size], "total_pages": -(-len(rows) // size)}

    def found(self) -> Any:
        return litellm.Found(
            {row["team_id"]: litellm.found_team(row) for row in self.teams.values()},
            {row["token"]: litellm.found_key(row) for row in self.keys.values()},
        )

    def apply(
        self, tenants: list[dict[str, Any]], *, overlap: int = DAY, prune: bool = False
    ) -> tuple[list[str], list[str]]:
        """What was done, and what of it LiteLLM did not take."""
        changes, problems = litellm.plan(
            litellm.declared(tenants), self.found(), now=self.now, overlap=overlap, prune=prune
        )
        assert problems == []

        def send(change: Any) -> None:
            status, answer = self.post(change.path, change.body)
            if status != 200:
                raise litellm.LiteLLMError(str(answer))

        outcomes = litellm.apply(changes, send, workers=1)
        return [str(change) for change in changes], [outcome.error for outcome in outcomes if outcome.error]

    def aliases(self) -> dict[str, str]:
        return {row["key_alias"]: token for token, row in self.keys.items()}


def tenants(*keys: dict[str, Any], **team: Any) -> list[dict[str, Any]]:
    return [{"team": "research", **team, "keys": list(keys)}]


CI = {"name": "ci", "key": value(1)}

# --- what has to change -------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "a-b", "B.c", "x" * 64])
limits = st.fixed_dictionaries(
    {},
    optional={
        "models": st.lists(st.sampled_from(["tiny", "qwen"]), min_size=1, unique=True),
        "max_budget": st.floats(0.01, 1e9),
        "budget_duration": st.sampled_from(["30d", "1mo", "90s"]),
        "rpm_limit": st.integers(1, 10**6),
        "tpm_limit": st.integers(1, 10**9),
        "max_parallel_requests": st.integers(1, 100),
        "metadata": st.dictionaries(st.sampled_from(["cost", "who"]), st.text(max_size=5)),
        "state": st.sampled_from(["present", "present", "blocked", "absent"]),
    },
)


@st.composite
def inventories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Tenants without problems: names are unique, and so are the values of keys."""
    teams = draw(st.lists(names, unique=True, max_size=3))
    values = iter(draw(st.permutations(range(12))))
    return [
        {
            "team": team,
            **draw(limits),
            "keys": [
                {"name": name, "key": value(next(values)), **draw(limits)}
                for name in draw(st.lists(names, unique=True, max_size=3))
            ],
        }
        for team in teams
    ]


@given(inventories(), st.sampled_from([0, 60, DAY]))
def test_what_was_applied_is_so(wanted: list[dict[str, Any]], overlap: int) -> None:
    server = LiteLLM()
    assert server.apply(wanted, overlap=overlap)[1] == []
    assert server.apply(wanted, overlap=overlap) == ([], [])


@given(inventories(), inventories(), st.sampled_from([0, 60, DAY]), st.booleans())
def test_from_any_inventory_to_any_other(
    first: list[dict[str, Any]], second: list[dict[str, Any]], overlap: int, prune: bool
) -> None:
    """Keys change their values, names and teams, and trade places; and nothing is refused on the way."""
    server = LiteLLM()
    server.apply(first)
    assert server.apply(second, overlap=overlap, prune=prune and bool(second))[1] == []
    assert server.apply(second, overlap=overlap, prune=prune and bool(second)) == ([], [])
    there = server.aliases()
    for team in second:
        gone = team.get("state") == "absent"
        assert (team["team"] in server.teams) is not gone
        for key in team["keys"]:
            alias = f"{team['team']}/{key['name']}"
            if gone or key.get("state") == "absent":
                assert alias not in there
            else:
                assert there[alias] == litellm.token_of(key["key"])
                assert server.keys[there[alias]].get("expires") is None


@given(inventories(), inventories(), st.sampled_from([0, 60, DAY]), st.booleans())
def test_check_mode_foresees_what_litellm_will_have(
    first: list[dict[str, Any]], second: list[dict[str, Any]], overlap: int, prune: bool
) -> None:
    server = LiteLLM()
    server.apply(first)
    before = server.found()
    changes, _ = litellm.plan(litellm.declared(second), before, now=NOW, overlap=overlap, prune=prune)
    server.apply(second, overlap=overlap, prune=prune)
    assert litellm.foreseen(before, changes, NOW) == server.found()


@given(inventories(), inventories(), st.randoms())
def test_order_does_not_matter(first: list[dict[str, Any]], second: list[dict[str, Any]], random: Any) -> None:
    one, other = LiteLLM(), LiteLLM()
    one.apply(first)
    other.apply(first)
    mixed = [{**team, "keys": random.sample(team["keys"], len(team["keys"]))} for team in second]
    random.shuffle(mixed)
    one.apply(second)
    other.apply(mixed)
    assert (one.teams, one.keys) == (other.teams, other.keys)


@given(inventories(), inventories(), st.integers(0, 30))
def test_a_run_that_was_cut_short_is_mended_by_the_next(
    first: list[dict[str, Any]], second: list[dict[str, Any]], calls: int
) -> None:
    server = LiteLLM()
    server.apply(first)
    server.calls.clear()
    server.fails = lambda path, body: (500, "gone") if len(server.calls) > calls else None
    server.apply(second)
    server.fails = lambda path, body: None
    server.apply(second)
    assert server.apply(second) == ([], [])


@given(inventories())
def test_nothing_that_is_shown_holds_a_key(wanted: list[dict[str, Any]]) -> None:
    changes, _ = litellm.plan(litellm.declared(wanted), litellm.Found(), now=NOW, overlap=DAY)
    text = f"{changes} {[str(change) for change in changes]} {litellm.difference(changes)} {litellm.declared(wanted)}"
    assert "abcdefghijklmnopqrstuvwxyz" not in text


def test_rotation_takes_name_and_spend_and_leaves_the_old_key_a_while() -> None:
    server = LiteLLM()
    server.apply(tenants({**CI, "rpm_limit": 5}))
    old, new = litellm.token_of(value(1)), litellm.token_of(value(2))
    server.keys[old]["spend"] = 3.5
    rotated = tenants({"name": "ci", "key": value(2), "rpm_limit": 5})
    assert server.apply(rotated) == (["key research/ci: retire", "key research/ci: rotate"], [])
    assert server.keys[new]["spend"] == 3.5
    assert server.keys[new]["key_alias"] == "research/ci"
    assert server.keys[old]["key_alias"] == f"research/ci@{old[:8]}"
    assert litellm.time_of(server.keys[old]["expires"]) == NOW + timedelta(days=1)
    assert [key["sha256"] for key in litellm.accepted(server.found(), NOW)] == [new, old]
    # Nobody has declared it by this name, and it is no stranger all the same.
    assert litellm.undeclared(litellm.declared(rotated), server.found()) == ([], [])

    server.now += timedelta(hours=23)
    assert server.apply(rotated) == ([], [])
    server.now += timedelta(hours=2)
    assert [key["sha256"] for key in litellm.accepted(server.found(), server.now)] == [new]
    assert server.apply(rotated) == ([f"key research/ci@{old[:8]}: delete"], [])


def test_old_key_obeys_what_is_declared_for_the_key() -> None:
    server = LiteLLM()
    server.apply(tenants(CI))
    server.apply(tenants({"name": "ci", "key": value(2)}))
    server.apply(tenants({"name": "ci", "key": value(2), "state": "blocked", "rpm_limit": 3}))
    assert [(row["blocked"], row["rpm_limit"]) for row in server.keys.values()] == [(True, 3)] * 2
    assert litellm.accepted(server.found(), NOW) == []


def test_overlap_of_none_ends_all_old_keys() -> None:
    server = LiteLLM()
    server.apply(tenants(CI))
    server.apply(tenants({"name": "ci", "key": value(2)}))
    server.apply(tenants({"name": "ci", "key": value(3)}), overlap=0)
    assert set(server.keys) == {litellm.token_of(value(3))}


def test_shorter_overlap_holds_for_keys_that_were_rotated_before() -> None:
    server = LiteLLM()
    server.apply(tenants(CI))
    rotated = tenants({"name": "ci", "key": value(2)})
    server.apply(rotated)
    server.apply(rotated, overlap=600)
    assert litellm.time_of(server.keys[litellm.token_of(value(1))]["expires"]) == NOW + timedelta(seconds=600)


def test_rotation_that_is_taken_back_takes_the_spend_back() -> None:
    server = LiteLLM()
    server.apply(tenants(CI))
    server.apply(tenants({"name": "ci", "key": value(2)}))
    server.keys[litellm.token_of(value(2))]["spend"] = 9.0
    server.apply(tenants(CI))
    first = server.keys[litellm.token_of(value(1))]
    assert (first["key_alias"], first["expires"], first["spend"]) == ("research/ci", None, 9.0)


def test_strangers_are_reported_and_left_until_pruned() -> None:
    server = LiteLLM()
    server.team_new({"team_id": "4f6a", "team_alias": "made by hand"})
    server.key_generate({"key": value(8), "key_alias": None, "team_id": None})
    server.apply(tenants(CI))
    server.key_generate({"key": value(9), "key_alias": "research/by-hand", "team_id": "research"})
    before = json.dumps([server.teams, server.keys])
    assert server.apply(tenants(CI)) == ([], [])
    assert json.dumps([server.teams, server.keys]) == before
    teams, keys = litellm.undeclared(litellm.declared(tenants(CI)), server.found())
    assert ([team.name for team in teams], [key.alias for key in keys]) == (["4f6a"], ["", "research/by-hand"])
    server.apply(tenants(CI), prune=True)
    assert (set(server.teams), set(server.aliases())) == ({"research"}, {"research/ci"})


def test_what_is_declared_and_not_there_is_missing() -> None:
    server = LiteLLM()
    wanted = [
        *tenants(CI, {**CI, "name": "lab"}, {**CI, "name": "old", "state": "absent"}),
        {"team": "apps", "state": "blocked", "keys": [{"name": "chat"}]},
        {"team": "gone", "state": "absent", "keys": [{"name": "x"}]},
    ]
    everything = ["research", "apps", "research/ci", "research/lab", "apps/chat"]
    assert litellm.missing(litellm.declared(wanted), server.found()) == everything
    server.apply(tenants(CI))
    assert litellm.missing(litellm.declared(wanted), server.found()) == ["apps", "research/lab", "apps/chat"]


def test_alias_of_another_teams_key_is_not_taken_from_it() -> None:
    server = LiteLLM()
    server.key_generate({"key": value(9), "key_alias": "research/ci", "team_id": "other"})
    changes, (problem,) = litellm.plan(litellm.declared(tenants(CI)), server.found(), now=NOW, overlap=DAY)
    assert changes == []
    assert "research/ci belongs in LiteLLM to a key of the team other" in problem


def test_keys_of_blocked_and_missing_teams_are_not_accepted() -> None:
    server = LiteLLM()
    server.apply([{"team": "a", "state": "blocked", "keys": [{"name": "k", "key": value(1)}]}])
    server.key_generate({"key": value(2), "key_alias": "x", "team_id": "gone"})
    server.key_generate({"key": value(3), "key_alias": 'x"; drop\n', "team_id": None})
    (key,) = litellm.accepted(server.found(), NOW)
    assert key == {"name": f"key-{litellm.token_of(value(3))[:8]}", "sha256": litellm.token_of(value(3))}


def test_parallel_requests_of_a_team_are_those_of_each_key() -> None:
    (team,) = litellm.declared(tenants(CI, {**CI, "name": "b", "max_parallel_requests": 2}, max_parallel_requests=9))
    assert [key.fields["max_parallel_requests"] for key in team.keys] == [9, 2]
    assert "max_parallel_requests" not in team.fields


# --- the modules, where something goes wrong ----------------------------------------------------------------


@pytest.fixture
def server() -> LiteLLM:
    return LiteLLM()


@pytest.fixture
def url(server: LiteLLM) -> Iterator[str]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: Any) -> None:
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            with lock:
                status, content = self._authorized() or server.get(parts.path, query)
            self.answer(status, content)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, content = self._authorized() or server.post(self.path, body)
            self.answer(status, content)

        def _authorized(self) -> tuple[int, Any] | None:
            right = self.headers["Authorization"] == f"Bearer {MASTER}"
            return None if right else (401, {"error": {"message": f"Received: {self.headers['Authorization']}"}})

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


@pytest.fixture
def run(run_module: Callable[..., dict[str, Any]], url: str) -> Callable[..., dict[str, Any]]:
    def tenants_module(wanted: Any, *, check: bool = False, **options: Any) -> dict[str, Any]:
        arguments = {"url": url, "master_key": MASTER, "tenants": wanted, **options}
        return run_module("litellm_tenants", arguments, check=check)

    return tenants_module


def test_what_fails_is_named_and_the_rest_is_done(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    wanted = [{"team": f"t{n}", "keys": [{"name": "k", "key": value(n)}]} for n in range(5)]
    server.fails = lambda path, body: (
        (400, {"error": {"message": f"no luck with {body.get('key')}"}}) if body.get("key") == value(2) else None
    )
    answer = run(wanted)
    assert answer["failed"]
    assert answer["changed"]
    assert "Of 10 changes 9 are done and 1 are not. POST /key/generate ended with status 400: no luck" in answer["msg"]
    assert "(key t2/k: create)" in answer["msg"]
    assert value(2) not in json.dumps(answer)
    assert answer["missing"] == ["t2/k"]
    # nginx lets in those that LiteLLM has taken.
    assert [key["name"] for key in answer["accepted"]] == ["t0/k", "t1/k", "t3/k", "t4/k"]
    server.fails = lambda path, body: None
    answer = run(wanted)
    assert (answer["changes"], answer["missing"]) == (["key t2/k: create"], [])


def test_team_that_fails_keeps_its_keys_back(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    server.fails = lambda path, body: (500, "<html>broken</html>") if path == "/team/new" else None
    answer = run(tenants(CI))
    assert "POST /team/new ended with status 500: <html>broken</html> (see LiteLLM's journal, and" in answer["msg"]
    assert "Left, for research has failed (key research/ci: create)" in answer["msg"]
    assert not answer["changed"]
    assert server.keys == {}


def test_key_that_has_leaked_goes_whatever_else_has_failed(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    server.apply(tenants(CI))
    server.fails = lambda path, body: (500, "no") if path == "/team/new" else None
    answer = run([*tenants({"name": "ci", "key": value(3)}), {"team": "other", "keys": []}], overlap=0)
    assert "POST /team/new ended with status 500" in answer["msg"]
    assert server.aliases() == {"research/ci": litellm.token_of(value(3))}
    assert [key["sha256"] for key in answer["accepted"]] == [litellm.token_of(value(3))]


def test_key_is_deleted_though_its_team_cannot_be_changed(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    server.apply(tenants(CI))
    server.fails = lambda path, body: (500, "no") if path == "/team/update" else None
    assert run([{"team": "research", "max_budget": 7, "keys": [{**CI, "state": "absent"}]}])["failed"]
    assert server.keys == {}


def test_no_team_is_deleted_once_something_has_failed(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    """Here a key moves to a team that cannot be made, and the team that it is still in is to go."""
    server.apply([{"team": "old", "keys": [CI, {"name": "b", "key": value(2)}]}])
    moved = [{"team": "old", "state": "absent"}, {"team": "new", "keys": [CI]}]
    server.fails = lambda path, body: (500, "no") if path == "/team/new" else None
    answer = run(moved)
    assert "Left, for no team is deleted once something has failed (team old: delete)" in answer["msg"]
    assert set(server.keys) == {litellm.token_of(value(1)), litellm.token_of(value(2))}
    server.fails = lambda path, body: None
    assert "failed" not in run(moved)
    assert server.aliases() == {"new/ci": litellm.token_of(value(1))}


def test_litellm_that_goes_in_between_has_what_it_took(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    server.apply(tenants(CI))
    server.calls.clear()
    server.fails = lambda path, body: (500, "gone") if "/key/generate" in dict(server.calls) else None
    answer = run([*tenants(CI, state="blocked"), {"team": "t", "keys": [{"name": "k", "key": value(2)}]}])
    assert "key t/k: create" in answer["msg"]
    assert answer["accepted"] == []


def test_check_mode_accepts_what_would_be_accepted(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    server.apply(tenants(CI))
    answer = run(tenants({**CI, "state": "absent"}, {"name": "b", "key": value(2)}), check=True)
    assert answer["accepted"] == [{"name": "research/b", "sha256": litellm.token_of(value(2))}]
    assert server.aliases() == {"research/ci": litellm.token_of(value(1))}


def test_what_litellm_does_not_keep_is_an_error(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    """As with an upper bound in its configuration."""

    def bounded(path: str, body: dict[str, Any]) -> None:
        if path == "/team/new":
            body["max_budget"] = 10.0

    server.fails = bounded
    answer = run(tenants(max_budget=50))
    assert answer["failed"]
    assert 'team research: update {"max_budget": 50.0}' in answer["msg"]


def test_wrong_master_key(run: Callable[..., dict[str, Any]]) -> None:
    answer = run([], master_key="sk-wrong-0123456789")
    assert "refuses the master key" in answer["msg"]
    assert "sk-wrong-0123456789" not in json.dumps(answer)


@pytest.mark.parametrize("content", ["<html>hello</html>", "[]", '{"detail": "x"}'])
def test_answers_of_something_else(run: Callable[..., dict[str, Any]], server: LiteLLM, content: str) -> None:
    server.fails = lambda path, body: (200, content)
    assert "was answered, but" in run([])["msg"]


def test_without_litellm_a_run_fails_and_a_check_supposes_a_new_one(
    run_module: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = {"url": "http://127.0.0.1:1", "master_key": MASTER, "tenants": tenants(CI)}
    answer = run_module("litellm_tenants", arguments)
    assert "cannot be reached" in answer["msg"]
    answer = run_module("litellm_tenants", arguments, check=True)
    assert answer["changes"] == ["team research: create", "key research/ci: create"]


def test_litellm_that_does_not_answer_is_not_asked_again(server: LiteLLM) -> None:
    calls = []

    def send(change: Any) -> None:
        calls.append(change)
        raise litellm.LiteLLMError("gone", unreachable=True)

    changes, _ = litellm.plan(litellm.declared(tenants(CI)), litellm.Found(), now=NOW, overlap=DAY)
    outcomes = litellm.apply(changes, send)
    assert len(calls) == 1
    assert [outcome.error for outcome in outcomes] == ["gone", "gone"]


def test_connection_that_was_idle_is_not_used_again(server: LiteLLM, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM may have closed it: while others wrote, the one that reads has waited."""
    client = litellm.Client(url, MASTER)
    litellm.read(client)
    first = client._connection()
    assert client._connection() is first
    monkeypatch.setattr(litellm, "IDLE_MAX", 0)
    assert client._connection() is not first
    litellm.read(client)


def test_pages_are_read_to_the_end(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    wanted = [{"team": f"t{n}", "keys": [{"name": "k", "key": value(n)}]} for n in range(205)]
    assert run(wanted)["changed"]
    answer = run(wanted)
    assert not answer["changed"]
    assert len(answer["teams"]) == len(answer["accepted"]) == 205
    assert {key["tokens"] for key in answer["keys"]} == {7}


def test_litellm_without_the_count_of_tokens(run: Callable[..., dict[str, Any]], server: LiteLLM) -> None:
    server.fails = lambda path, body: (404, {"detail": "Not Found"}) if "daily" in path else None
    answer = run(tenants(CI))
    assert [key["tokens"] for key in answer["keys"]] == [None]


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        ([], {"prune": True}, "would delete every team"),
        ([], {"overlap": -1}, "overlap is -1"),
        ([], {"usage_days": 1000}, "usage_days is 1000"),
        (tenants({"name": "ci"}), {}, "research/ci is not there yet and has no value"),
        (tenants({"name": "ci", "key": MASTER}), {}, "master key"),
        (tenants(CI, {**CI, "name": "b"}), {}, "has the same key"),
        (tenants(max_budget="nan"), {}, "max_budget is nan"),
        ([], {"url": "127.0.0.1:4000"}, "write it as http://"),
    ],
)
def test_refusals(
    run: Callable[..., dict[str, Any]], server: LiteLLM, wanted: Any, options: dict[str, Any], message: str
) -> None:
    answer = run(wanted, **options)
    assert message in answer["msg"]
    assert server.calls == []


def test_info_tells_strangers_and_what_is_missing(
    run: Callable[..., dict[str, Any]], run_module: Callable[..., dict[str, Any]], url: str
) -> None:
    run(tenants(CI))
    access = {"url": url, "master_key": MASTER, "usage_days": 0}
    names = ["research", "research/lab", "research/old", "gone", "gone/x"]
    found = run_module("litellm_tenants_info", {**access, "names": names, "absent": ["research/old", "gone", "gone/x"]})
    assert (found["undeclared"], found["missing"]) == (["key research/ci"], ["research/lab"])
    found = run_module("litellm_tenants_info", access)
    assert (found["undeclared"], found["missing"]) == ([], [])


def test_single_modules(run_module: Callable[..., dict[str, Any]], server: LiteLLM, url: str) -> None:
    access = {"url": url, "master_key": MASTER}
    team = {**access, "name": "research", "max_budget": 5}
    assert run_module("litellm_team", team, check=True)["changed"]
    assert run_module("litellm_team", team)["team"]["max_budget"] == 5
    assert not run_module("litellm_team", team)["changed"]
    assert run_module("litellm_team", {**access, "name": "research", "rpm_limit": 3})["team"]["max_budget"] == 5
    assert run_module("litellm_team", {**team, "max_budget": -1})["team"]["max_budget"] is None

    key = {**access, "team": "research", "name": "ci"}
    made = run_module("litellm_key", key)
    assert litellm.token_of(made["key"]) == made["sha256"]
    again = run_module("litellm_key", key)
    assert (again["changed"], "key" in again) == (False, False)
    blocked = run_module("litellm_key", {**key, "state": "blocked"})
    assert blocked["changes"] == ["key research/ci: block"]
    rotated = run_module("litellm_key", {**key, "key": value(1)})
    assert rotated["changes"] == [
        "key research/ci: retire",
        f"key research/ci@{made['sha256'][:8]}: unblock",
        "key research/ci: rotate",
    ]
    assert "key" not in rotated
    assert run_module("litellm_key", {**key, "state": "absent"})["changed"]
    assert server.keys == {}
    assert "is not there: make it first" in run_module("litellm_key", {**key, "team": "other"})["msg"]
    assert run_module("litellm_team", {**access, "name": "research", "state": "absent"})["changed"]
    assert not run_module("litellm_team", {**access, "name": "research", "state": "absent"})["changed"]
