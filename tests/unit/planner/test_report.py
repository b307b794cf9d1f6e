# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""How plans are shown: the table, the refusals, the page, and the tasks that bring them to the user."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[3]
COLLECTION = "ansible_collections.llmfleet.serving.plugins"
report = importlib.import_module(f"{COLLECTION}.module_utils._planner.report")
controller = importlib.import_module(f"{COLLECTION}.module_utils._controller")

GIB = 1 << 30
H200 = 150_109_880_320
RTX4090 = 25_282_215_936
PLAN_KEYS = {"context", "weights", "activation", "non_torch", "cudagraph", "unaccounted", "kv_cache", "other"}


# --- plans to show ------------------------------------------------------------------------------------------


def gpu(index: int, name: str = "NVIDIA H200", total: int = H200, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": name,
        "vendor": "nvidia",
        "memory_total_bytes": total,
        "memory_free_bytes": total,
        "compute_capability": "9.0",
        "mig": None,
        "processes": [],
        "nvlink": [],
        "problem": None,
        **changes,
    }


def row(index: int = 0, total: int = H200, **changes: int) -> dict[str, int]:
    """Of a GPU with Qwen2.5-7B as vLLM 0.25.1 has put it on an H200: 8192 tokens a step, 256 sequences."""
    parts = {
        "context": 547_608_330,
        "weights": 15_343_488_000,
        "activation": 1_208_004_096,
        "non_torch": 241_172_480,
        "cudagraph": 579_820_584,
        "unaccounted": 700_000_000,
        "kv_cache": 59_743_652_639,
        "other": 0,
        **changes,
    }
    assert set(parts) == PLAN_KEYS
    found = {"gpu": index, "total_bytes": total, **{f"{name}_bytes": amount for name, amount in parts.items()}}
    return {**found, "spare_bytes": total - sum(parts.values())}


