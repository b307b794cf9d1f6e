# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what is wrong with declared tenants, and their report. No Ansible import and no I/O."""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._litellm import normal, time_of
from ansible_collections.llmfleet.serving.plugins.module_utils._values import amount, switch

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NAME_MAX = 64
KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")  # as the role nginx has it
KEY_MIN, KEY_MAX, KEY_DIFFERENT = 20, 256, 8
STATES = ("present", "blocked", "absent")
DURATION = re.compile(r"([1-9][0-9]{0,8})(s|m|h|d|mo)")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "mo": 30 * 86400}
DURATION_MAX = 10 * 366 * 86400
LIMITS = {"rpm_limit": 10**7, "tpm_limit": 10**11, "max_parallel_requests": 10**5}
BUDGET_MAX = 10**9
METADATA_MAX = 8192
OVERLAP_MAX = 366 * 86400
LIMIT_FIELDS = ("models", "max_budget", "budget_duration", *LIMITS, "metadata", "state")
TEAM_FIELDS = ("team", "keys", *LIMIT_FIELDS)
KEY_FIELDS = ("name", "key", *LIMIT_FIELDS)
# Metadata of these names is configuration to LiteLLM.
RESERVED = {
    *("model_rpm_limit", "model_tpm_limit", "model_itpm_limit", "model_otpm_limit", "mcp_rpm_limit", "tag_rpm_limit"),
    *("default_estimated_output_tokens", "default_estimated_output_tokens_per_model", "enforced_params", "tags"),
    *("rpm_limit_type", "tpm_limit_type", "temp_budget_increase", "temp_budget_expiry", "guardrails", "policies"),
    *("allowed_vector_store_indexes", "enforced_batch_output_expires_after", "enforced_file_expires_after", "prompts"),
    *("throttle_on_budget_exceeded", "enable_prompt_caching", "end_user_budget_id", "disable_global_guardrails"),
    *("team_member_key_duration", "team_member_budget_id", "logging", "secret_manager_settings", "service_account_id"),
    *("allowed_passthrough_routes", "denied_passthrough_routes", "callback_settings"),
}
SHOWN = 40


def inventory_problems(
    tenants: Any,
    models: Sequence[str] | None = None,
    prices: Mapping[str, Any] | None = None,
    overlap: Any = 0,
    *,
    nginx_keys: bool = False,
    prune: Any = False,
) -> list[str]:
    """Of serving_tenants with the variables that it hangs on. ``nginx_keys``: whether the inventory has any."""
    problems = [*tenant_problems(tenants, models), *overlap_problems("serving_tenants_overlap", overlap)]
    wanted = switch(prune)
    if wanted is None:
        problems.append(f"serving_tenants_prune is {_show(prune)}: write true or false.")
    elif wanted and tenants == []:
        problems.append(
            "serving_tenants_prune is true and serving_tenants is empty, which would delete every team: "
            "declare one at least. To serve without tenants, run site.yml or gateway.yml."
        )
    if prices is not None and isinstance(tenants, list):
        problems += _unpriced(tenants, models, prices)
    if nginx_keys and tenants:
        problems.append(
            "nginx_keys is set, and with serving_tenants nginx lets in the tenants' keys alone: "
            "declare these clients as keys of a team (with key:), or take nginx_keys out."
        )
    return problems


def tenant_problems(
    tenants: Any, models: Sequence[str] | None = None, *, variable: str = "serving_tenants", master_key: str = ""
) -> list[str]:
    """A sentence for each problem, with the place, the value unless it is secret, and the remedy."""
    if tenants is None:
        return [f"{variable} is empty (null): write [], or declare a team."]
    if not isinstance(tenants, list):
        return [f"{variable} is {_show(tenants)}: write a list of teams, or [] for none."]
    problems: list[str] = []
    keys: list[tuple[str, str, dict[str, Any]]] = []  # where, alias, entry
    for index, entry in enumerate(tenants):
        where = _place(f"{variable}[{index}]", entry, "team")
        if not isinstance(entry, Mapping):
            problems.append(f"{where} is {_show(entry)}: write a team with its fields, as team: research.")
            continue
        name = entry.get("team")
        problems += _unknown(where, entry, TEAM_FIELDS)
        problems += name_problems(f"{where}: team", name)
        problems += limit_problems(where, entry, models)
        own = entry.get("keys")
        if own is not None and not isinstance(own, list):
            problems.append(f"{where}: keys is {_show(own)}: write a list of keys.")
            own = []
        for number, key in enumerate(own or ()):
            place = _place(f"{where}.keys[{number}]", key, "name")
            if not isinstance(key, Mapping):
                # It may be a key's value.
                problems.append(f"{place} is no key with its fields: write it as name: ci.")
                continue
            problems += _unknown(place, key, KEY_FIELDS)
            problems += name_problems(f"{place}: name", key.get("name"))
            problems += limit_problems(place, key, models)
            problems += value_problems(place, key.get("key"), master_key)
            problems += _against_team(place, key, entry)
            keys.append((place, f"{name}/{key.get('name')}", dict(key)))
    problems += _twice(variable, tenants)
    problems += _keys_twice(keys)
    return problems


