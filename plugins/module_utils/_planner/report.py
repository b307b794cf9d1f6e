# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: how the plans of hosts are shown, as lines for a terminal and as data for a page.

Takes ``{host: {"platform", "gpus", "driver_version", "engine_version", "plans"}}``; an empty document is a host that
this run has not planned. What looks the same is shown once for all hosts that it is true of.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .units import GIB


@dataclass(frozen=True)
class Part:
    """A kind of memory on a GPU: how it is called and drawn, and which figures of a plan it is the sum of."""

    key: str
    label: str
    mark: str
    says: str
    fields: tuple[str, ...]


PARTS = (
    Part("others", "others", "%", "held by other processes and instances", ("other_bytes",)),
    Part(
        "runtime",
        "runtime",
        ":",
        "CUDA context, communication and what vLLM does not count",
        ("context_bytes", "non_torch_bytes", "unaccounted_bytes"),
    ),
    Part("weights", "weights", "#", "the model itself", ("weights_bytes",)),
    Part("activations", "activations", "+", "of one step at its largest", ("activation_bytes",)),
    Part("graphs", "graphs", "^", "CUDA graphs", ("cudagraph_bytes",)),
    Part("kv", "KV cache", "=", "the tokens of running requests", ("kv_cache_bytes",)),
    Part("spare", "spare", ".", "left free", ("spare_bytes",)),
)


# -- numbers and words ------------------------------------------------------------------------------------------------