def plan(name: str = "qwen", rows: list[dict[str, int]] | None = None, **changes: Any) -> dict[str, Any]:
    rows = rows or [row()]
    flags = {"max_model_len": 16384, "max_num_seqs": 8, "gpu_memory_utilization": 0.968, **changes.pop("flags", {})}
    document = {
        "name": name,
        "gpus": [each["gpu"] for each in rows],
        "flags": flags,
        "environment": {"CUDA_VISIBLE_DEVICES": "0", "TOKEN": "not-to-be-shown"},
        "memory": rows,
        "kv_cache_tokens": 1_041_840,
        "max_concurrency": 63.59,
        "users": 8,
        "context": 16384,
        "host": {"ram_bytes": 20 * GIB, "shm_bytes": GIB // 4, "disk_bytes": 15_231_233_024},
        "engine_version": "0.32.0",
        "model": {
            "source": "Qwen/Qwen2.5-7B-Instruct",
            "revision": "a09a35458c702b33eeacc393d103063234e8bc28",
            "architecture": "Qwen2ForCausalLM",
            "parameters": 7_615_616_512,
        },
        "reasons": ["1 GPU, tensor_parallel_size 1: the fewest that carry 8 users of 16384 tokens each."],
        "warnings": [],
        "fingerprint": "0123456789abcdef",
        **changes,
    }
    return {"name": name, "plan": document}


def refusal(name: str = "big", **changes: Any) -> dict[str, Any]:
    document = {
        "reason": "Qwen/Qwen2.5-72B-Instruct-AWQ does not fit: 42.78 GiB are needed on one GPU, and 23.55 are free.",
        "needs": {"what": "GPU memory on one GPU, tensor_parallel_size 1", "bytes": 47_244_640_256},
        "has": {"what": "free GPU memory on one GPU", "bytes": RTX4090},
        "fits": [
            {
                "change": "2 GPUs like NVIDIA GeForce RTX 4090 instead of 1",
                "users": 4,
                "context": 8192,
                "gpus": 2,
                "flags": {"tensor_parallel_size": 2},
                "kv_cache_bytes": 2_684_354_560,
                "max_concurrency": 4.99,
                "source": "Qwen/Qwen2.5-72B-Instruct-AWQ",
            }
        ],
        **changes,
    }
    return {"name": name, "refusal": document}


def host(*plans: dict[str, Any], gpus: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "platform": "cuda",
        "gpus": [gpu(0)] if gpus is None else gpus,
        "driver_version": "580.159.04",
        "engine_version": "0.32.0",
        "plans": list(plans),
        **changes,
    }


def fleet(size: int = 100) -> dict[str, Any]:
    return {f"gpu{number:03}": host(plan(), refusal()) for number in range(1, size + 1)}


def shared() -> dict[str, Any]:
    """A GPU with two instances and a stranger of 10 GB. Of each, the other two are others."""
    one, two, stranger = row(kv_cache=20 * GIB), row(kv_cache=50 * GIB), 10**10
    base = sum(one[f"{part}_bytes"] for part in PLAN_KEYS - {"kv_cache", "other"})
    return host(
        plan("one", [row(kv_cache=20 * GIB, other=stranger + base + 50 * GIB)]),
        plan("two", [row(kv_cache=50 * GIB, other=stranger + base + 20 * GIB)]),
        gpus=[gpu(0), gpu(1)],
        expected_spare=two["spare_bytes"] - base - 20 * GIB - stranger,
    )


def text(lines: list[str]) -> str:
    return "\n".join(lines)


def unwrapped(lines: list[str]) -> str:
    return " ".join(text(lines).split())


# --- numbers and words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["box"], "box"),
        (["gpu1"], "gpu1"),
        ([f"gpu{n:02}" for n in range(1, 41)], "gpu[01:40]"),
        ([f"gpu{n}" for n in range(8, 12)], "gpu[8:11]"),
        (["gpu02", "gpu01", "gpu04", "box"], "box, gpu[01:02], gpu04"),
        (["gpu1", "gpu02"], "gpu1, gpu02"),
        (["gpu09", "gpu010"], "gpu09, gpu010"),
        ([f"gpu{n}.dc2.example.org" for n in (1, 2, 3)], "gpu[1:3].dc2.example.org"),
        ([f"10.0.{n}.7" for n in (1, 2, 3)], "10.0.[1:3].7"),
        ([], ""),
    ],
)
def test_names_of_hosts_as_an_inventory_has_them(names: list[str], expected: str) -> None:
    assert report.ranges(names) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([0], "GPU 0"), ([0, 1, 2, 3], "GPUs 0-3"), ([2, 0], "GPUs 0, 2"), ([7, 0, 1, 5], "GPUs 0-1, 5, 7")],
)
def test_gpus_by_number(numbers: list[int], expected: str) -> None:
    assert report.indices(numbers) == expected


def test_long_names_lose_their_middle() -> None:
    assert report.shorten("organisation/model-instruct", 15) == "organi...struct"
    assert report.shorten("short", 5) == "short"


@given(st.text(max_size=40), st.integers(3, 30))
def test_shortened_is_never_longer(name: str, width: int) -> None:
    assert len(report.shorten(name, width)) == min(len(name), width)


def test_concurrency_is_never_rounded_up() -> None:
    """Seven requests and most of an eighth are not eight."""
    assert (report.floored(7.96), report.floored(1234.5)) == ("7.9", "1,234.5")


amounts = st.lists(st.integers(0, 200 * GIB), min_size=7, max_size=7).filter(any)


@given(amounts, st.integers(1, 2))
@example([0, 0, 0, 0, 1, 5368709, 0], 2)  # all of it is lost in rounding
def test_shown_parts_add_up_to_the_shown_total(parts: list[int], digits: int) -> None:
    drawn = report.bar("", parts, digits)
    shown = {part["key"]: float(part["amount"].replace(",", "")) for part in drawn["parts"]}
    assert sum(shown.values()) == pytest.approx(float(drawn["total"].split()[0].replace(",", "")), abs=1e-6)
    step = 10**-digits
    wrong = [
        key
        for key, amount in zip((part.key for part in report.PARTS), parts, strict=True)
        if amount and abs(shown[key] - amount / GIB) > 0.5001 * step
    ]
    assert len(wrong) <= 1  # the one that takes what rounding leaves over
    assert sum(part["percent"] for part in drawn["parts"]) == pytest.approx(100, abs=0.01)