def _place(where: str, entry: Any, field: str) -> str:
    name = entry.get(field) if isinstance(entry, Mapping) else None
    return f"{where} ({_cut(name)})" if isinstance(name, str) else where


def name_problems(where: str, name: Any) -> Iterator[str]:
    if name is None:
        yield f"{where} is not set: give it a name."
    elif not isinstance(name, str):
        yield f"{where} is {_show(name)}, which is no text: put it into quotes."
    elif not name or len(name) > NAME_MAX:
        yield f"{where} has {len(name)} characters: use 1 to {NAME_MAX}."
    elif not NAME.fullmatch(name):
        odd = next((char for char in name if not re.fullmatch(r"[A-Za-z0-9._-]", char)), name[0])
        yield (
            f"{where} is {_show(name)}, which has {_character(odd)}: "
            "use A-Z a-z 0-9 . _ -, the first a letter or digit."
        )
    elif ".." in name:
        yield f"{where} is {_show(name)}: LiteLLM takes no two dots in a row."


def value_problems(where: str, key: Any, master_key: str = "") -> Iterator[str]:
    """Never says a part of it."""
    if key is None or key == "":
        return
    if isinstance(key, (bool, int, float, list, Mapping)):
        yield f"{where}: key is no text: put it into quotes."
        return
    key = str(key)  # ansible-vault's is none yet
    if key == master_key:
        yield f"{where}: key is LiteLLM's master key: make another key."
    elif not key.startswith("sk-"):
        yield f"{where}: key does not begin with sk-, and LiteLLM takes no others: make another key."
    elif not KEY.fullmatch(key):
        yield f"{where}: key has a character that is not one of A-Z a-z 0-9 . _ ~ + / = -: make another key."
    elif not KEY_MIN <= len(key) <= KEY_MAX:
        yield f"{where}: key has {len(key)} characters: make one of {KEY_MIN} to {KEY_MAX}."
    elif len(set(key[3:])) < KEY_DIFFERENT:
        yield f"{where}: key has fewer than {KEY_DIFFERENT} different characters: make another key."


def limit_problems(
    where: str, entry: Mapping[str, Any], models: Sequence[str] | None = None, *, whole: bool = True
) -> Iterator[str]:
    """What teams and keys have in common. ``whole`` where nothing is left as it was."""
    state = entry.get("state")
    if state is not None and state not in STATES:
        yield f"{where}: state is {_show(state)}: use {', '.join(STATES)}."
    yield from _model_problems(where, entry.get("models"), models)
    if whole and entry.get("models") == []:
        yield f"{where}: models is empty, which LiteLLM takes for all: name some, or leave it out."
    yield from _number(where, "max_budget", entry.get("max_budget"), BUDGET_MAX, whole=False)
    for name, most in LIMITS.items():
        yield from _number(where, name, entry.get(name), most, whole=True)
    duration = entry.get("budget_duration")
    if duration is not None:
        if not isinstance(duration, str) or not DURATION.fullmatch(duration) or seconds_of(duration) > DURATION_MAX:
            yield f"{where}: budget_duration is {_show(duration)}: write 30d, of s, m, h, d or mo, at most ten years."
        elif whole and entry.get("max_budget") is None:
            yield f"{where}: budget_duration is {duration} without a max_budget: set that as well."
    yield from _metadata_problems(where, entry.get("metadata"))


def overlap_problems(name: str, value: Any) -> Iterator[str]:
    seconds = amount(value)
    if seconds is None or not 0 <= seconds <= OVERLAP_MAX or seconds != int(seconds):
        yield f"{name} is {_show(value)}: use 0 to {OVERLAP_MAX} seconds."


def usage_days_problems(days: int) -> Iterator[str]:
    if not 0 <= days <= 399:
        yield f"usage_days is {days}: use 0 to 399."


