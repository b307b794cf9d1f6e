# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""From the inventory's models to instances, and what is wrong with them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.llmfleet.serving.plugins.module_utils import _models
from hypothesis import assume, given
from hypothesis import strategies as st
from packaging.version import Version

ROOT = Path(__file__).parents[2]
VARS = yaml.safe_load((ROOT / "roles/vllm/vars/main.yml").read_text())
DEFAULTS = yaml.safe_load((ROOT / "roles/vllm/defaults/main.yml").read_text())
KNOWN = VARS["__vllm_vulnerabilities"]


def model(**changes: Any) -> dict[str, Any]:
    return {"name": "tiny", "source": "org/tiny", **changes}


def problems(*models: dict[str, Any], port: int = 8000, files: tuple[str, ...] = ()) -> list[str]:
    return _models.model_problems(models, port, {}, lambda path: path in files)


def one(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


# --- models that are right ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        model(),
        model(name="Qwen3-8B_v1.2"),
        model(name="a" * 63),
        model(source="Qwen/Qwen3-8B", revision="0123456789abcdef0123456789abcdef01234567"),
        model(revision="refs/pr/1"),
        model(revision=None, port=None, users=None, context=None, flags=None, environment=None),
        model(source="/srv/models/tiny"),
        model(source="/homes/tiny"),
        model(port=1024),
        model(port=65535),
        model(users=1, context=1),
        model(context=4096, flags={"max_num_seqs": 8}),
        model(flags={"gpu-memory-utilization": 0.9, "enforce_eager": True, "hf-overrides": {"a": None}}),
        model(environment={"VLLM_CPU_KVCACHE_SPACE": 1, "_x": ""}),
        model(copy=False, source="/srv/tiny"),
        model(variants=[{"source": "org/tiny-AWQ", "revision": "v1"}, {"source": "/srv/tiny-fp8"}]),
        model(variants=None),
    ],
)
def test_right_models_are_accepted(right: dict[str, Any]) -> None:
    assert problems(right) == []


@pytest.mark.parametrize("source", ["/home/me/tiny", "/root/tiny", "/inventories/demo/../../build/tiny"])
def test_what_is_copied_may_lie_anywhere_on_the_controller(source: str) -> None:
    """The last one as in the demo, which begins with its inventory_dir."""
    assert problems(model(source=source, copy=True), files=(f"{source}/config.json",)) == []


# --- models that are wrong: each message names the variable, the value and the remedy ------------------------


def test_no_models() -> None:
    found = one(problems())
    assert found == "vllm_models is empty: declare a model with a name and a source, or take the host out of engines."