@given(amounts, st.integers(10, 60))
def test_a_bar_is_full_and_shows_all_there_is(parts: list[int], width: int) -> None:
    drawn = report.drawn(parts, width)
    assert len(drawn) == width
    assert list(dict.fromkeys(drawn)) == [part.mark for part, amount in zip(report.PARTS, parts, strict=True) if amount]


def test_a_part_is_as_long_as_it_is_large() -> None:
    parts = [0, 0, 60 * GIB, 0, 0, 20 * GIB, 20 * GIB]
    assert report.drawn(parts, 10) == "######==.."


def test_every_figure_of_a_plan_is_of_one_part() -> None:
    fields = [field for part in report.PARTS for field in part.fields]
    assert sorted(fields) == sorted(set(row()) - {"gpu", "total_bytes"})
    assert sum(report.amounts_of(row())) == H200
    assert len({part.mark for part in report.PARTS}) == len(report.PARTS)


# --- the table ----------------------------------------------------------------------------------------------


def test_table_of_one_host() -> None:
    box = host(plan(), refusal(), gpus=[gpu(0), gpu(1)])
    assert (
        text(report.table({"box": box}, 72))
        == """\
% others: held by other processes and instances
: runtime: CUDA context, communication and what vLLM does not count
# weights: the model itself
+ activations: of one step at its largest
^ graphs: CUDA graphs
= KV cache: the tokens of running requests
. spare: left free

box
  2 x NVIDIA H200 139.8 GiB, driver 580.159.04, vLLM 0.32.0
  GPU 1: not used.

  qwen  Qwen/Qwen2.5-7B-Instruct  GPU 0
    GPU 0 [:#####+^====================......................] 139.8 GiB
    : runtime 1.4  # weights 14.3  + activations 1.1  ^ graphs 0.5
    = KV cache 55.6  . spare 66.9
    KV 55.6 GiB = 1,041,840 tokens; 63.5 requests of 16,384 tokens at
      once; wanted 8
    Host: memory 20.0 GiB, /dev/shm 0.2 GiB, disk 14.2 GiB
    Flags: max_model_len=16384 max_num_seqs=8
      gpu_memory_utilization=0.968

  big  DOES NOT FIT

1 host with 2 GPUs, 1 instance planned: 73.0 GiB of 279.6 GiB. 1
instance does not fit."""
    )


def test_hundred_equal_hosts_are_shown_once() -> None:
    lines = report.table(fleet(), 72)
    assert "gpu[001:100] (100 hosts)" in lines
    assert len(lines) < 30
    assert text(lines).count("qwen  Qwen/") == 1


def test_a_host_that_differs_is_shown_by_itself() -> None:
    hosts = fleet()
    hosts["gpu050"] = host(plan(users=9), refusal())
    lines = report.table(hosts, 72)
    assert "gpu[001:049], gpu[051:100] (99 hosts)" in lines
    assert "gpu050" in lines
    assert text(lines).count("wanted 9") == 1


def test_what_cannot_be_seen_does_not_part_hosts() -> None:
    one, two = host(plan()), host(plan(fingerprint="another"), gpus=[gpu(0, uuid="GPU-b", memory_free_bytes=7)])
    assert "gpu[1:2] (2 hosts)" in report.table({"gpu1": one, "gpu2": two})
    assert len(report.page({"gpu1": one, "gpu2": two})["cards"]) == 1