def apportion(amounts: Sequence[int], units: int) -> list[int]:
    """Whole units for each amount that add up to ``units``, each less than one off."""
    total = sum(amounts)
    if total <= 0:
        return [0 for _ in amounts]
    found = [amount * units // total for amount in amounts]
    rests = sorted(range(len(amounts)), key=lambda place: amounts[place] * units % total, reverse=True)
    for place in rests[: units - sum(found)]:
        found[place] += 1
    return found


def cells(amounts: Sequence[int], width: int) -> list[int]:
    """As ``apportion``, but what is there at all has a cell, taken from the widest."""
    found = apportion([max(amount, 0) for amount in amounts], width)
    for place, amount in enumerate(amounts):
        if amount > 0 and not found[place] and max(found) > 1:
            found[found.index(max(found))] -= 1
            found[place] = 1
    return found


def gib(amount: float | None, digits: int = 1) -> str:
    return "unknown" if amount is None else f"{amount / GIB:,.{digits}f} GiB"


def gib_of_fleet(amount: int) -> str:
    return gib(amount, 0 if amount >= 1000 * GIB else 1)


def floored(number: float) -> str:
    """With one decimal, never more than it is: 7.96 requests are not 8."""
    return f"{math.floor(number * 10) / 10:,.1f}"


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def clean(text: object) -> str:
    """One line, without what moves a cursor."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(str(text).split()))


def shorten(text: str, width: int) -> str:
    """In the middle, for names differ at their ends."""
    if len(text) <= width:
        return text
    tail = max(width - 3, 0) // 2
    return (text[: max(width - 3 - tail, 0)] + "..." + text[len(text) - tail :])[:width]


def ranges(names: Iterable[str]) -> str:
    """Names as an inventory writes them: ``gpu[01:40], gpu42``."""
    names = list(names)
    runs = max((len(re.findall(r"\d+", name)) for name in names), default=0)
    found = [_ranges(names, run) for run in range(runs)]
    return ", ".join(min(found, key=len, default=names))


def _ranges(names: Sequence[str], run: int) -> list[str]:
    """Those that differ in their ``run``-th number only are drawn together where they follow one another."""

    def taken_apart(name: str) -> tuple[str, str, str]:
        numbers = list(re.finditer(r"\d+", name))
        if run >= len(numbers):
            return name, "", ""
        return name[: numbers[run].start()], numbers[run][0], name[numbers[run].end() :]

    found: list[list[str]] = []
    parts = sorted((taken_apart(name) for name in names), key=lambda part: (part[0], part[2], int(part[1] or 0)))
    for before, number, after in parts:
        if found and number and found[-1][0] == before and found[-1][3] == after:
            first, last = found[-1][1], found[-1][2]
            if last and number == str(int(last) + 1).zfill(len(first)):
                found[-1][2] = number
                continue
        found.append([before, number, number, after])
    return [
        f"{before}{first}{after}" if first == last else f"{before}[{first}:{last}]{after}"
        for before, first, last, after in found
    ]


def indices(numbers: Iterable[int]) -> str:
    """``GPU 0``, ``GPUs 0-3`` or ``GPUs 0, 2``."""
    numbers = sorted(set(numbers))
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda at: at[1] - at[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"GPU{'' if len(numbers) == 1 else 's'} {text}"


def setting(name: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return clean(f"{name}={text}")


# -- what there is to show --------------------------------------------------------------------------------------------


def amounts_of(row: Mapping[str, int]) -> list[int]:
    """A row of a plan's ``memory`` by ``PARTS``."""
    return [sum(int(row.get(field) or 0) for field in part.fields) for part in PARTS]


def rounded(amounts: Sequence[int], digits: int) -> list[float]:
    """In GiB, adding up to the rounded total: what rounding leaves over is spare, or in the largest where none is."""
    step = 10**digits
    units = [round(amount / GIB * step) for amount in amounts]
    over = round(sum(amounts) / GIB * step) - sum(units)
    largest = amounts.index(max(amounts))
    units[-1 if amounts[-1] > 0 and units[-1] + over >= 0 else largest] += over
    return [unit / step for unit in units]


def bar(label: str, amounts: Sequence[int], digits: int = 2) -> dict[str, Any]:
    """A GPU's memory as it is drawn. The numbers shown add up to the total shown."""
    whole = sum(max(amount, 0) for amount in amounts) or 1
    shown = rounded(amounts, digits)
    return {
        "label": label,
        "total": f"{sum(shown):,.{digits}f} GiB",
        "parts": [
            {
                "key": part.key,
                "label": part.label,
                "mark": part.mark,
                "amount": f"{number:,.{digits}f}",
                "percent": round(max(amount, 0) * 100 / whole, 3),
            }
            for part, amount, number in zip(PARTS, amounts, shown, strict=True)
            if amount
        ],
    }


def planned(host: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of ``plans`` that have a plan."""
    return [entry for entry in host.get("plans") or () if entry.get("plan")]


def refused(host: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in host.get("plans") or () if not entry.get("plan")]


def partitioned(host: Mapping[str, Any]) -> set[int]:
    """Indices of the cards that are cut into MIG instances: a row of a plan is then of an instance."""
    return {gpu["index"] for gpu in host.get("gpus") or () if (gpu.get("mig") or {}).get("enabled")}


def alike(rows: Iterable[Mapping[str, Any]], digits: int) -> list[tuple[list[int], list[int]]]:
    """GPUs of a plan with what is on them, those that look the same together."""
    found: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    for row in rows:
        amounts = amounts_of(row)
        look = bar("", amounts, digits)
        key = (look["total"], *(f"{part['key']} {part['amount']}" for part in look["parts"]))
        found.setdefault(key, ([], amounts))[0].append(int(row["gpu"]))
    return list(found.values())


def hardware(host: Mapping[str, Any]) -> str:
    """``2 x NVIDIA H200 139.8 GiB, driver 580.159.04, vLLM 0.32.0``."""
    kinds: dict[str, int] = {}
    for gpu in host.get("gpus") or ():
        mig = gpu.get("mig") or {}
        size = gpu.get("memory_total_bytes")
        cut = f" in {count(len(mig.get('instances') or ()), 'MIG instance')}" if mig.get("enabled") else ""
        kind = f"{clean(gpu.get('name'))}{' ' + gib(size) if size else ''}{cut}"
        kinds[kind] = kinds.get(kind, 0) + 1
    none = "GPUs not looked at" if opted_out(host) else "no GPU"
    said = [f"{number} x {kind}" for kind, number in kinds.items()] or [none]
    if host.get("driver_version"):
        said.append(f"driver {clean(host['driver_version'])}")
    if host.get("engine_version"):
        said.append(f"vLLM {clean(host['engine_version'])}")
    return ", ".join(said)


def opted_out(host: Mapping[str, Any]) -> bool:
    return host.get("platform") != "cpu" and host.get("planned") is False


def notes(host: Mapping[str, Any]) -> list[str]:
    """What is to be said of a host besides its models."""
    if not host:
        return ["Not planned: this run did not look at this host."]
    if host.get("platform") == "cpu":
        return ["CPU: not planned."]
    if opted_out(host):
        return ["Not planned: vllm_plan is false here."]
    said = []
    if not host.get("plans"):
        said.append("No models.")
    used = {gpu for entry in planned(host) for gpu in entry["plan"]["gpus"]}
    idle = [gpu["index"] for gpu in host.get("gpus") or () if gpu["index"] not in used and not gpu.get("problem")]
    if idle:
        said.append(f"{indices(idle)}: not used.")
    said += [
        f"GPU {gpu['index']} cannot be used: {clean(gpu['problem'])}"
        for gpu in host.get("gpus") or ()
        if gpu.get("problem")
    ]
    return said


def neighbours(host: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    """Who else is planned on the GPUs of an entry: a line for each GPU that is shared."""
    said = []
    for gpu in entry["plan"]["gpus"]:
        names = [clean(each["name"]) for each in planned(host) if each is not entry and gpu in each["plan"]["gpus"]]
        if names and gpu in partitioned(host):
            said.append(f"GPU {gpu} is cut into MIG instances, and carries {', '.join(names)} as well.")
        elif names:
            said.append(f"GPU {gpu} is shared with {', '.join(names)}.")
    return said


def parallel(plan: Mapping[str, Any]) -> str:
    """``GPUs 0-3, tp 2, pp 2``."""
    sizes = (
        (short, plan["flags"].get(f"{name}_parallel_size") or 1)
        for short, name in (("tp", "tensor"), ("pp", "pipeline"))
    )
    return ", ".join([indices(plan["gpus"]), *(f"{short} {size}" for short, size in sizes if size > 1)])


def carries(plan: Mapping[str, Any], digits: int = 1) -> str:
    """What fits into the KV cache, and what was asked for."""
    users = plan.get("users")
    wanted = f"wanted {users:,}" if users else "no users declared"
    if plan.get("context") and plan["context"] != plan["flags"]["max_model_len"]:
        wanted += f" of {plan['context']:,} tokens"
    if plan.get("max_concurrency") is None:
        return f"No KV cache needed; {wanted}"
    sizes = sorted({gib(row["kv_cache_bytes"], digits) for row in plan["memory"]}, key=lambda size: (len(size), size))
    size = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    each = " on each GPU" if len(plan["memory"]) > 1 else ""
    return (
        f"KV {size}{each} = {plan['kv_cache_tokens']:,} tokens; {floored(plan['max_concurrency'])} requests "
        f"of {plan['flags']['max_model_len']:,} tokens at once; {wanted}"
    )


def on_host(plan: Mapping[str, Any], digits: int = 1) -> list[str]:
    words = (("ram_bytes", "memory"), ("shm_bytes", "/dev/shm"), ("disk_bytes", "disk"))  # noqa: S108 - named, not used
    needs = plan.get("host") or {}
    return [f"{word} {gib(needs[name], digits)}" for name, word in words if needs.get(name) is not None]


def offer(fit: Mapping[str, Any], digits: int = 1) -> str:
    """The numbers of a thing that would fit."""
    said = []
    if fit.get("gpus"):
        said.append(count(fit["gpus"], "GPU"))
    if fit.get("users"):
        said.append(count(fit["users"], "user"))
    if fit.get("context"):
        said.append(f"{fit['context']:,} tokens each")
    if fit.get("kv_cache_bytes") is not None and fit.get("max_concurrency") is not None:
        said.append(f"KV {gib(fit['kv_cache_bytes'], digits)} for {floored(fit['max_concurrency'])} requests at once")
    return ", ".join(said)


def measures(refusal: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """What is needed and what is there, as (word, what, bytes); nothing where it is not about bytes."""
    found = [(word, refusal.get(word) or {}) for word in ("needs", "has")]
    if not (found[0][1].get("bytes") or 0):
        return []
    return [(word, clean(side.get("what") or ""), int(side.get("bytes") or 0)) for word, side in found]


def refusals(
    hosts: Mapping[str, Mapping[str, Any]], look: Callable[[Mapping[str, Any]], Any]
) -> list[tuple[str, list[str], Any]]:
    """(model, hosts, how its refusal looks), those that look the same together."""
    found: dict[str, tuple[str, list[str], Any]] = {}
    for host, document in hosts.items():
        for entry in refused(document):
            model, shown = str(entry["name"]), look(entry.get("refusal") or {"reason": "No plan was made."})
            found.setdefault(json.dumps([model, shown]), (model, [], shown))[1].append(host)
    return list(found.values())


def totals(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The whole fleet in a few numbers; memory in bytes."""
    gpus = [gpu for host in hosts.values() for gpu in host.get("gpus") or ()]
    plans = [entry for host in hosts.values() for entry in planned(host)]
    rejected = [entry for host in hosts.values() for entry in refused(host)]
    own = [part.key not in ("others", "spare") for part in PARTS]
    return {
        "hosts": len(hosts),
        "gpus": len(gpus),
        "models": len({entry["name"] for entry in (*plans, *rejected)}),
        "plans": len(plans),
        "refusals": len(rejected),
        "memory": sum(int(gpu.get("memory_total_bytes") or 0) for gpu in gpus),
        "planned": sum(
            amount
            for entry in plans
            for row in entry["plan"]["memory"]
            for amount, is_own in zip(amounts_of(row), own, strict=True)
            if is_own
        ),
    }


def grouped(
    hosts: Mapping[str, Mapping[str, Any]], look: Callable[[Mapping[str, Any]], Any]
) -> list[tuple[list[str], Any]]:
    """Hosts that look the same, with how they look; in the order of the inventory."""
    found: dict[str, tuple[list[str], Any]] = {}
    for name, host in hosts.items():
        shown = look(host)
        found.setdefault(json.dumps(shown, sort_keys=True), ([], shown))[0].append(name)
    return list(found.values())


# -- lines for a terminal ---------------------------------------------------------------------------------------------


def wrapped(text: str, width: int, indent: str = "", hanging: str = "") -> list[str]:
    lines = textwrap.wrap(
        clean(text), width, initial_indent=indent, subsequent_indent=indent + hanging, break_on_hyphens=False
    )
    return [line.rstrip() for line in lines]  # which it leaves where it breaks a word


def drawn(amounts: Sequence[int], width: int) -> str:
    return "".join(part.mark * number for part, number in zip(PARTS, cells(amounts, width), strict=True))


def title(names: Sequence[str], width: int) -> list[str]:
    said = f" ({len(names)} hosts)" if len(names) > 1 else ""
    return wrapped(f"{ranges(map(clean, names))}{said}", width, "", "  ")


def model_lines(host: Mapping[str, Any], entry: Mapping[str, Any], width: int) -> list[str]:
    name = clean(entry["name"])
    if not entry.get("plan"):
        return [f"  {shorten(name, width - 16)}  DOES NOT FIT"]
    plan = entry["plan"]
    where = shorten(parallel(plan), width - 4)
    name = shorten(name, width // 3)
    room = width - len(name) - len(where) - 6
    source = shorten(
        clean((plan.get("model") or {}).get("source") or ""), room if room >= 12 else width - len(name) - 4
    )
    lines = [f"  {name}  {source}  {where}"] if room >= 12 else [f"  {name}  {source}".rstrip(), f"    {where}"]
    labels = [(shorten(indices(gpus), width // 4), gpus, amounts) for gpus, amounts in alike(plan["memory"], 1)]
    wide = max((len(label) for label, _, _ in labels), default=0)
    tails = [f"{gib(sum(amounts))}{' each' if len(gpus) > 1 else ''}" for _, gpus, amounts in labels]
    room = width - 4 - wide - 3 - 1 - max(map(len, tails), default=0)
    for (label, _, amounts), tail in zip(labels, tails, strict=True):
        lines.append(f"    {label:{wide}} [{drawn(amounts, max(room, 8))}] {tail}")
        shown = bar("", amounts, 1)
        said = [f"{part['mark']} {part['label']} {part['amount']}" for part in shown["parts"]]
        lines += flowed(said, width, "    ")
    lines += wrapped(carries(plan), width, "    ", "  ")
    if on_host(plan):
        lines += wrapped(f"Host: {', '.join(on_host(plan))}", width, "    ", "  ")
    lines += flowed(["Flags:", *(setting(*flag) for flag in plan["flags"].items())], width, "    ", "  ", " ")
    for said in neighbours(host, entry):
        lines += wrapped(said, width, "    ", "  ")
    for said in plan.get("warnings") or ():
        lines += wrapped(f"Warning: {said}", width, "    ", "  ")
    return lines


def flowed(words: Iterable[str], width: int, indent: str, hanging: str = "", gap: str = "  ") -> list[str]:
    """Words that may hold blanks, as many on a line as there is room for."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(gap) + len(word) <= width:
            lines[-1] += gap + word
        else:
            lines += wrapped(word, width, indent + (hanging if lines else ""), hanging)
    return lines


def host_lines(host: Mapping[str, Any], width: int) -> list[str]:
    lines = wrapped(hardware(host), width, "  ", "  ") if host.get("gpus") or host.get("engine_version") else []
    for said in notes(host):
        lines += wrapped(said, width, "  ", "  ")
    for entry in host.get("plans") or ():
        lines += ["", *model_lines(host, entry, width)]
    return lines


def table(hosts: Mapping[str, Mapping[str, Any]], width: int = 80) -> list[str]:
    """Every host with its models: what is on each GPU, and whom that serves. Refusals are only named."""
    lines = [line for part in PARTS for line in wrapped(f"{part.mark} {part.label}: {part.says}", width, "", "  ")]
    for names, shown in grouped(hosts, lambda host: host_lines(host, width)):
        lines += ["", *title(names, width), *shown]
    return [*lines, "", *wrapped(summary(hosts), width)]


def summary(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    found = totals(hosts)
    said = (
        f"{count(found['hosts'], 'host')} with {count(found['gpus'], 'GPU')}, {count(found['plans'], 'instance')} "
        f"planned: {gib_of_fleet(found['planned'])} of {gib_of_fleet(found['memory'])}."
    )
    return f"{said} {refusing(hosts)}" if found["refusals"] else said


def refusing(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    number = totals(hosts)["refusals"]
    return f"{count(number, 'instance')} {'does' if number == 1 else 'do'} not fit."


def refusal_table(hosts: Mapping[str, Mapping[str, Any]], width: int = 80) -> list[str]:
    """What does not fit: what is needed, what is there, and the nearest things that fit. Empty if all fits."""
    lines = [refusing(hosts)] if any(map(refused, hosts.values())) else []
    for model, names, shown in refusals(hosts, lambda refusal: refusal_lines(refusal, width)):
        where = ranges(map(clean, names)) + (f" ({len(names)} hosts)" if len(names) > 1 else "")
        lines += ["", *wrapped(f"{clean(model)} on {where}", width, "", "  "), *shown]
    return lines


def refusal_lines(refusal: Mapping[str, Any], width: int) -> list[str]:
    lines = wrapped(str(refusal.get("reason") or ""), width, "  ")
    sides = measures(refusal)
    most = max((amount for _, _, amount in sides), default=1)
    room = max(width - 11 - max((len(gib(amount)) for _, _, amount in sides), default=0), 8)
    for word, what, amount in sides:
        full = max(amount * room // most, 1 if amount else 0)
        lines.append(f"  {word:5} [{'#' * full:{room}}] {gib(amount)}")
        lines += wrapped(what, width, " " * 9)
    fits = refusal.get("fits") or ()
    lines += wrapped("What would fit:" if fits else "Nothing near it was found that fits.", width, "  ")
    for fit in fits:
        lines += wrapped(str(fit["change"]), width, "  - ", "  ")
        lines += wrapped(offer(fit), width, "    ", "  ")
    return lines


# -- data for the page ------------------------------------------------------------------------------------------------


def devices(host: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A bar for each GPU with all that is planned on it; for each MIG instance one of its own."""
    cut = partitioned(host)
    rows: dict[tuple[int, str], list[tuple[str, Mapping[str, Any]]]] = {
        (gpu["index"], ""): [] for gpu in host.get("gpus") or () if gpu["index"] not in cut
    }
    for entry in planned(host):
        for row in entry["plan"]["memory"]:
            key = (row["gpu"], str(entry["name"]) if row["gpu"] in cut else "")
            rows.setdefault(key, []).append((str(entry["name"]), row))
    sizes = {gpu["index"]: gpu.get("memory_total_bytes") for gpu in host.get("gpus") or ()}
    broken = {gpu["index"] for gpu in host.get("gpus") or () if gpu.get("problem")}
    found = []
    for (index, _), there in sorted(rows.items()):
        if there:
            amounts = [sum(column) for column in zip(*(amounts_of(row) for _, row in there), strict=True)]
            total, spare = there[0][1]["total_bytes"], min(amounts_of(row)[-1] for _, row in there)
            amounts[-1] = spare
            amounts[0] = max(total - spare - sum(amounts[1:-1]), 0)
        else:
            amounts = [*(0 for _ in PARTS[1:]), int(sizes[index] or 0)]
        label = f"GPU {index}{' (MIG)' if index in cut else ''}"
        idle = "cannot be used" if index in broken else "not used"
        found.append({**bar(label, amounts), "says": ", ".join(name for name, _ in there) or idle})
    return found


def model_card(host: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    plan = entry["plan"]
    model = plan.get("model") or {}
    parameters = model.get("parameters")
    return {
        "name": str(entry["name"]),
        "source": str(model.get("source") or ""),
        "revision": str(model.get("revision") or ""),
        "architecture": str(model.get("architecture") or ""),
        "parameters": f"{parameters:,} parameters" if parameters else "",
        "where": parallel(plan),
        "bars": [{**bar(indices(gpus), amounts), "each": len(gpus) > 1} for gpus, amounts in alike(plan["memory"], 2)],
        "carries": carries(plan, 2),
        "host": on_host(plan, 2),
        "flags": [setting(*flag) for flag in plan["flags"].items()],
        "shared": neighbours(host, entry),
        "reasons": [str(each) for each in plan.get("reasons") or ()],
        "warnings": [str(each) for each in plan.get("warnings") or ()],
    }


def host_card(host: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "about": hardware(host) if host.get("gpus") or host.get("engine_version") else "",
        "notes": notes(host),
        "devices": devices(host),
        "models": [model_card(host, entry) for entry in planned(host)],
        "refused": [str(entry["name"]) for entry in refused(host)],
    }


def page(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All that the page shows, as words, numbers as text, and percentages of widths."""
    cards = [
        {**card, "id": f"hosts-{place}", "title": ranges(names), "hosts": names}
        for place, (names, card) in enumerate(grouped(hosts, host_card), start=1)
    ]
    places = {name: card for card in cards for name in card["hosts"]}
    found = totals(hosts)
    return {
        "sentence": summary(hosts),
        "tiles": [
            *(
                {"number": f"{found[key]:,}", "what": count(found[key], what).partition(" ")[2], "bad": False}
                for key, what in (("hosts", "host"), ("gpus", "GPU"), ("models", "model"), ("plans", "instance"))
            ),
            {"number": f"{found['refusals']:,}", "what": "refused", "bad": found["refusals"] > 0},
            {
                "number": gib_of_fleet(found["planned"]),
                "what": f"planned of {gib_of_fleet(found['memory'])}",
                "bad": False,
            },
        ],
        "legend": [{"key": part.key, "label": part.label, "says": part.says} for part in PARTS],
        "refusals": [
            {**card, "name": model, "title": ranges(names), "hosts": names}
            for model, names, card in refusals(hosts, refusal_card)
        ],
        "overview": [{"host": name, "card": places[name]} for name in hosts],
        "cards": cards,
    }


def refusal_card(refusal: Mapping[str, Any]) -> dict[str, Any]:
    sides = measures(refusal)
    most = max((amount for _, _, amount in sides), default=0) or 1
    return {
        "reason": str(refusal.get("reason") or ""),
        "measures": [
            {"word": word, "what": what, "amount": gib(amount, 2), "percent": round(amount * 100 / most, 3)}
            for word, what, amount in sides
        ],
        "fits": [
            {
                "change": str(fit["change"]),
                "numbers": offer(fit, 2),
                "flags": [setting(*flag) for flag in (fit.get("flags") or {}).items()],
            }
            for fit in refusal.get("fits") or ()
        ],
    }
