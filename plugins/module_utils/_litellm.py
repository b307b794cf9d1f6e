# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: LiteLLM's teams and keys, what differs from those declared, and the calls that mend it.

No Ansible import here, and of I/O only the client, which needs nothing but Python: gateways have no python3-requests.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlencode, urlsplit

# What LiteLLM takes for "no limit", and what is declared where nothing is.
TEAM_DEFAULTS: dict[str, Any] = {
    "models": [],
    "max_budget": None,
    "budget_duration": None,
    "rpm_limit": None,
    "tpm_limit": None,
    "metadata": {},
}
KEY_DEFAULTS: dict[str, Any] = {**TEAM_DEFAULTS, "max_parallel_requests": None}
# Of the modules' arguments those that a team and a key have in common.
TEAM_SPEC: dict[str, Any] = {
    "state": {"type": "str", "choices": ["present", "blocked", "absent"], "default": "present"},
    "models": {"type": "list", "elements": "str"},
    "max_budget": {"type": "float"},
    "budget_duration": {"type": "str"},
    "rpm_limit": {"type": "int"},
    "tpm_limit": {"type": "int"},
    "metadata": {"type": "dict"},
}
KEY_SPEC: dict[str, Any] = {**TEAM_SPEC, "max_parallel_requests": {"type": "int"}}
SYSTEM_METADATA = ("team_member_budget_id",)  # LiteLLM's own, which an update leaves alone
TOKEN = re.compile(r"[0-9a-f]{64}")
PREDECESSOR = re.compile(r"(?P<alias>.+)@[0-9a-f]{8}", re.DOTALL)
SECRET = re.compile(r"sk-[^\s'\",}\]]+")
IDLE_MAX = 1.0  # seconds; uvicorn, by its own default, closes a connection that has been idle for 5
PAGE = 100  # LiteLLM gives no more at once
TOLD = 5  # of each kind, in one message
SLACK = timedelta(seconds=60)  # by which two clocks, or the start and the end of a run, may differ
# Phases: names are freed before others take them, and teams go last.
TEAMS, FREE, WRITE, REMOVE, REMOVE_TEAMS = range(5)