def test_equal_gpus_of_a_model_have_one_bar() -> None:
    rows = [row(index) for index in range(4)] + [row(index, weights=10**9) for index in range(4, 8)]
    flags = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    lines = report.table({"box": host(plan(rows=rows, flags=flags), gpus=[gpu(index) for index in range(8)])}, 72)
    bars = [line for line in lines if "[" in line]
    assert [line.split("[")[0].strip() for line in bars] == ["GPUs 0-3", "GPUs 4-7"]
    assert all(line.endswith("139.8 GiB each") for line in bars)
    assert len({line.index("[") for line in bars}) == 1
    assert "GPUs 0-7, tp 4, pp 2" in text(lines)
    assert "KV 55.6 GiB on each GPU = 1,041,840 tokens" in unwrapped(lines)


def test_caches_of_different_size_are_told() -> None:
    rows = [row(0), row(1, kv_cache=9 * GIB)]
    assert "KV 9.0 GiB to 55.6 GiB on each GPU" in unwrapped(report.table({"box": host(plan(rows=rows))}))


def test_a_shared_gpu_is_recognised() -> None:
    lines = report.table({"box": shared()}, 72)
    assert "    GPU 0 is shared with two." in lines
    assert "    GPU 0 is shared with one." in lines
    assert all("[%%" in line for line in lines if line.startswith("    GPU 0 ["))
    assert "GPU 1: not used." in text(lines)


def test_instances_of_a_partitioned_gpu_are_no_neighbours_in_memory() -> None:
    mig = gpu(0, mig={"enabled": True, "instances": [{}, {}]})
    half = 60 * GIB
    both = [plan(name, [row(0, half, kv_cache=GIB)]) for name in ("one", "two")]
    lines = report.table({"box": host(*both, gpus=[mig])}, 72)
    assert "1 x NVIDIA H200 139.8 GiB in 2 MIG instances" in text(lines)
    assert "GPU 0 is cut into MIG instances, and carries two as well." in unwrapped(lines)
    devices = report.page({"box": host(*both, gpus=[mig])})["cards"][0]["devices"]
    assert [(each["label"], each["says"], each["total"]) for each in devices] == [
        ("GPU 0 (MIG)", "one", "60.00 GiB"),
        ("GPU 0 (MIG)", "two", "60.00 GiB"),
    ]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, "Not planned: this run did not look at this host."),
        (host(gpus=[], platform="cpu", driver_version=None), "CPU: not planned."),
        ({**host(gpus=[], driver_version=None), "planned": False}, "GPUs not looked at"),
        ({**host(gpus=[], driver_version=None), "planned": False}, "Not planned: vllm_plan is false here."),
        (host(), "No models."),
        (host(plan(), gpus=[gpu(0), gpu(1), gpu(2)]), "GPUs 1-2: not used."),
        (host(plan(), gpus=[gpu(0), gpu(1, problem="is lost")]), "GPU 1 cannot be used: is lost"),
        (host(plan(warnings=["CUDA graphs are off."])), "Warning: CUDA graphs are off."),
        (host(plan(max_concurrency=None, kv_cache_tokens=0, users=None)), "No KV cache needed; no users declared"),
        (host(plan(context=4096)), "wanted 8 of 4,096 tokens"),
        (host({"name": "odd"}), "odd DOES NOT FIT"),
    ],
)
def test_what_else_there_is_to_say_is_in_table_and_page(document: dict[str, Any], expected: str) -> None:
    assert expected in unwrapped(report.table({"box": document}))
    said = expected.removeprefix("Warning: ").partition(" DOES")[0]
    assert said in " ".join(Page(controller.plan_page({"box": document})).text.split())


@pytest.mark.parametrize("memory", [None, 0])
def test_a_gpu_of_unknown_size_is_shown(memory: int | None) -> None:
    document = host(gpus=[gpu(0, memory_total_bytes=memory)], driver_version=None)
    assert "  1 x NVIDIA H200, vLLM 0.32.0" in report.table({"box": document})
    Page(controller.plan_page({"box": document}))


words = st.text(max_size=60)