@pytest.mark.parametrize(
    ("wrong", "names", "value", "remedy"),
    [
        *(
            (model(name=name), "name", repr(name), "at most 63 letters, digits, '.', '_' and '-'")
            for name in ("", "a b", "-a", ".a", "a/b", "a" * 64, "é", "a@b", "../a", "a\n", "%i", "a:b", "a'b")
        ),
        *((model(port=port), "port", str(port), "from 1024 to 65535") for port in (0, -1, 80, 1023, 65536)),
        *((model(users=users), "users", str(users), "at least 1") for users in (0, -3)),
        *((model(context=context), "context", str(context), "at least 1") for context in (0, -3)),
        *(
            (model(environment={name: "x"}), "environment", repr(name), "no name of an environment variable")
            for name in ("", "1A", "A-B", "A B", "A=B", "É", "A\n")
        ),
        (model(environment={"VLLM_API_KEY": "x"}), "environment", "VLLM_API_KEY", "vllm_api_key"),
        *(
            (model(source=source), "source", repr(source), "a hub id such as Qwen/Qwen3-8B, or the absolute path")
            for source in (
                *("", "tiny", "./tiny", "~/tiny", "a/b/c", "a/..", "../a", "a/", "/"[1:] + "a b/c", "a/b\n"),
                *("https://hub/a/b", "-a/b", "a/-b", "é/b", "a--b/c", "a/b--c"),
            )
        ),
        *(
            (model(revision=revision), "revision", repr(revision), "a commit, a tag or a branch")
            for revision in ("../x", "a/../b", "a b", "-x", "x" * 129, "main/", "a//b", "a/./b", "a\n", "é", "@x")
        ),
        (model(copy=True), "copy", "'org/tiny'", "no absolute path"),
        (model(source="/a", copy=True), "source", "/a", "no /a/config.json: name the model's folder"),
        (model(source="/srv/a", revision="v1"), "revision", "'v1'", "only a hub has revisions"),
        *(
            (
                model(source=source),
                "source",
                f" {source}:",
                "Move the folder, to /srv/models for one, or set copy: true",
            )
            for source in (
                *("/home/me/tiny", "/home", "/root/tiny", "/run/user/1/tiny"),
                *("/tmp/tiny", "/var/tmp/tiny"),  # noqa: S108 - nothing is written there
                *("/home//tiny", "/home/./tiny"),
            )
        ),
        (model(source="/srv/../home/tiny"), "source", "'/srv/../home/tiny'", "give the folder's path without '..'"),
        *(
            (model(flags={spelled: 1}), f"flags.{spelled}", "is set by the role", f"use {ours} in its place")
            for flag, ours in _models.OWNED.items()
            for spelled in {flag, flag.replace("-", "_")}
        ),
        (model(variants=[{"source": "a/b"}, {"source": "b"}]), "variants[1].source", "'b'", "a hub id such as"),
        (model(variants=[{"source": "a/b", "revision": "a b"}]), "variants[0].revision", "'a b'", "a commit, a tag"),
        (model(variants=[{"source": "/a", "revision": "v1"}]), "variants[0].revision", "'v1'", "only a hub has"),
        (model(flags={"dtype": None}), "flags.dtype", "has no value", "give it one, or leave it out"),
        (model(flags={"kv-cache-dtype": 1, "kv_cache_dtype": 2}), "flags", "kv-cache-dtype twice", "with '-' and"),
        (model(context=8, flags={"max_model_len": 9}), "flags.max_model_len", "9, and context is 8", "keep one"),
        (model(context=8, flags={"max-model-len": 9}), "flags.max-model-len", "9, and context is 8", "keep one"),
        (model(users=8, flags={"max_num_seqs": 9}), "flags.max_num_seqs", "9, and users is 8", "keep one"),
    ],
    ids=lambda value: "".join(f" {k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_models_are_refused(wrong: dict[str, Any], names: str, value: str, remedy: str) -> None:
    found = one(problems(model(name="fine", source="org/fine"), wrong))
    assert found.startswith(f"vllm_models[1].{names} ")
    assert value in found
    assert remedy in found


def test_names_are_unique() -> None:
    found = one(problems(model(), model(name="other"), model(source="org/another")))
    assert found.startswith("vllm_models[2].name is 'tiny', as is vllm_models[0].name: give each model a name")


@pytest.mark.parametrize("models", [[{"port": 9000}, {"port": 9000}], [{"port": 8001}, {}], [{"port": "8001"}, {}]])
def test_ports_are_unique_whether_given_or_counted(models: list[dict[str, Any]]) -> None:
    found = one(problems(*(model(name=f"m{index}", **each) for index, each in enumerate(models))))
    assert re.match(r"vllm_models\[1\]\.port is (9000|8001), as is vllm_models\[0\]\.port: give each", found)


def test_all_problems_are_told_at_once() -> None:
    found = problems(model(name="a b", port=1, users=0, flags={"port": 1}), model(source="x", revision="a b"))
    assert [problem.split(" ")[0] for problem in found] == [
        "vllm_models[0].name",
        "vllm_models[0].port",
        "vllm_models[0].users",
        "vllm_models[0].flags.port",
        "vllm_models[1].source",
        "vllm_models[1].revision",
    ]


# --- instances ----------------------------------------------------------------------------------------------


def test_instance_of_a_hub_model() -> None:
    (found,) = _models.instances([model(source="Qwen/Qwen3-8B", revision="v1")], "10.0.0.1", 8000, 120)
    assert found == {
        "name": "tiny",
        "host": "10.0.0.1",
        "port": 8000,
        "path": "/var/lib/vllm/models/Qwen--Qwen3-8B@v1",
        "hub": "Qwen/Qwen3-8B",
        "revision": "v1",
        "copy_from": "",
        "kind": "completion",
        "config": {
            "model": "/var/lib/vllm/models/Qwen--Qwen3-8B@v1",
            "served-model-name": "tiny",
            "host": "10.0.0.1",
            "port": 8000,
            "shutdown-timeout": 120,
        },
        "plan": {},
    }


def test_instance_of_a_folder_of_the_host() -> None:
    (found,) = _models.instances([model(source="/srv/tiny")], "::1", 8000, 120)
    assert (found["path"], found["hub"], found["copy_from"]) == ("/srv/tiny", "", "")


def test_instance_of_a_folder_of_the_controller() -> None:
    (found,) = _models.instances([model(source="/home/me/x", copy=True)], "::1", 8000, 120)
    assert (found["path"], found["hub"], found["copy_from"]) == ("/var/lib/vllm/models/tiny", "", "/home/me/x")
    assert found["config"]["model"] == found["path"]


def test_config_has_what_the_model_says_by_the_names_of_vllm() -> None:
    given_flags = {"gpu_memory_utilization": 0.9, "enforce-eager": True, "hf_overrides": {"a_b": 1}}
    (found,) = _models.instances([model(users="8", context=2048, flags=given_flags)], "::1", 8000, "60")
    assert {key: found["config"][key] for key in list(found["config"])[4:]} == {
        "shutdown-timeout": 60,
        "max-model-len": 2048,
        "max-num-seqs": 8,
        "gpu-memory-utilization": 0.9,
        "enforce-eager": True,
        "hf-overrides": {"a_b": 1},
    }


def planned(**flags: Any) -> list[dict[str, Any]]:
    return [{"name": "other", "refusal": {}}, {"name": "tiny", "plan": {"name": "tiny", "flags": flags}}]


def config_of(*plans: dict[str, Any], **changes: Any) -> dict[str, Any]:
    (found,) = _models.instances([model(**changes)], "::1", 8000, 120, plans)
    return {key: found["config"][key] for key in list(found["config"])[5:]}


def test_flags_of_the_plan_stand_below_the_users_own() -> None:
    plan = planned(max_model_len=4096, max_num_seqs=4, dtype="bfloat16", max_num_batched_tokens=8192)
    found = config_of(*plan, context=4096, users=8, flags={"max-num-batched-tokens": "8k", "seed": 1})
    assert found == {
        "max-model-len": 4096,
        "max-num-seqs": 4,
        "dtype": "bfloat16",
        "max-num-batched-tokens": "8k",
        "seed": 1,
    }


@pytest.mark.parametrize("value", ["auto", -1])
def test_length_that_is_left_to_the_plan_is_the_plans(value: object) -> None:
    assert config_of(*planned(max_model_len=4096), flags={"max_model_len": value})["max-model-len"] == 4096
    assert config_of(flags={"max_model_len": value})["max-model-len"] == value


def test_plan_that_was_stored_gives_the_same_file() -> None:
    """Whatever has become of the order of its keys: a file in another order would restart the engine."""
    fresh = planned(max_model_len=4096, gpu_memory_utilization=0.9, dtype="bfloat16")
    (stored,) = fresh[1:]
    stored = {"name": "tiny", "plan": {"flags": dict(sorted(stored["plan"]["flags"].items()))}}
    assert list(config_of(*fresh)) == list(config_of(stored))


def test_model_without_a_plan_runs_by_its_own_flags() -> None:
    assert config_of(users=2) == config_of({"name": "tiny", "refusal": {"reason": "x"}}, users=2) == {"max-num-seqs": 2}
    (found,) = _models.instances([model()], "::1", 8000, 120, planned(seed=1)[:1])
    assert found["plan"] == {}


def test_ports_count_from_the_first_and_a_given_one_stays() -> None:
    models = [model(name="a"), model(name="b", port=9000), model(name="c")]
    assert [each["port"] for each in _models.instances(models, "::1", 8000, 120)] == [8000, 9000, 8002]


def test_pooling_models_are_asked_for_an_embedding() -> None:
    found = _models.instances([model(flags={"runner": "pooling"}), model(name="b")], "::1", 8000, 120)
    assert [each["kind"] for each in found] == ["embedding", "completion"]


def test_instances_hold_nothing_of_the_environment() -> None:
    """They go through module arguments, which are logged; the environment can hold secrets."""
    found = _models.instances([model(environment={"TOKEN": "hidden"})], "::1", 8000, 120)
    assert "hidden" not in repr(found)


def test_models_of_another_source_or_revision_have_another_folder() -> None:
    paths = {
        _models.model_path(model(source=source, revision=revision))
        for source in ("a/b", "a/c")
        for revision in ("main", "v1", "refs/pr/1")
    }
    assert len(paths) == 6
    assert _models.model_path(model()) == _models.model_path(model(revision="main"))


@pytest.mark.parametrize("source", ["vllm/models", "lib/vllm", "var/lib", "r/l"])
def test_hub_ids_that_look_like_the_models_folder(source: str) -> None:
    assert _models.model_path(model(source=source)) == f"/var/lib/vllm/models/{source.replace('/', '--')}@main"


def test_outputs_for_others() -> None:
    found = _models.instances([model(environment={"TOKEN": "secret"}, flags={"seed": 1})], "10.0.0.1", 8000, 120)
    assert _models.endpoints(found, ["10.0.0.9"]) == [
        {"model": "tiny", "host": "10.0.0.1", "port": 8000, "kind": "completion", "clients": ["10.0.0.9"]}
    ]
    assert _models.probes(found) == [{"name": "tiny", "host": "10.0.0.1", "port": 8000, "kind": "completion"}]
    assert _models.watched(found, "/etc/vllm", ["/unit", "/recipe"]) == [
        {
            "name": "tiny",
            "paths": [
                *("/etc/vllm/tiny.yaml", "/etc/vllm/tiny.env"),
                *("/var/lib/vllm/models/org--tiny@main", "/unit", "/recipe"),
            ],
        }
    ]


# --- any models ---------------------------------------------------------------------------------------------

# Short and few, so that they meet; right ones often enough, so that whole lists are accepted.
word = st.text("ab", min_size=1, max_size=2)
anything = st.text(max_size=4)
hub_id = st.one_of(
    st.builds("{}/{}".format, word, word),
    st.sampled_from(["a--b/c", "a/b--c", "vllm/models", "var/lib", "l/v", "a/..", "a/b/c"]),
    st.builds("{}/{}".format, st.text("a-._é", max_size=4), st.text("a-._", max_size=4)),
)
revision = st.one_of(st.none(), word, st.just("main"), st.text("ab./-_@", max_size=5), anything)
any_model = st.fixed_dictionaries(
    {"name": st.one_of(word, st.text("ab.-_/ ", max_size=3), anything)},
    optional={
        "source": st.one_of(hub_id, hub_id, st.builds("/srv/{}".format, word), st.just("/home/x"), anything),
        "copy": st.booleans(),
        "revision": revision,
        "context": st.integers(-1, 3),
        "users": st.integers(-1, 3),
        "port": st.one_of(st.none(), st.integers(7999, 8004), st.integers(-1, 70000)),
        "flags": st.one_of(
            st.none(),
            st.dictionaries(
                st.sampled_from(["seed", "max-model-len", "max_model_len", "max_num_seqs", "port", "a_b", "a-b"]),
                st.one_of(st.none(), st.integers(), st.booleans(), anything),
                max_size=3,
            ),
        ),
        "environment": st.one_of(st.none(), st.dictionaries(anything, anything, max_size=1)),
    },
)


@given(st.lists(any_model, max_size=4), st.integers(-1, 66000))
def test_any_models_are_accepted_or_refused_in_words(models: list[dict[str, Any]], port: int) -> None:
    for found in _models.model_problems(models, port, {}, lambda _path: True):
        assert re.match(r"vllm_models(\[\d\])?[. ]", found)
        assert found.endswith(".")
        assert ": " in found


right_model = st.fixed_dictionaries(
    {"name": st.text("abc.-_", min_size=1, max_size=3).filter(_models.NAME.fullmatch)},
    optional={
        "source": st.one_of(hub_id, st.just("/srv/x")),
        "copy": st.booleans(),
        "revision": revision,
        "context": st.integers(1, 3),
        "users": st.integers(1, 3),
        "port": st.one_of(st.none(), st.integers(7999, 8004)),
        "flags": st.one_of(st.none(), st.dictionaries(st.sampled_from(["seed", "a_b", "max-num-seqs"]), st.integers())),
    },
).map(lambda each: {"source": "a/b", **each})


@given(st.lists(right_model, min_size=1, max_size=4))
def test_accepted_models_make_instances_that_do_not_meet(models: list[dict[str, Any]]) -> None:
    assume(_models.model_problems(models, 8000, {}, lambda _path: True) == [])
    found = _models.instances(models, "127.0.0.1", 8000, 120)
    assert len({each["name"] for each in found}) == len(models)
    assert len({each["port"] for each in found}) == len(models)
    for each in found:
        assert 1024 <= each["port"] <= 65535
        assert None not in each["config"].values()
        assert each["config"]["port"] == each["port"]
        assert not any("_" in name for name in each["config"])
        # What the role writes and watches for an instance, is that of no other.
        assert Path(f"{each['name']}.yaml").stem == each["name"]
    files = [path for each in _models.watched(found, "/etc/vllm", []) for path in each["paths"][:2]]
    assert len(set(files)) == 2 * len(models)


@given(st.lists(st.tuples(hub_id, revision), min_size=1, max_size=6))
def test_hub_folders_are_one_for_each_source_and_revision(wanted: list[tuple[str, str | None]]) -> None:
    accepted = {
        (source, rev or "main")
        for source, rev in wanted
        if problems(model(source=source, revision=rev)) == [] and not source.startswith("/")
    }
    paths = [_models.model_path(model(source=source, revision=rev)) for source, rev in accepted]
    assert len({posixpath.normpath(path) for path in paths}) == len(accepted)
    for path in paths:
        assert ".." not in path.split("/")
        assert posixpath.normpath(path).startswith(f"{_models.MODELS_DIR}/")


# --- versions -----------------------------------------------------------------------------------------------


def findings(version: Any, *accepted: str) -> dict[str, list[str]]:
    return _models.version_findings(version, KNOWN, accepted)


def ids_before(version: str) -> list[str]:
    return [entry["id"] for entry in KNOWN if Version(version) < Version(entry["fixed"])]


def test_default_version_has_no_findings() -> None:
    assert findings(DEFAULTS["vllm_version"]) == {"problems": [], "warnings": []}
    assert findings("99") == {"problems": [], "warnings": []}


def test_table_of_vulnerabilities_is_whole() -> None:
    assert all(set(entry) == {"id", "fixed", "what"} for entry in KNOWN)
    assert len({entry["id"] for entry in KNOWN}) == len(KNOWN)
    assert max(Version(entry["fixed"]) for entry in KNOWN) == _models.ADVISED
    assert {entry["id"]: Version(entry["fixed"]) for entry in KNOWN}["CVE-2026-48746"] == _models.FLOOR


@pytest.mark.parametrize("version", ["0.22.0", "0.31.1", "0.32.0rc1"])
def test_later_version_with_holes_is_warned_about(version: str) -> None:
    found = findings(version)
    assert found["problems"] == []
    warning = one(found["warnings"])
    assert warning.startswith(f"vllm_version is {version}, which has ")
    assert all(known in warning for known in ids_before(version))
    assert "CVE-2026-48746" not in warning
    assert warning.endswith("Use 0.32.0 or newer.")


def test_only_what_is_not_accepted_is_warned_about() -> None:
    warning = one(findings("0.31.0", "PYSEC-2026-4344")["warnings"])
    assert "PYSEC-2026-4349" in warning
    assert "PYSEC-2026-4344" not in warning
    assert findings("0.31.0", "PYSEC-2026-4344", "PYSEC-2026-4349") == {"problems": [], "warnings": []}


@pytest.mark.parametrize("version", ["0.21.0", "0.22.0rc1", "0.9.1", "0.21.0+cu129"])
def test_version_below_the_floor_is_refused_with_the_way_out(version: str) -> None:
    problem = one(findings(version)["problems"])
    assert problem.startswith(f"vllm_version is {version}, below 0.22.0, and has ")
    assert "CVE-2026-48746 (the API key can be bypassed, fixed in 0.22.0)" in problem
    assert "Use 0.32.0 or newer." in problem
    named = re.search(r"sets vllm_accept_known_vulnerabilities: \[(.*)\]\.$", problem)
    assert named
    assert findings(version, *named[1].split(", ")) == {"problems": [], "warnings": []}
    assert findings(version, *named[1].split(", ")[1:])["problems"]


def test_version_below_the_floor_is_refused_even_where_the_table_has_nothing() -> None:
    problem = one(_models.version_findings("0.1.0", [], [])["problems"])
    assert problem.startswith("vllm_version is 0.1.0, below 0.22.0, and has known holes. Use 0.32.0 or newer.")


@pytest.mark.parametrize("version", ["latest", "", "0.32.x", "v 1"])
def test_what_is_no_version_is_refused(version: str) -> None:
    problem = one(findings(version)["problems"])
    assert problem == f"vllm_version is {version!r}: give a release such as 0.32.0."


def test_version_that_yaml_reads_as_a_number_is_refused() -> None:
    """YAML's 0.30 is 0.3, another version."""
    assert one(findings(0.30)["problems"]) == "vllm_version is 0.3: give a release such as 0.32.0."


# --- the host -----------------------------------------------------------------------------------------------


def host(**changes: Any) -> dict[str, Any]:
    disks = {"/opt/vllm": {"free_bytes": 30 * 2**30, "device": 1}}
    disks["/var/lib/vllm/models"] = {"free_bytes": 30 * 2**30, "device": 1}
    found = {"disks": disks, "files": {}, "taken_ports": {}, "nvidia_driver_version": "580.159.04"}
    return {**found, **changes}


def host_problems(*models: dict[str, Any], needs: dict[str, int] | None = None, **changes: Any) -> list[str]:
    platform = changes.pop("platform", "cuda")
    found = _models.instances(models or [model()], "10.0.0.1", 8000, 120)
    return _models.host_problems(found, host(**changes), needs or {"/opt/vllm": 0}, platform)


def test_host_that_has_everything() -> None:
    assert host_problems(needs={"/opt/vllm": 25 * 2**30, "/var/lib/vllm/models": 0}) == []
    assert host_problems(model(source="/srv/x"), files={"/srv/x/config.json": "{}"}) == []
    assert host_problems(model(source="/srv/x", copy=True)) == []


def test_taken_port() -> None:
    found = one(host_problems(model(), model(name="b"), taken_ports={"8001": "prometheus"}))
    assert found == (
        "vllm_models[1].port is 8001, but prometheus listens there: choose another port, or stop that program."
    )


@pytest.mark.parametrize("files", [{}, {"/srv/x/config.json": None}])
def test_folder_that_the_host_lacks(files: dict[str, Any]) -> None:
    found = one(host_problems(model(), model(name="b", source="/srv/x"), files=files))
    assert found.startswith("vllm_models[1].source is /srv/x, but this host has no /srv/x/config.json: name the")
    assert found.endswith("or set copy: true to copy it from the controller.")


def test_needs_on_one_file_system_add_up() -> None:
    needs = {"/opt/vllm": 20 * 2**30, "/var/lib/vllm/models": 10 * 2**30}
    assert host_problems(needs=needs) == []
    needs["/opt/vllm"] += 2**29
    found = one(host_problems(needs=needs))
    assert found.startswith("/opt/vllm and /var/lib/vllm/models need 30.5 GiB and have 30.0 GiB free: make room")
    assert "vllm_required_free_bytes" in found


def test_needs_on_two_file_systems_do_not_add_up() -> None:
    disks = host()["disks"]
    disks["/opt/vllm"]["device"] = 2
    needs = {"/opt/vllm": 20 * 2**30, "/var/lib/vllm/models": 20 * 2**30}
    assert host_problems(needs=needs, disks=disks) == []
    disks["/opt/vllm"]["free_bytes"] = 2**30
    assert one(host_problems(needs=needs, disks=disks)).startswith("/opt/vllm need 20.0 GiB and have 1.0 GiB free")


def test_what_needs_nothing_is_not_told_of() -> None:
    disks = host()["disks"]
    disks["/opt/vllm"]["free_bytes"] = 0
    disks["/var/lib/vllm/models"]["free_bytes"] = 0
    assert host_problems(needs={"/opt/vllm": 0, "/var/lib/vllm/models": 0}, disks=disks) == []
    found = one(host_problems(needs={"/opt/vllm": 0, "/var/lib/vllm/models": 1}, disks=disks))
    assert found.startswith("/var/lib/vllm/models need ")


def test_cuda_needs_a_driver() -> None:
    found = one(host_problems(nvidia_driver_version=None))
    assert found.startswith("vllm_platform is cuda, but no NVIDIA driver is loaded on this host: install one")
    assert found.endswith("or set vllm_platform: cpu.")
    assert host_problems(nvidia_driver_version=None, platform="cpu") == []


# --- who may speak to it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "clients", "elsewhere"),
    [
        ("127.0.0.1", [], []),
        ("::1", ["::1"], []),
        ("10.77.1.11", ["10.77.1.12", "10.77.2.0/24", "fd77::/64", "10.77.1.1/24"], ["gateway1"]),
    ],
)
def test_right_addresses(address: str, clients: list[str], elsewhere: list[str]) -> None:
    assert _models.client_problems(address, clients, elsewhere) == []


@pytest.mark.parametrize(
    ("address", "elsewhere", "expected"),
    [
        ("engine1", [], "vllm_host is 'engine1': give the IP address that vLLM is to listen on."),
        ("", [], "vllm_host is '': give the IP address"),
        ("0.0.0.0", [], "vllm_host is 0.0.0.0, which is every address: give the one that"),  # noqa: S104 - refused
        ("::", ["gw1"], "vllm_host is ::, which is every address"),
        ("127.0.0.1", ["gw1", "gw2"], "vllm_host is 127.0.0.1, but gw1, gw2 must reach it from another host: set"),
        ("::1", ["gw1"], "vllm_host is ::1, but gw1 must reach it"),
    ],
)
def test_wrong_addresses(address: str, elsewhere: list[str], expected: str) -> None:
    assert one(_models.client_problems(address, ["10.0.0.2"], elsewhere)).startswith(expected)


def test_gateways_that_no_rule_lets_in() -> None:
    found = one(_models.client_problems("10.0.0.1", [], ["gw1"]))
    assert found.startswith("vllm_allowed_clients is empty, but gw1 must reach this host: set it")


GPU_HOST = {"taken_ports": {}, "files": {}, "disks": {}}


@pytest.mark.parametrize(
    ("version", "branch", "expected"),
    [
        (None, 580, "no NVIDIA driver is loaded on this host: install one"),
        (
            "570.133.20",
            580,
            "The NVIDIA driver is 570.133.20, but the torch that vLLM brings needs 580 or newer: install",
        ),
    ],
)
def test_drivers_that_do_not_do(version: str | None, branch: int, expected: str) -> None:
    assert expected in one(
        _models.host_problems([], {**GPU_HOST, "nvidia_driver_version": version}, {}, "cuda", branch)
    )


@pytest.mark.parametrize(("version", "branch"), [("580.159.04", 580), ("570.133.20", 0), ("610.1", 580)])
def test_drivers_that_do(version: str, branch: int) -> None:
    assert _models.host_problems([], {**GPU_HOST, "nvidia_driver_version": version}, {}, "cuda", branch) == []


@pytest.mark.parametrize("client", ["gateway1", "gateway.example.org", "10.0.0.256", "10.0.0.0/33", "", "any"])
def test_clients_that_systemd_does_not_take(client: str) -> None:
    found = one(_models.client_problems("10.0.0.1", ["10.0.0.2", client], []))
    assert found.startswith(f"vllm_allowed_clients has {client!r}: systemd's IPAddressAllow= takes addresses")
    assert found.endswith("Set vllm_allowed_clients to the gateways' addresses.")


@pytest.mark.parametrize(("size", "shown"), [(0, "0.0 GiB"), (2**30, "1.0 GiB"), (26843545600, "25.0 GiB")])
def test_sizes_are_shown_in_gib(size: int, shown: str) -> None:
    assert _models.gib(size) == shown


@pytest.mark.parametrize("name", ["1A", "A-B", "", "VLLM_API_KEY"])
def test_environment_of_all_instances_is_checked(name: str) -> None:
    (found,) = _models.model_problems([{"name": "a", "source": "o/m"}], 8000, {name: "x"}, lambda _path: True)
    assert found.startswith(f"vllm_environment has {name!r}")