def partial(asked: Mapping[str, Any], fields: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields that are given, as LiteLLM has them, where others stay as they are; and what is wrong with them.

    What takes a limit away is -1, or an empty text.
    """
    given = {name: asked[name] for name in fields if asked[name] is not None}
    limits = {name: value for name, value in given.items() if value not in (-1, "")}
    problems = list(limit_problems("options", limits, whole=False))
    return {} if problems else normal({name: limits.get(name) for name in given}), problems


def seconds_of(duration: str) -> int:
    match = DURATION.fullmatch(duration)
    return int(match[1]) * SECONDS[match[2]]


def _model_problems(where: str, named: Any, models: Sequence[str] | None) -> Iterator[str]:
    if named is None:
        return
    if not isinstance(named, list) or not all(isinstance(model, str) for model in named):
        yield f"{where}: models is {_show(named)}: write a list of names."
        return
    if len(set(named)) < len(named):
        yield f"{where}: models has a name twice: name each once."
    for model in named if models is not None else ():
        if model not in models:
            near = difflib.get_close_matches(model, models, n=1, cutoff=0.5)
            remedy = f"do you mean {near[0]}?" if near else f"use {', '.join(models) or 'none, for there is none'}."
            yield f"{where}: models has {_show(model)}, which is no model of vllm_models: {remedy}"


def _number(where: str, name: str, value: Any, most: int, *, whole: bool) -> Iterator[str]:
    if value is None:
        return
    number = None
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # Ansible's templates make text of numbers
            number = float(value)
        except (ValueError, OverflowError):
            number = None
    if number is None or not math.isfinite(number):
        yield f"{where}: {name} is {_show(value)}, which is no number: write one, or leave it out for no limit."
    elif number <= 0:
        yield f"{where}: {name} is {_show(value)}: use more than 0; to let nothing through, use state: blocked."
    elif number > most:
        yield f"{where}: {name} is {_show(value)}: use at most {most}, or leave it out for no limit."
    elif whole and number != int(number):
        yield f"{where}: {name} is {_show(value)}: write a whole number."


def _metadata_problems(where: str, metadata: Any) -> Iterator[str]:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(isinstance(name, str) for name in metadata):
        yield f"{where}: metadata is {_show(metadata)}: write names with values."
        return
    try:
        text = json.dumps(metadata, allow_nan=False, default=str)
    except (ValueError, RecursionError):
        yield f"{where}: metadata has a value that JSON has not: write text, numbers, lists and names with values."
        return
    if len(text) > METADATA_MAX:
        yield f"{where}: metadata has {len(text)} characters as JSON: use at most {METADATA_MAX}."
    if "\\u0000" in text:
        yield f"{where}: metadata has a NUL character, which PostgreSQL does not take: take it out."
    for name in sorted(set(metadata) & RESERVED):
        yield f"{where}: metadata has {name}, which is a setting of LiteLLM: choose another name."


def _against_team(where: str, key: Mapping[str, Any], team: Mapping[str, Any]) -> Iterator[str]:
    budget, most = amount(key.get("max_budget")), amount(team.get("max_budget"))
    if budget is not None and most is not None and budget > most and _period(key) <= _period(team):
        yield (
            f"{where}: max_budget is {_show(key['max_budget'])}, and the team's is {_show(team['max_budget'])}, "
            "which ends first: lower it, or raise the team's."
        )
    named, allowed = key.get("models"), team.get("models")
    if isinstance(named, list) and isinstance(allowed, list) and allowed:
        for model in named:
            if model not in allowed:
                yield f"{where}: models has {_show(model)}, which the team may not use: take it out, or add it there."


def _unpriced(tenants: Sequence[Any], models: Sequence[str] | None, prices: Mapping[str, Any]) -> Iterator[str]:
    """Budgets of which some model never spends anything. A team's covers those of its keys."""
    for index, team in enumerate(tenants):
        if not isinstance(team, Mapping) or team.get("state") == "absent":
            continue
        where, own = _place(f"serving_tenants[{index}]", team, "team"), team.get("keys")
        entries = [(where, team)]
        if team.get("max_budget") is None and isinstance(own, list):
            places = (_place(f"{where}.keys[{number}]", key, "name") for number, key in enumerate(own))
            entries = [pair for pair in zip(places, own, strict=True) if isinstance(pair[1], Mapping)]
        for place, entry in entries:
            if entry.get("max_budget") is None or entry.get("state") == "absent":
                continue
            allowed = [each["models"] for each in (team, entry) if isinstance(each.get("models"), list)]
            free = [
                model
                for model in models or ()
                if model not in prices and all(not named or model in named for named in allowed)
            ]
            if free:
                verb, what = ("has", "it") if len(free) == 1 else ("have", "each")
                yield (
                    f"{place}: max_budget is {_show(entry['max_budget'])}, and {', '.join(free)} {verb} no price in "
                    f"litellm_prices: give {what} one, or {{input: 0, output: 0}} if it is free."
                )


def _period(entry: Mapping[str, Any]) -> float:
    duration = entry.get("budget_duration")
    return seconds_of(duration) if isinstance(duration, str) and DURATION.fullmatch(duration) else math.inf


def _unknown(where: str, entry: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            remedy = f"do you mean {near[0]}?" if near else f"use {', '.join(known)}."
            yield f"{where} has {_show(name)}, which is no field of it: {remedy}"


def _twice(variable: str, tenants: Sequence[Any]) -> Iterator[str]:
    """Names that differ by case alone count as one: people take them for it."""
    seen: dict[str, str] = {}
    for entry in tenants:
        name = entry.get("team") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            continue
        if name.casefold() in seen:
            other = seen[name.casefold()]
            same = "twice" if other == name else f"and {_show(other)}, which differ by case alone"
            yield f"{variable} has the team {_show(name)} {same}: put all of it into one, or rename one."
        seen.setdefault(name.casefold(), name)


def _keys_twice(keys: Sequence[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    aliases: dict[str, str] = {}
    values: dict[str, str] = {}
    files: dict[str, str] = {}
    for where, alias, key in keys:
        if alias.casefold() in aliases:
            yield f"{where} has the name of {aliases[alias.casefold()]}: give each key of a team a name of its own."
            continue
        aliases[alias.casefold()] = where
        if key.get("state") == "absent":
            continue
        value = key.get("key") and str(key["key"])  # ansible-vault's is no text yet
        if value:
            if value in values:
                yield f"{where} has the same key as {values[value]}: give each a key of its own."
            values.setdefault(value, where)
        else:
            file = secret_name(*alias.split("/", 1)).casefold()
            if file in files:
                yield f"{where} and {files[file]} would be kept in one file, {file}: rename one, or give it a key."
            files.setdefault(file, where)


def secret_name(team: str, name: str) -> str:
    """Of the key in the secrets folder, where none is declared."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"key_{team}_{name}")


def secret_names(tenants: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        secret_name(team["team"], key["name"])
        for team in tenants
        for key in team.get("keys") or ()
        if _needs_key(team, key)
    ]


def names(tenants: Sequence[Mapping[str, Any]], *, absent: bool = False) -> list[str]:
    """Of all that is declared, or only of what is to be gone: teams, and keys as LiteLLM calls them."""
    found = []
    for team in tenants:
        gone = team.get("state") == "absent"
        found.append((team["team"], gone))
        for key in team.get("keys") or ():
            found.append((f"{team['team']}/{key['name']}", gone or key.get("state") == "absent"))
    return [name for name, gone in found if gone or not absent]


def with_keys(tenants: Sequence[Mapping[str, Any]], secrets: Mapping[str, str]) -> list[dict[str, Any]]:
    """The tenants with the keys from the secrets folder, where they have none of their own."""
    return [
        {
            **team,
            "keys": [
                {**key, "key": secrets[secret_name(team["team"], key["name"])]} if _needs_key(team, key) else dict(key)
                for key in team.get("keys") or ()
            ],
        }
        for team in tenants
    ]


def probe(tenants: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    """The key that may use the most of the models, and which these are. ``tenants`` are with their keys."""
    usable = [
        {"key": key["key"], "models": [name for name in models if _may(team, name) and _may(key, name)]}
        for team in tenants
        for key in team.get("keys") or ()
        if {team.get("state", "present"), key.get("state", "present")} == {"present"}
    ]
    return max(usable, key=lambda each: len(each["models"]), default={"key": "", "models": []})


def _may(entry: Mapping[str, Any], model: str) -> bool:
    return not entry.get("models") or model in entry["models"]


def _needs_key(team: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return not key.get("key") and "absent" not in (team.get("state"), key.get("state"))


def _show(value: Any) -> str:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return _cut(repr(value) if not isinstance(value, str) else ascii(str(value)))
    return "a list" if isinstance(value, list) else "a dictionary" if isinstance(value, Mapping) else "no text"


def _cut(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _character(char: str) -> str:
    if char in "._-":
        return f"a {char} at the beginning"
    name = unicodedata.name(char, f"the character U+{ord(char):04X}")
    return f"a {char}" if char.isascii() and char.isprintable() and char != " " else name


# --- the report ---------------------------------------------------------------------------------------------

COLUMNS = (("state", 8), ("spend", 14), ("", 6), ("tokens", 6), ("rpm/tpm/par", 11), ("used", 5))
BAR = 6


def table(report: Mapping[str, Any], width: int = 80) -> list[str]:
    """Lines of ASCII, none longer. ``report`` is what the modules return: teams, keys, missing, now, usage_days."""
    now = time_of(report.get("now")) or datetime.fromtimestamp(0).astimezone()
    first = width - sum(size + 1 for _, size in COLUMNS)
    lines = [_line([("team, key", first), *COLUMNS])]
    lines.append("-" * width)
    keys: dict[str | None, list[Mapping[str, Any]]] = {}
    for key in report.get("keys") or ():
        keys.setdefault(key["team"], []).append(key)
    teams = list(report.get("teams") or ())
    for name in report.get("missing") or ():
        team, slash, _ = name.partition("/")
        (keys.setdefault(team, []) if slash else teams).append({"name": name, "team": team, "missing": True})
    for team in teams:
        own = keys.pop(team["name"], [])
        counted = [key["tokens"] for key in own if key.get("tokens") is not None]
        used = max((key["last_used"] for key in own if key.get("last_used")), default=None)
        row = {**team, "tokens": sum(counted) if counted else None, "last_used": used}
        lines += _row(team["name"], row, first, now)
        lines += [line for key in own for line in _row(f"  {_own_name(key)}", key, first, now)]
    for team, rest in sorted(keys.items(), key=lambda item: item[0] or ""):
        lines.append(_line([(f"(team {team}, which is gone)" if team else "(no team)", width)]))
        lines += [line for key in rest for line in _row(f"  {key['name']}", key, first, now)]
    if len(lines) == 2:
        lines.append("LiteLLM has no teams and no keys.")
    elif report.get("usage_days"):
        lines.append(f"(tokens: of the last {report['usage_days']} days)")
    return lines


def _own_name(key: Mapping[str, Any]) -> str:
    name, prefix = str(key["name"]), f"{key['team']}/"
    return name[len(prefix) :] if name.startswith(prefix) else name


def _row(name: str, row: Mapping[str, Any], first: int, now: datetime) -> list[str]:
    """One line, or two where the name is long."""
    cells = ("missing",) if row.get("missing") else _cells(row, now)
    own = [] if len(name) <= first else [_line([(name, first + sum(size + 1 for _, size in COLUMNS))])]
    return [*own, _line([("" if own else name, first), *zip(cells, (size for _, size in COLUMNS), strict=False)])]


def _cells(row: Mapping[str, Any], now: datetime) -> tuple[str, ...]:
    budget = row.get("max_budget")
    limits = [row.get("rpm_limit"), row.get("tpm_limit"), row.get("max_parallel_requests")]
    return (
        _state(row, now),
        _money(row.get("spend") or 0)
        + (f"/{_money(budget)}" if budget is not None else "")
        + (f" {row['budget_duration']}" if row.get("budget_duration") else ""),
        _bar((row.get("spend") or 0) / budget) if budget else "",
        "" if row.get("tokens") is None else _count(row["tokens"]),
        "/".join("-" if limit is None else _count(limit) for limit in limits) if any(limits) else "",
        _ago(time_of(row.get("last_used")), now),
    )


def _line(cells: Sequence[tuple[str, int]]) -> str:
    return " ".join(_fit(text, size) for text, size in cells).rstrip()


def _fit(text: str, size: int) -> str:
    text = "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
    return text.ljust(size) if len(text) <= size else f"{text[: size - 1]}~"


def _state(row: Mapping[str, Any], now: datetime) -> str:
    expires = time_of(row.get("expires"))
    if expires is not None and expires <= now:
        return "expired"
    if row.get("blocked"):
        return "blocked"
    if row.get("declared") is False:
        return "stranger"
    budget = row.get("max_budget")
    if budget is not None and (row.get("spend") or 0) >= budget:
        return "used up"
    return "active" if expires is None else f"ends {_span(expires - now)}"


def _span(span: timedelta) -> str:
    seconds = max(int(span.total_seconds()), 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{min(seconds // size, 9999)}{unit}"
    return f"{seconds}s"


def _ago(when: datetime | None, now: datetime) -> str:
    return "never" if when is None else _span(now - when)


def _money(value: float) -> str:
    if 0 < value < 0.005:
        return "<0.01"
    if abs(value) < 1000:
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return f"{value:.0f}" if abs(value) < 100_000 else _count(value)


def _count(value: float) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(value) >= size:
            return (
                f"{value / size:.1f}".removesuffix(".0") + unit if value < 100 * size else f"{value / size:.0f}{unit}"
            )
    return f"{value:.0f}"


def _bar(part: float) -> str:
    full = min(max(round(part * (BAR - 2)), 0), BAR - 2)
    return f"[{'#' * full}{'.' * (BAR - 2 - full)}]"