@given(words, words, words, st.integers(60, 100), st.integers(1, 16))
def test_no_line_is_longer_than_the_terminal(name: str, source: str, said: str, width: int, gpus: int) -> None:
    rows = [row(index * 2) for index in range(gpus)]
    model = {"source": source * 3, "revision": None, "architecture": "X", "parameters": None}
    fits = [
        {"change": said, "users": 1, "context": 1, "gpus": 1, "flags": {}, "kv_cache_bytes": 1, "max_concurrency": 1.0}
    ]
    documents = [
        plan(name, rows, model=model, warnings=[said], flags={"chat_template": said, "override": {"a": [said]}}),
        refusal(name, reason=said * 3, fits=fits),
    ]
    hosts = {name: host(*documents, gpus=[gpu(0, name=said)], driver_version=said)}
    lines = [*report.table(hosts, width), *report.refusal_table(hosts, width)]
    assert max(map(len, lines)) <= width
    assert all(line.isprintable() and line == line.rstrip() for line in lines)


# --- refusals -----------------------------------------------------------------------------------------------


def test_refusal_with_its_numbers_and_what_would_fit() -> None:
    assert report.refusal_table({"box": host(plan(), refusal())}, 72) == [
        "1 instance does not fit.",
        "",
        "big on box",
        "  Qwen/Qwen2.5-72B-Instruct-AWQ does not fit: 42.78 GiB are needed on",
        "  one GPU, and 23.55 are free.",
        "  needs [#####################################################] 44.0 GiB",
        "         GPU memory on one GPU, tensor_parallel_size 1",
        "  has   [############################                         ] 23.5 GiB",
        "         free GPU memory on one GPU",
        "  What would fit:",
        "  - 2 GPUs like NVIDIA GeForce RTX 4090 instead of 1",
        "    2 GPUs, 4 users, 8,192 tokens each, KV 2.5 GiB for 4.9 requests at",
        "      once",
    ]


def test_nothing_refused_is_nothing_to_say() -> None:
    assert report.refusal_table({"box": host(plan()), "other": {}}) == []


def test_hosts_that_refuse_alike_stand_together() -> None:
    lines = report.refusal_table(fleet() | {"odd": host(refusal("odd"), refusal())}, 72)
    assert lines[0] == "102 instances do not fit."
    assert [line for line in lines if " on " in line and not line.startswith(" ")] == [
        "big on gpu[001:100], odd (101 hosts)",
        "odd on odd",
    ]


def test_refusal_that_is_not_about_bytes_has_no_bars() -> None:
    nothing = {"what": "GPU memory", "bytes": 0}
    lines = report.refusal_table({"box": host(refusal(needs=nothing, has=nothing, fits=[]))}, 72)
    assert not any("[" in line for line in lines)
    assert lines[-1] == "  Nothing near it was found that fits."


# --- the page -----------------------------------------------------------------------------------------------

VOID = {"meta", "br"}
LOADING = {"src", "srcset", "data", "action", "poster", "background", "formaction", "ping"}