class LiteLLMError(Exception):
    """A sentence for people. ``unreachable`` where there is no point in asking anything else."""

    def __init__(self, message: str, *, unreachable: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable
        self.refused = refused


def token_of(key: str) -> str:
    """What LiteLLM, and nginx, know a key by."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


# --- what is declared ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """``fields`` are those that have to be so; the others stay as they are. Without ``key``, any value will do."""

    team: str
    name: str
    state: str = "present"
    key: str | None = field(default=None, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alias(self) -> str:
        return f"{self.team}/{self.name}"

    @property
    def token(self) -> str | None:
        return token_of(self.key) if self.key else None


@dataclass(frozen=True)
class Team:
    """With the state "any" only its keys are meant."""

    name: str
    state: str = "present"
    fields: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()


def declared(tenants: Iterable[Mapping[str, Any]]) -> list[Team]:
    """``serving_tenants``, which has no problems any more. What is not said is LiteLLM's default."""
    teams = []
    for entry in tenants:
        # LiteLLM counts parallel requests by key alone.
        parallel = entry.get("max_parallel_requests")
        keys = tuple(
            Key(
                entry["team"],
                key["name"],
                _state(key),
                key.get("key") or None,
                _fields({"max_parallel_requests": parallel, **_said(key)}, KEY_DEFAULTS),
            )
            for key in entry.get("keys") or ()
        )
        teams.append(Team(entry["team"], _state(entry), _fields(entry, TEAM_DEFAULTS), keys))
    return teams


def _state(entry: Mapping[str, Any]) -> str:
    return entry.get("state") or "present"


def _said(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


def _fields(entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return normal({name: default if entry.get(name) is None else entry[name] for name, default in defaults.items()})


def normal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what means the same: the inventory's and LiteLLM's way of writing are compared by it."""
    return {name: _NORMAL[name](value) for name, value in fields.items()}


def _number(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else kind(value)


_NORMAL: dict[str, Callable[[Any], Any]] = {
    "models": lambda value: sorted({str(model) for model in value or ()}),
    "max_budget": _number(float),
    "budget_duration": lambda value: value or None,
    "rpm_limit": _number(int),
    "tpm_limit": _number(int),
    "max_parallel_requests": _number(int),
    "metadata": lambda value: {name: each for name, each in (value or {}).items() if name not in SYSTEM_METADATA},
}


# --- what LiteLLM has ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundTeam:
    name: str
    alias: str
    blocked: bool
    spend: float
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class FoundKey:
    token: str
    alias: str
    team: str | None
    blocked: bool
    expires: datetime | None
    spend: float
    fields: Mapping[str, Any]
    last_used: str | None = None
    shown: str = ""  # "sk-...abcd", by which people know a key without an alias

    @property
    def label(self) -> str:
        return self.alias or self.shown or self.token[:8]

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Found:
    teams: Mapping[str, FoundTeam] = field(default_factory=dict)
    keys: Mapping[str, FoundKey] = field(default_factory=dict)  # by token


def time_of(text: str | None) -> datetime | None:
    if not text:
        return None
    found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def found_team(row: Mapping[str, Any]) -> FoundTeam:
    return FoundTeam(
        name=row["team_id"],
        alias=row.get("team_alias") or "",
        blocked=bool(row.get("blocked")),
        spend=float(row.get("spend") or 0),
        fields=normal({name: row.get(name) for name in TEAM_DEFAULTS}),
    )


def found_key(row: Mapping[str, Any]) -> FoundKey:
    return FoundKey(
        token=row["token"],
        alias=row.get("key_alias") or "",
        team=row.get("team_id") or None,
        blocked=bool(row.get("blocked")),
        expires=time_of(row.get("expires")),
        spend=float(row.get("spend") or 0),
        fields=normal({name: row.get(name) for name in KEY_DEFAULTS}),
        last_used=row.get("last_active"),
        shown=row.get("key_name") or "",
    )


def accepted(found: Found, now: datetime) -> list[dict[str, str]]:
    """The keys that LiteLLM lets in, with names that are safe in a configuration file, whoever made them."""
    keys = []
    for key in sorted(found.keys.values(), key=lambda key: (key.alias, key.token)):
        team = found.teams.get(key.team) if key.team else None
        gone = key.team is not None and team is None
        if key.blocked or key.expired(now) or gone or (team and team.blocked) or not TOKEN.fullmatch(key.token):
            continue
        name = key.alias if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,149}", key.alias) else f"key-{key.token[:8]}"
        keys.append({"name": name, "sha256": key.token})
    return keys


# --- what has to change -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One call. ``before`` and ``after`` are what people are shown; only ``body`` may hold a key."""

    phase: int
    kind: str
    name: str
    action: str
    path: str
    body: Mapping[str, Any] = field(repr=False)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.action}"


def plan(
    teams: Sequence[Team], found: Found, *, now: datetime, overlap: int, prune: bool = False
) -> tuple[list[Change], list[str]]:
    """The calls in their order, and what stands against them. Those of one phase do not depend on each other."""
    wanted = [key for team in teams if team.state != "absent" for key in team.keys if key.state != "absent"]
    claimed = {key.token: key for key in wanted if key.token in found.keys}
    problems = [
        f"the alias {key.alias} belongs in LiteLLM to a key of {f'the team {row.team}' if row.team else 'no team'}, "
        "which was made by hand: give that one another alias, or delete it."
        for key in wanted
        for row in found.keys.values()
        if row.alias == key.alias and row.team != key.team and row.token not in claimed
    ]
    problems += [
        f"the team {team.name} is not there: make it first."
        for team in teams
        if team.state == "any" and team.name not in found.teams and any(key.state != "absent" for key in team.keys)
    ]
    if problems:
        return [], problems
    changes: list[Change] = []
    for team in teams:
        changes += _team_changes(team, found.teams.get(team.name))
        # LiteLLM deletes a team's keys with it.
        if team.state != "absent":
            for key in team.keys:
                changes += _key_changes(key, found, claimed, now, overlap)
    if prune:
        changes += _prune(teams, found)
    return sorted(changes, key=lambda change: change.phase), []


def _team_changes(team: Team, there: FoundTeam | None) -> list[Change]:
    if team.state == "any" or (team.state == "absent" and there is None):
        return []
    if team.state == "absent":
        return [_delete_team(there)]
    blocked = team.state == "blocked"
    if there is None:
        fields = {**TEAM_DEFAULTS, **team.fields}
        body = {"team_id": team.name, "team_alias": team.name, **fields, "blocked": blocked}
        return [Change(TEAMS, "team", team.name, "create", "/team/new", body, {}, _shown(fields, blocked))]
    wanted = {**team.fields, "blocked": blocked}
    return _update(team.name, there, wanted, {"team_id": team.name})


def _update(
    name: str,
    there: FoundTeam | FoundKey,
    wanted: Mapping[str, Any],
    identity: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> list[Change]:
    """``identity`` is how LiteLLM knows it, ``extra`` what is to be written besides."""
    kind, phase = ("team", TEAMS) if isinstance(there, FoundTeam) else ("key", WRITE)
    has = {**there.fields, "blocked": there.blocked}
    differ = {field_: value for field_, value in wanted.items() if has[field_] != value}
    if not differ and not extra:
        return []
    action = "update" if set(differ) != {"blocked"} or extra else "block" if differ["blocked"] else "unblock"
    body = {**identity, **differ, **(extra or {})}
    before = {field_: has[field_] for field_ in differ}
    return [Change(phase, kind, name, action, f"/{kind}/update", body, before, differ)]


def _shown(fields: Mapping[str, Any], blocked: bool) -> dict[str, Any]:
    """What is worth telling of a new one: where it is not LiteLLM's default."""
    return {**{name: value for name, value in fields.items() if value != KEY_DEFAULTS[name]}, "blocked": blocked}


def predecessors(alias: str, found: Found) -> list[FoundKey]:
    """The tokens that a key had before, the one that lives longest first."""
    endless = datetime.max.replace(tzinfo=timezone.utc)
    old = [
        row for row in found.keys.values() if (match := PREDECESSOR.fullmatch(row.alias)) and match["alias"] == alias
    ]
    return sorted(old, key=lambda row: row.expires or endless, reverse=True)


def _key_changes(
    key: Key, found: Found, claimed: Mapping[str | None, Key], now: datetime, overlap: int
) -> list[Change]:
    current = next((row for row in found.keys.values() if row.alias == key.alias), None)
    old = [row for row in predecessors(key.alias, found) if row.token not in claimed]
    if key.state == "absent":
        gone = [row for row in [current] if row and row.token not in claimed]
        return [_delete_key(row, key.alias if row is current else row.alias) for row in gone + old]

    changes: list[Change] = []
    blocked = key.state == "blocked"
    wanted = {**key.fields, "blocked": blocked}
    row = found.keys.get(key.token) if key.token else current
    replaced = current if current is not None and current is not row else None
    # One that another declared key claims only has to let go of its alias.
    if replaced is not None and replaced.token in claimed:
        changes.append(_rename(replaced, key.alias, "give up the alias"))
        replaced = None
    if replaced is not None:
        changes.append(_rename(replaced, key.alias, "retire", overlap))
        changes += [_delete_key(replaced, _aside(key.alias, replaced))] if overlap == 0 else []
        # The old token obeys what is declared for the key until its end.
        limits = _key_update(_aside(key.alias, replaced), replaced, wanted) if overlap else []
        changes += limits
    spend = (replaced or (old[0] if old else None)) if row is None or row is not current else None
    spent = {"spend": spend.spend} if spend else {}
    if row is None:
        changes.append(_create(key, wanted, spent, rotated=replaced is not None))
    else:
        moved = {"key_alias": key.alias} if row.alias != key.alias else {}
        moved |= {"team_id": key.team} if row.team != key.team else {}
        endless = {"duration": None} if row.expires is not None else {}
        extra = {**moved, **endless, **(spent if moved else {})}
        changes += _key_update(key.alias, row, wanted, extra)
    for each in old:
        changes += _care(each, wanted, now, overlap)
    return changes


def _care(row: FoundKey, wanted: Mapping[str, Any], now: datetime, overlap: int) -> list[Change]:
    """A token that was replaced: it ends when it has to, and obeys what is declared until then."""
    if overlap == 0 or row.expired(now):
        return [_delete_key(row, row.alias)]
    late = row.expires is None or row.expires > now + timedelta(seconds=overlap) + SLACK
    return _key_update(row.alias, row, wanted, {"duration": f"{overlap}s"} if late else {})


def _aside(alias: str, row: FoundKey) -> str:
    return f"{alias}@{row.token[:8]}"


def _rename(row: FoundKey, alias: str, action: str, overlap: int = 0) -> Change:
    body: dict[str, Any] = {"key": row.token, "key_alias": _aside(alias, row)}
    after: dict[str, Any] = {"alias": body["key_alias"]}
    if overlap:
        body["duration"] = after["expires in"] = f"{overlap}s"
    return Change(FREE, "key", alias, action, "/key/update", body, {"alias": row.alias}, after)


def _create(key: Key, wanted: Mapping[str, Any], spent: Mapping[str, Any], *, rotated: bool) -> Change:
    fields = {**KEY_DEFAULTS, **{name: value for name, value in wanted.items() if name != "blocked"}}
    body = {
        "key": key.key or new_key(),
        "key_alias": key.alias,
        "team_id": key.team,
        **{name: value for name, value in fields.items() if value is not None},
        "blocked": wanted["blocked"],
        **spent,
    }
    action = "rotate" if rotated else "create"
    after = {**_shown(fields, wanted["blocked"]), **spent}
    return Change(WRITE, "key", key.alias, action, "/key/generate", body, {}, after)


def _key_update(
    name: str, row: FoundKey, wanted: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> list[Change]:
    changes = _update(name, row, wanted, {"key": row.token}, extra)
    expires = row.expires.isoformat(timespec="seconds") if row.expires else None
    shown = {"key_alias": ("alias", row.alias), "team_id": ("team", row.team), "duration": ("expires in", expires)}
    shown["spend"] = ("spend", row.spend)
    before = {label: was for part, (label, was) in shown.items() if part in (extra or {})}
    after = {shown[part][0]: value for part, value in (extra or {}).items()}
    return [replace(change, before={**before, **change.before}, after={**after, **change.after}) for change in changes]


def _delete_key(row: FoundKey, name: str) -> Change:
    before = {"token": row.token[:8], "spend": row.spend}
    return Change(REMOVE, "key", name, "delete", "/key/delete", {"keys": [row.token]}, before)


def _delete_team(team: FoundTeam) -> Change:
    before = {"spend": team.spend}
    return Change(REMOVE_TEAMS, "team", team.name, "delete", "/team/delete", {"team_ids": [team.name]}, before)


def undeclared(teams: Sequence[Team], found: Found) -> tuple[list[FoundTeam], list[FoundKey]]:
    """Teams and keys that LiteLLM has and nobody has declared. Tokens that were replaced belong to their key."""
    names = {team.name for team in teams}
    aliases = {key.alias for team in teams for key in team.keys}
    claimed = {key.token for team in teams for key in team.keys if key.state != "absent"}
    going = {team.name for team in teams if team.state == "absent"}
    keys = []
    for row in found.keys.values():
        old = PREDECESSOR.fullmatch(row.alias)
        known = row.token in claimed or row.alias in aliases or (old and old["alias"] in aliases)
        if not known and row.team not in going:
            keys.append(row)
    keys.sort(key=lambda row: (row.team or "", row.alias, row.token))
    return sorted((team for name, team in found.teams.items() if name not in names), key=lambda team: team.name), keys


def missing(teams: Sequence[Team], found: Found) -> list[str]:
    """What is declared and LiteLLM has not: teams, and keys by their alias."""
    names = [team.name for team in teams if team.state != "absent" and team.name not in found.teams]
    there = {row.alias for row in found.keys.values()}
    keys = [key for team in teams if team.state != "absent" for key in team.keys if key.state != "absent"]
    return names + [key.alias for key in keys if key.alias not in there]


def _prune(teams: Sequence[Team], found: Found) -> list[Change]:
    strangers, keys = undeclared(teams, found)
    return [*(_delete_key(row, row.label) for row in keys), *(_delete_team(team) for team in strangers)]


def foreseen(found: Found, changes: Iterable[Change], now: datetime) -> Found:
    """What LiteLLM has once it has taken these changes."""
    teams, keys = dict(found.teams), dict(found.keys)
    for change in changes:
        body = change.body
        if change.path == "/team/new":
            teams[body["team_id"]] = found_team(body)
        elif change.path == "/team/update":
            team = teams[body["team_id"]]
            teams[team.name] = replace(team, **_written(team, body))
        elif change.path == "/team/delete":
            teams = {name: team for name, team in teams.items() if name not in body["team_ids"]}
            keys = {token: key for token, key in keys.items() if key.team not in body["team_ids"]}
        elif change.path == "/key/generate":
            key = found_key({**body, "token": token_of(body["key"])})
            keys[key.token] = key
        elif change.path == "/key/update":
            key = keys[body["key"]]
            names = {"key_alias": "alias", "team_id": "team", "spend": "spend"}
            moved = {name: body[part] for part, name in names.items() if part in body}
            if "duration" in body:
                lasts = body["duration"]
                moved["expires"] = now + timedelta(seconds=int(lasts.rstrip("s"))) if lasts else None
            keys[key.token] = replace(key, **moved, **_written(key, body))
        else:
            keys = {token: key for token, key in keys.items() if token not in body["keys"]}
    return Found(teams, keys)


def _written(there: FoundTeam | FoundKey, body: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: body.get(name, value) for name, value in there.fields.items()}
    return {"fields": fields, "blocked": body.get("blocked", there.blocked)}


def difference(changes: Iterable[Change]) -> dict[str, str]:
    """For --diff: the changed things before and after, never a key."""
    before, after = "", ""
    for change in changes:
        before += _lines(change, change.before) if change.before or change.action == "delete" else ""
        after += _lines(change, change.after) if change.action != "delete" else ""
    return {"before": before, "after": after}


def _lines(change: Change, values: Mapping[str, Any]) -> str:
    text = f"{change.kind} {change.name}:\n"
    return text + "".join(f"  {name}: {json.dumps(value, sort_keys=True)}\n" for name, value in sorted(values.items()))


# --- the calls ----------------------------------------------------------------------------------------------


class Client:
    """LiteLLM's management API. Each thread has a connection of its own, which is kept."""

    def __init__(self, url: str, master_key: str, timeout: float = 30) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LiteLLMError(f"The URL is {url!r}: write it as http://127.0.0.1:4000.")
        self.url, self._parts, self._timeout = url.rstrip("/"), parts, timeout
        self._headers = {"Authorization": f"Bearer {master_key}", "Content-Type": "application/json"}
        self._local = threading.local()
        self._master_key = master_key

    def get(self, path: str, **query: Any) -> Any:
        return self._ask("GET", f"{path}?{urlencode(query)}")

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._ask("POST", path, json.dumps(body, allow_nan=False).encode(), body)

    def _connection(self) -> http.client.HTTPConnection:
        if time.monotonic() - getattr(self._local, "used", 0) > IDLE_MAX:
            self._drop()
        if getattr(self._local, "connection", None) is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            self._local.connection = kind(self._parts.hostname, self._parts.port, timeout=self._timeout)
        return self._local.connection

    def _drop(self) -> None:
        if getattr(self._local, "connection", None) is not None:
            self._local.connection.close()
        self._local.connection = None

    def _ask(self, method: str, path: str, data: bytes | None = None, body: Mapping[str, Any] | None = None) -> Any:
        where = f"{method} {path.partition('?')[0]}"
        try:
            connection = self._connection()
            connection.request(method, self._parts.path.rstrip("/") + path, data, self._headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            self._local.used = time.monotonic()
        except TimeoutError:
            self._drop()
            raise LiteLLMError(
                f"LiteLLM at {self.url} has not answered {where} within {self._timeout:g} s.", unreachable=True
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._drop()
            why = self.without_keys(str(error) or type(error).__name__, body)
            raise LiteLLMError(
                f"LiteLLM at {self.url} cannot be reached ({why}): see whether it runs.",
                unreachable=True,
                refused=isinstance(error, ConnectionRefusedError),
            ) from None
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if answer.status != http.HTTPStatus.OK:
            said = self.without_keys(_message(found) or text, body)[:400]
            if answer.status == http.HTTPStatus.UNAUTHORIZED:
                raise LiteLLMError(f"LiteLLM at {self.url} refuses the master key: {said}", unreachable=True)
            hint = " (see LiteLLM's journal, and whether PostgreSQL runs)" if answer.status >= 500 else ""
            raise LiteLLMError(f"{where} ended with status {answer.status}: {said}{hint}")
        if found is None:
            raise LiteLLMError(f"{where} at {self.url} was answered, but not by LiteLLM: that is no JSON.")
        return found

    def without_keys(self, text: str, body: Mapping[str, Any] | None = None) -> str:
        """LiteLLM repeats in its errors what it was asked."""
        for secret in (self._master_key, (body or {}).get("key")):
            if secret:
                text = text.replace(str(secret), "***").replace(repr(str(secret))[1:-1], "***")
        return SECRET.sub("sk-***", text)


def _message(found: Any) -> str:
    """What LiteLLM has to say, which it wraps in several ways."""
    if isinstance(found, Mapping):
        return next((_message(found[name]) for name in ("error", "detail", "message") if found.get(name)), str(found))
    if isinstance(found, list):
        each = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found if {"loc", "msg"} <= set(one))
        return "; ".join(each) or str(found)
    return "" if found is None else str(found)


def read(client: Client, team: str | None = None, token: str | None = None) -> Found:
    """All teams and keys, or only a team, its keys and the key with that token."""
    narrow = {"team_id": team} if team else {}
    rows = _pages(client, "/v2/team/list", "teams", "page_size", sort_by="team_id", **narrow)
    teams = {row["team_id"]: found_team(row) for row in rows}
    keys = {row["token"]: found_key(row) for row in _keys(client, **narrow)}
    if token and token not in keys:
        keys |= {row["token"]: found_key(row) for row in _keys(client, key_hash=token)}
    return Found(teams, keys)


def _keys(client: Client, **narrow: str) -> list[dict[str, Any]]:
    return _pages(client, "/key/list", "keys", "size", return_full_object="true", **narrow)


def _pages(client: Client, path: str, what: str, size: str, **query: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for page in range(1, 10_000):
        answer = client.get(path, page=page, **{size: PAGE}, **query)
        if not isinstance(answer, Mapping) or not isinstance(answer.get(what), list):
            raise LiteLLMError(f"GET {path} was answered, but without {what}: is this LiteLLM 1.84 or newer?")
        rows += answer[what]
        if page >= int(answer.get("total_pages") or 0) or not answer[what]:
            break
    return rows


def read_usage(client: Client, days: int, now: datetime) -> dict[str, int] | None:
    """Tokens of the last days by a key's token, or nothing where this LiteLLM does not tell."""
    first, last = now - timedelta(days=days - 1), now + timedelta(days=1)
    dates = {"start_date": f"{first:%Y-%m-%d}", "end_date": f"{last:%Y-%m-%d}"}
    used: dict[str, int] = {}
    while True:
        try:
            answer = client.get("/team/daily/activity/aggregated/keys", offset=len(used), limit=PAGE, **dates)
        except LiteLLMError as error:
            if error.unreachable:
                raise
            return None
        rows = answer.get("api_keys") or []
        used |= {row["api_key"]: int(row["metrics"].get("total_tokens") or 0) for row in rows}
        if not rows or len(used) >= int(answer.get("total_api_keys") or 0):
            return used


@dataclass(frozen=True)
class Outcome:
    change: Change
    error: str = ""


def apply(changes: Sequence[Change], send: Callable[[Change], None], workers: int = 4) -> list[Outcome]:
    """Make the calls, several at a time. What needs something that has failed is left, and all when LiteLLM is gone.

    Once something has failed no team is deleted, for with it would go the keys that were to move away from it first.
    Keys are: one that has leaked does not wait until all else is in order.
    """
    outcomes: list[Outcome] = []
    failed: set[str] = set()
    gone = ""

    def call(change: Change) -> Outcome:
        nonlocal gone
        if gone:
            return Outcome(change, gone)
        # research/ci@0123abcd needs research/ci, which needs research, but to be deleted.
        needs = {change.name, change.name.partition("@")[0]}
        if change.phase != REMOVE:
            needs.add(change.name.partition("/")[0])
        needs &= failed
        if needs:
            return Outcome(change, f"Left, for {min(needs)} has failed")
        if failed and change.phase == REMOVE_TEAMS:
            return Outcome(change, "Left, for no team is deleted once something has failed")
        try:
            send(change)
        except LiteLLMError as error:
            if error.unreachable:
                gone = str(error)
            return Outcome(change, str(error))
        return Outcome(change)

    with ThreadPoolExecutor(workers) as pool:
        for phase in sorted({change.phase for change in changes}):
            done = list(pool.map(call, [change for change in changes if change.phase == phase]))
            failed |= {outcome.change.name for outcome in done if outcome.error}
            outcomes += done
    return outcomes


@dataclass(frozen=True)
class Result:
    """``found`` is what is there in the end; ``astray`` what LiteLLM has not kept as it was told."""

    found: Found
    changes: Sequence[Change] = ()
    outcomes: Sequence[Outcome] = ()
    problems: Sequence[str] = ()
    astray: Sequence[Change] = ()

    @property
    def changed(self) -> bool:
        return any(not outcome.error for outcome in self.outcomes) if self.outcomes else bool(self.changes)

    def told(self) -> dict[str, Any]:
        """What each module returns of it, whether it went well or not."""
        return {
            "changed": self.changed,
            "changes": [str(change) for change in self.changes],
            "diff": difference(self.changes),
        }

    @property
    def error(self) -> str:
        """What went wrong, and what was done all the same. The next run goes on from there."""
        if self.problems:
            return " ".join(f"{problem[0].upper()}{problem[1:]}" for problem in self.problems)
        failed = [outcome for outcome in self.outcomes if outcome.error]
        if failed:
            done = len(self.outcomes) - len(failed)
            why: dict[str, list[str]] = {}
            for outcome in failed:
                why.setdefault(outcome.error.rstrip("."), []).append(str(outcome.change))
            told = " ".join(f"{error} ({_some(names)})." for error, names in [*why.items()][:TOLD])
            return f"Of {len(self.outcomes)} changes {done} are done and {len(failed)} are not. {told}"
        if self.astray:
            told = _some([f"{change} {json.dumps(change.after, sort_keys=True)}" for change in self.astray])
            return (
                f"LiteLLM has taken {len(self.changes)} changes, but does not keep what it was told, "
                f"for these would still have to be made: {told}. Look for defaults and bounds in its configuration."
            )
        return ""


def _some(names: Sequence[str]) -> str:
    return "; ".join([*names[:TOLD], *([f"and {len(names) - TOLD} more"] if len(names) > TOLD else [])])


def converge(
    client: Client,
    teams: Sequence[Team],
    *,
    look: Callable[[], Found],
    now: datetime,
    overlap: int = 0,
    prune: bool = False,
    check: bool = False,
    found: Found | None = None,
) -> Result:
    """Read, write what differs, and read again whether it is so now."""
    found = look() if found is None else found
    changes, problems = plan(teams, found, now=now, overlap=overlap, prune=prune)
    if problems or check or not changes:
        return Result(found, changes, problems=problems)
    outcomes = apply(changes, lambda change: client.post(change.path, change.body))
    done = [outcome.change for outcome in outcomes if not outcome.error]
    try:
        found = look()
    except LiteLLMError:
        if len(done) == len(changes):
            raise
        return Result(foreseen(found, done, now), changes, outcomes)
    if len(done) < len(changes):
        return Result(found, changes, outcomes)
    astray, _ = plan(teams, found, now=now, overlap=overlap, prune=prune)
    return Result(found, changes, outcomes, astray=astray)


# --- the report ---------------------------------------------------------------------------------------------


def rows(
    found: Found,
    strange_teams: Iterable[FoundTeam] = (),
    strange_keys: Iterable[FoundKey] = (),
    usage: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Teams and keys as plain data, with the strange ones, which nobody has declared, marked."""
    names, tokens = {team.name for team in strange_teams}, {key.token for key in strange_keys}
    return {
        "teams": [
            {
                "name": team.name,
                "alias": team.alias,
                "blocked": team.blocked,
                "spend": team.spend,
                **team.fields,
                "declared": team.name not in names,
            }
            for _, team in sorted(found.teams.items())
        ],
        "keys": [
            {
                "name": key.label,
                "team": key.team,
                "sha256": key.token,
                "blocked": key.blocked,
                "expires": key.expires.isoformat(timespec="seconds") if key.expires else None,
                "spend": key.spend,
                "tokens": None if usage is None else usage.get(key.token, 0),
                "last_used": key.last_used,
                **key.fields,
                "declared": key.token not in tokens,
            }
            for key in sorted(found.keys.values(), key=lambda key: (key.team or "", key.label, key.token))
        ],
    }


def report(
    found: Found, teams: Sequence[Team] | None, usage: Mapping[str, int] | None, now: datetime, days: int
) -> dict[str, Any]:
    """What the modules return of LiteLLM as it is."""
    strange_teams, strange_keys = undeclared(teams, found) if teams is not None else ([], [])
    return {
        **rows(found, strange_teams, strange_keys, usage),
        "accepted": accepted(found, now),
        "undeclared": [f"team {team.name}" for team in strange_teams] + [f"key {key.label}" for key in strange_keys],
        "missing": missing(teams or (), found),
        "now": now.isoformat(timespec="seconds"),
        "usage_days": days,
    }


def named(names: Iterable[str], absent: Collection[str] = ()) -> list[Team]:
    """Teams and keys of which nothing is known but that they are declared, and which of them to be gone."""
    keys: dict[str, list[Key]] = {}
    state = dict.fromkeys(absent, "absent")
    for name in names:
        team, slash, key = name.partition("/")
        keys.setdefault(team, []).extend([Key(team, key, state.get(name, "present"))] if slash else [])
    return [Team(team, state.get(team, "present"), keys=tuple(own)) for team, own in keys.items()]