class Page(HTMLParser):
    """Reads a page, and objects to what is not well-formed, runs, or comes from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.style = ""
        self.feed(page)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert {link.removeprefix("#") for link in self.links} <= set(self.ids)
        assert not re.search(r"url\(|@import|expression", self.style)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "form", "base", "svg"}, tag
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in LOADING, name
            if name == "href":
                assert value.startswith("#"), value
                self.links.append(value)
            if name == "style":
                assert re.fullmatch(r"width:\d+(\.\d+)?%", value), value
            if name == "id":
                self.ids.append(value)
            if name in ("title", "aria-label"):
                self.titles.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)


def numbers_of(hosts: dict[str, Any]) -> Iterator[str]:
    for name, document in hosts.items():
        yield name
        for entry in document["plans"]:
            if "refusal" in entry:
                refused = entry["refusal"]
                yield from (refused["reason"], f"{refused['needs']['bytes'] / GIB:.2f} GiB")
                yield f"{refused['has']['bytes'] / GIB:.2f} GiB"
                for fit in refused["fits"]:
                    yield from (fit["change"], f"{fit['kv_cache_bytes'] / GIB:.2f} GiB", f"{fit['context']:,} tokens")
                continue
            found = entry["plan"]
            for memory in found["memory"]:
                yield f"{memory['total_bytes'] / GIB:.2f} GiB"
                yield from (f"{memory[f'{part}_bytes'] / GIB:.2f}" for part in ("weights", "activation", "cudagraph"))
                yield f"{(memory['context_bytes'] + memory['non_torch_bytes'] + memory['unaccounted_bytes']) / GIB:.2f}"
                yield f"{memory['kv_cache_bytes'] / GIB:.2f} GiB"
            yield from (f"{found['kv_cache_tokens']:,} tokens", f"wanted {found['users']}")
            yield f"{found['flags']['max_model_len']:,} tokens"
            yield from (f"{name}={value}" for name, value in found["flags"].items())
            yield from (f"{amount / GIB:.2f} GiB" for amount in found["host"].values())
            yield from (found["model"]["source"], found["model"]["revision"], found["model"]["architecture"])
            yield f"{found['model']['parameters']:,} parameters"
            yield from found["reasons"]


@pytest.mark.parametrize("size", [1, 100])
def test_page_says_all_that_the_plans_say(size: int) -> None:
    hosts = fleet(size)
    page = Page(controller.plan_page(hosts))
    said = " ".join(page.text.split())
    assert [each for each in numbers_of(hosts) if each not in said] == []
    assert page.tags.count("details") == 2  # one card for all hosts, and in it the reasons
    assert len(page.links) == size
    assert f"{size:,} " in said


def test_page_is_one_file_that_runs_nothing() -> None:
    page = controller.plan_page(fleet(2))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|//|@import|javascript:", page)
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_page_of_the_same_plans_is_the_same() -> None:
    assert controller.plan_page(fleet(3)) == controller.plan_page(fleet(3))


def test_page_holds_nothing_but_what_is_shown() -> None:
    """An environment may hold keys."""
    page = controller.plan_page(fleet(1))
    assert "not-to-be-shown" not in page
    assert "GPU-0" not in page


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}{% raw %}"


def test_hostile_words_stay_words() -> None:
    model = {"source": HOSTILE, "revision": HOSTILE, "architecture": HOSTILE, "parameters": 1}
    fits = [{"change": HOSTILE, "users": 1, "context": 1, "gpus": 1, "flags": {HOSTILE: HOSTILE}, "source": HOSTILE}]
    side = {"what": HOSTILE, "bytes": 1}
    hosts = {
        HOSTILE: host(
            plan(HOSTILE, model=model, reasons=[HOSTILE], warnings=[HOSTILE], flags={HOSTILE: HOSTILE}),
            plan("neighbour"),
            refusal(HOSTILE, reason=HOSTILE, needs=side, has=side, fits=fits),
            gpus=[gpu(0, name=HOSTILE), gpu(1, problem=HOSTILE)],
            driver_version=HOSTILE,
            engine_version=HOSTILE,
        )
    }
    page = Page(controller.plan_page(hosts))  # which objects to scripts, images and handlers
    assert page.text.count(HOSTILE) > 10
    assert any(HOSTILE in title for title in page.titles)


def test_a_shared_gpu_has_one_bar_with_everybody_on_it() -> None:
    document = shared()
    first, second = report.page({"box": document})["cards"][0]["devices"]
    parts = {part["key"]: part["amount"] for part in first["parts"]}
    assert (first["says"], second["says"]) == ("one, two", "not used")
    assert parts["kv"] == "70.00"
    assert float(parts["weights"]) == pytest.approx(2 * 15_343_488_000 / GIB, abs=0.01)
    assert float(parts["others"]) == pytest.approx(10**10 / GIB, abs=0.01)
    assert float(parts["spare"]) == pytest.approx(document["expected_spare"] / GIB, abs=0.01)


def test_tiles_count() -> None:
    hosts = fleet(3) | {"two": host(plan(), plan("other"), gpus=[gpu(0), gpu(1)])}
    tiles = report.page(hosts)["tiles"]
    assert [(tile["number"], tile["what"]) for tile in tiles[:5]] == [
        ("4", "hosts"),
        ("5", "GPUs"),
        ("3", "models"),
        ("5", "instances"),
        ("3", "refused"),
    ]
    assert (tiles[5]["number"], tiles[5]["what"]) == ("364.9 GiB", "planned of 699.0 GiB")
    assert [tile["bad"] for tile in tiles] == [False] * 4 + [True, False]


# --- colours ------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def schemes() -> list[dict[str, str]]:
    template = (ROOT / "playbooks/templates/plan.html.j2").read_text()
    blocks = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme: dict[str, str]) -> None:
    assert {part.key for part in report.PARTS} <= set(scheme)
    with_graphs = [part.key for part in report.PARTS]
    without = [key for key in with_graphs if key != "graphs"]
    for one, two in (*itertools.pairwise(with_graphs), *itertools.pairwise(without)):
        assert contrast(scheme[one], scheme[two]) >= 3, (one, two)
    for ink, ground in itertools.product(("ink", "soft", "bad", "warn"), ("page", "card")):
        assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)
    for ground in ("weights", "kv", "others"):
        assert contrast(scheme["on-dark"], scheme[ground]) >= 4.5, ground
    assert contrast(scheme["on-graphs"], scheme["graphs"]) >= 4.5
    for ground in ("runtime", "activations", "spare"):
        assert contrast(scheme["ink"], scheme[ground]) >= 4.5, ground


# --- as the user sees it ------------------------------------------------------------------------------------


def inventory(folder: Path, hosts: dict[str, Any], **variables: Any) -> Path:
    folder.mkdir()
    there = {name: {"vllm_plans": document} if document else {} for name, document in hosts.items()}
    groups = {"engines": {"hosts": there, "vars": variables}}
    (folder / "engines.json").write_text(json.dumps(groups))
    return folder


SHOW = [{"name": "Show", "ansible.builtin.import_playbook": "llmfleet.serving.plan"}]


def test_plan_is_shown_and_its_page_written_once(run_playbook: Any, tmp_path: Path) -> None:
    where = inventory(tmp_path / "inventory", {"host1": host(plan()), "host2": host(plan())})
    done = run_playbook(SHOW, hosts=2, inventory=where)
    assert done.returncode == 0, done.stdout + done.stderr
    table = text(report.table({"host1": host(plan()), "host2": host(plan())}, 72))
    shown = "\n".join(line.removeprefix(" " * 8) for line in done.stdout.splitlines())
    assert shown.count(table) == 1
    page = where / ".plan.html"
    assert f"The same as a page: {page}" in shown
    assert page.read_text() == controller.plan_page({"host1": host(plan()), "host2": host(plan())})
    assert page.stat().st_mode & 0o777 == 0o644
    ours = [line for line in done.stdout.splitlines() if line.startswith(" " * 8) and str(page) not in line]
    assert max(map(len, ours)) <= 80
    again = run_playbook(SHOW, hosts=2, inventory=where)
    assert re.findall(r"changed=(\d+)", again.stdout) == ["0", "0"]
    assert "Unable to parse" not in again.stderr  # the page is no inventory


def test_refusals_fail_once_after_the_page(run_playbook: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    hosts = {"host1": host(plan(), refusal()), "host2": host(plan(), refusal())}
    where = inventory(tmp_path / "inventory", hosts, serving_plan_page=str(page))
    done = run_playbook(SHOW, hosts=2, inventory=where)
    assert done.returncode != 0
    shown = "\n".join(line.removeprefix(" " * 8) for line in done.stdout.splitlines())
    assert shown.count(text(report.refusal_table(hosts, 72))) == 1
    assert done.stdout.count("FAILED!") == 1
    assert page.is_file()
    assert not (where / ".plan.html").exists()


def test_no_page_where_none_is_wanted(run_playbook: Any, tmp_path: Path) -> None:
    where = inventory(tmp_path / "inventory", {"host1": host(plan())}, serving_plan_page="")
    done = run_playbook(SHOW, inventory=where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as a page" not in done.stdout
    assert list(where.glob(".*")) == []
