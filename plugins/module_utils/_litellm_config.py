# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: from the inventory to LiteLLM's configuration, and what is wrong with its variables.

Pure: no Ansible import and no I/O. Runs on the controller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ansible_collections.llmfleet.serving.plugins.module_utils._values import amount
from packaging.version import InvalidVersion, Version

MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):([0-9]{1,5})")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MASTER_KEY = re.compile(r"sk-[A-Za-z0-9_-]{20,}")
KEY = re.compile(r"[A-Za-z0-9._~+/=-]{20,}")
FOLDER = re.compile(r"(/[A-Za-z0-9._-]+)+")
PINNED = re.compile(r"^litellm *(?:\[[^\]]*\])? *== *([^\s;\\]+)", re.MULTILINE)
MODES = {"completion": "chat", "embedding": "embedding"}
MILLION = 1_000_000
# What a client can bring about by itself, as by a key or a timeout in the body: no replica is put aside for that.
CLIENTS_ERRORS = ("Authentication", "BadRequest", "NotFound", "RateLimit", "Timeout")
NEVER = 10**9
MAX_PORT = 65535
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
CA_FILE = "sslcert=<CA file on the gateway>"
SPARE_CONNECTIONS = 10  # for backups, monitoring and people
REQUEST_LOG_DAYS_MAX = 3650
AT_LEAST = {  # and what each counts
    "litellm_workers": (0, "processes"),
    "litellm_database_connections": (1, "connection"),
    "litellm_retries": (0, "retries"),
    "litellm_request_timeout": (1, "second"),
    "litellm_allowed_fails": (0, "failures"),
    "litellm_cooldown_seconds": (0, "seconds"),
    "litellm_batch_write_seconds": (1, "second"),
    "litellm_start_timeout": (10, "seconds"),
    "litellm_shutdown_timeout": (1, "second"),
}
# Set by the role from other variables; by litellm_environment they would count twice, or not at all.
OWNED = (
    *("DATABASE_URL", "LITELLM_MASTER_KEY", "LITELLM_SALT_KEY", "LITELLM_BACKEND_KEY", "LITELLM_REDIS_URL"),
    *("CONFIG_FILE_PATH", "NUM_WORKERS", "WEB_CONCURRENCY", "SLACK_WEBHOOK_URL", "WEBHOOK_URL", "DISABLE_ADMIN_UI"),
)


# --- versions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vulnerability:
    """One advisory. ``ranges`` are the first affected version and the one that mends it."""

    id: str
    what: str
    ranges: tuple[tuple[str, str], ...]

    def affects(self, version: Version) -> bool:
        return any(Version(first) <= version < Version(fixed) for first, fixed in self.ranges)


STOLEN = (Version("1.82.7"), Version("1.82.8"))
# Sources: the GitHub advisory database and PyPI's. In the order of the release that mends them.
VULNERABILITIES = (
    Vulnerability("CVE-2026-35029", "a user can change the configuration and run commands", (("0", "1.83.0"),)),
    Vulnerability("CVE-2026-42208", "SQL injection without a key", (("1.81.16", "1.83.7"),)),
    Vulnerability("CVE-2026-42271", "commands by the MCP test endpoint", (("1.74.2", "1.83.7"),)),
    Vulnerability("CVE-2026-42203", "template injection", (("1.80.5", "1.83.7"),)),
    Vulnerability("PYSEC-2026-4070", "server-side request forgery", (("0", "1.83.9"),)),
    Vulnerability("CVE-2026-40217", "code that leaves its sandbox", (("1.81.8", "1.83.10"),)),
    Vulnerability("CVE-2026-47102", "a user can become administrator", (("0", "1.83.10"),)),
    Vulnerability("CVE-2026-47101", "a key with an administrator's routes", (("0", "1.83.14"),)),
    Vulnerability("CVE-2026-49468", "no key needed with another Host header", (("0", "1.84.0"),)),
    Vulnerability(
        "CVE-2026-114612",
        "an internal user can become administrator and run commands on the host",
        (("1.87.0", "1.100.4"), ("1.101.0", "1.101.3"), ("1.102.0", "1.102.2"), ("1.103.0", "1.103.1")),
    ),
)


def version_problems(version: str, accepted: Sequence[str]) -> list[str]:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return [f"litellm_version is {version!r}: give a release as 1.106.2."]
    if parsed in STOLEN:
        return [f"litellm_version is {version}, which was published by thieves and steals secrets: give another."]
    open_ones = [each for each in VULNERABILITIES if each.affects(parsed) and each.id not in accepted]
    if not open_ones:
        return []
    found = "; ".join(f"{each.id} ({each.what})" for each in open_ones)
    ids = ", ".join(each.id for each in open_ones)
    return [
        f"litellm_version is {version}, which has known vulnerabilities: {found}. "
        f"Give a later one, or put into litellm_accept_known_vulnerabilities: {ids}."
    ]


# --- the database --------------------------------------------------------------------------------------------


def socket_folder(url: str) -> str:
    """The folder of PostgreSQL's socket that the URL names, or nothing."""
    host = parse_qs(urlsplit(url).query).get("host", [""])[0]
    return host if host.startswith("/") else ""


def is_local(url: str) -> bool:
    return bool(socket_folder(url)) or urlsplit(url).hostname in LOCAL_HOSTS


def database_place(url: str) -> str:
    """Which database that is, without its password."""
    parts = urlsplit(url)
    return f"{parts.username}@{socket_folder(url) or parts.hostname}:{parts.port or 5432}{parts.path}"


def database_url(url: str, connections: int) -> str:
    """With the size of each worker's pool, as Prisma takes it, where the URL itself does not say."""
    if "connection_limit=" in urlsplit(url).query:
        return url
    return f"{url}{'&' if '?' in url else '?'}connection_limit={connections}"


def database(url: str, connections: int) -> dict[str, str]:
    """What LiteLLM is given for C(url), and which database that is."""
    return {"url": database_url(url, connections), "place": database_place(url)}


def database_problems(url: str) -> Iterator[str]:
    """Never returns a part of the URL but its scheme, for it may hold a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        yield "litellm_database_url is no URL: percent-encode what is special in its user and password."
        return
    if parts.scheme not in ("postgresql", "postgres"):
        yield f"litellm_database_url begins with {parts.scheme!r}: LiteLLM keeps keys in PostgreSQL alone; give postgresql://."
        return
    if parts.netloc.count("@") > 1 or parts.fragment or re.search(r"[\s\"'\\]", url):
        yield (
            "litellm_database_url has a character that must be percent-encoded in a user or password: "
            "use the filter urlencode, and replace / by %2F."
        )
    elif not parts.username or not host or not re.fullmatch(r"/[^/]+", parts.path):
        yield "litellm_database_url lacks a user, host or database: give postgresql://user:password@host:5432/database."
    elif port == 0:
        yield "litellm_database_url has port 0: give PostgreSQL's, or none for 5432."
    else:
        yield from _database_tls(url, host)


def _database_tls(url: str, host: str) -> Iterator[str]:
    """By what Prisma understands, which is not what libpq does."""
    options = {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
    mode = options.get("sslmode", "")
    if mode in ("verify-ca", "verify-full"):
        yield (
            f"litellm_database_url has sslmode={mode}, which Prisma takes for prefer: "
            f"write sslmode=require&sslaccept=strict&{CA_FILE}."
        )
    elif "sslrootcert" in options:
        yield f"litellm_database_url has sslrootcert, which Prisma discards: write sslaccept=strict&{CA_FILE}."
    elif is_local(url):
        return
    elif mode != "require":
        yield (
            f"litellm_database_url leads to {host} without TLS: add sslmode=require&sslaccept=strict, "
            f"and {CA_FILE} where the gateway does not trust its CA."
        )
    elif options.get("sslaccept") != "strict":
        yield (
            f"litellm_database_url leads to {host}, whose certificate is not checked: add sslaccept=strict, "
            f"and {CA_FILE} where the gateway does not trust its CA."
        )


# --- the configuration ---------------------------------------------------------------------------------------


def deployments(
    models: Sequence[Mapping[str, Any]],
    prices: Mapping[str, Mapping[str, float]],
    allowed_fails: int,
    drained: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One entry of LiteLLM's ``model_list`` for each replica of each model. ``prices`` are per million tokens."""
    return [
        {
            "model_name": model["model"],
            "litellm_params": {
                "model": f"hosted_vllm/{model['model']}",
                "api_base": f"http://{server}/v1",
                "api_key": "os.environ/LITELLM_BACKEND_KEY",
                **{
                    f"{what}_cost_per_token": float(prices.get(model["model"], {}).get(what, 0)) / MILLION
                    for what in ("input", "output")
                },
            },
            "model_info": {
                "id": f"{model['model']}@{server}",
                "mode": MODES[model.get("kind") or "completion"],
                # Counted here, a model's only replica is never put aside.
                "allowed_fails": allowed_fails,
                "allowed_fails_policy": {f"{error}ErrorAllowedFails": NEVER for error in CLIENTS_ERRORS},
            },
        }
        for model in models
        for server in model["servers"]
        if server not in drained
    ]


def config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """LiteLLM's own configuration file. Secrets stay in the environment."""
    general: dict[str, Any] = {
        "master_key": "os.environ/LITELLM_MASTER_KEY",
        "allow_requests_on_db_unavailable": settings["litellm_allow_requests_on_db_unavailable"],
        "proxy_batch_write_at": settings["litellm_batch_write_seconds"],
        "disable_prisma_schema_update": True,  # migrations are a step of their own
        "maximum_spend_logs_retention_period": f"{settings['litellm_request_log_days']}d",
        "maximum_spend_logs_retention_interval": "1h",  # else a day after each start
        "reject_clientside_metadata_tags": True,  # each tag has its own rows for each day, for ever
    }
    if settings["alerting"]:
        general |= {"alerting": settings["alerting"], "alert_types": ["budget_alerts"]}
    if settings["redis"]:
        general["coordination_redis"] = {"url": "os.environ/LITELLM_REDIS_URL"}
        # What has been spent waits there for the database; from a worker's memory it is dropped after a few attempts.
        general["use_redis_transaction_buffer"] = True
    made = {
        "model_list": deployments(
            settings["litellm_models"],
            settings["litellm_prices"],
            settings["litellm_allowed_fails"],
            settings["litellm_drained"],
        ),
        "router_settings": {
            "routing_strategy": "simple-shuffle",
            # LiteLLM tries again only what has not yet given a token.
            "num_retries": settings["litellm_retries"],
            "timeout": settings["litellm_request_timeout"],
            "cooldown_time": settings["litellm_cooldown_seconds"],
            "fallbacks": [{model: others} for model, others in settings["litellm_fallbacks"].items()],
        },
        "litellm_settings": {
            "callbacks": ["prometheus", "llmfleet_usage.continuous_usage"],
            "require_auth_for_metrics_endpoint": False,  # who is on the host may read them; nginx does not pass them on
            "request_timeout": settings["litellm_request_timeout"],
            "turn_off_message_logging": True,
            # Clients choose `user`. One that PostgreSQL refuses, as \0, would keep all spending from being written.
            "disable_end_user_cost_tracking": True,
            # Clients choose that as well, and each would be a tag.
            "disable_add_user_agent_to_request_tags": True,
        },
        "general_settings": general,
    }
    return _merged(made, settings["litellm_config"])


def _merged(made: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(made)
    for key, value in own.items():
        before = both.get(key)
        both[key] = _merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return both


# --- problems ------------------------------------------------------------------------------------------------


def problems(settings: Mapping[str, Any]) -> list[str]:
    """One sentence for each, with the variable, the value unless it is secret, and the remedy."""
    return [
        *_version(settings),
        *_models(settings["litellm_models"]),
        *_prices(settings),
        *_drained(settings),
        *_fallbacks(settings),
        *_secrets(settings),
        *database_problems(settings["litellm_database_url"]),
        *_ports(settings["litellm_ports"]),
        *_numbers(settings),
        *redis_problems(settings["litellm_redis_url"]),
        *_connections(settings),
        *_gateways(settings),
        *_alerts(settings),
        *_environment(settings["litellm_environment"]),
        *_engines_dir(settings["litellm_prisma_engines_dir"]),
    ]


def _version(settings: Mapping[str, Any]) -> Iterator[str]:
    version = settings["litellm_version"]
    yield from version_problems(version, settings["litellm_accept_known_vulnerabilities"])
    if not settings["requirements"]:
        yield (
            f"litellm_version is {version}, and litellm_requirements_file names no file that the controller has: "
            "give the file of that version's packages with their hashes, or leave both at their defaults."
        )
        return
    pinned = PINNED.search(settings["requirements"])
    if not pinned:
        yield (
            f"litellm_version is {version}, and litellm_requirements_file pins no litellm: "
            f"give the file of that version's packages, with litellm=={version} in it."
        )
    elif pinned[1] != version:
        yield f"litellm_version is {version}, and litellm_requirements_file pins {pinned[1]}: make them the same."


def _models(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not models:
        yield "litellm_models is empty: name at least one model with its servers."
    seen: set[str] = set()
    for model in models:
        name = str(model.get("model", ""))
        if not MODEL.fullmatch(name):
            yield (
                f"litellm_models has a model {name!r}: "
                "use at most 128 of A-Z a-z 0-9 . _ : / -, beginning with a letter or digit."
            )
        if name in seen:
            yield f"litellm_models has the model {name!r} twice: put all its servers into one entry."
        seen.add(name)
        if not model.get("servers"):
            yield f"litellm_models has no servers for the model {name!r}: name at least one, or remove the model."
        for server in model.get("servers") or ():
            match = SERVER.fullmatch(str(server))
            if not match or not 0 < int(match[3]) <= MAX_PORT:
                yield (
                    f"litellm_models has a server {server!r} for the model {name!r}: write host:port or [address]:port."
                )


def _prices(settings: Mapping[str, Any]) -> Iterator[str]:
    kinds = {model.get("model"): model.get("kind") or "completion" for model in settings["litellm_models"]}
    for model, prices in settings["litellm_prices"].items():
        if model not in kinds:
            yield f"litellm_prices has {model!r}, which no engine serves: the models are {', '.join(map(str, kinds))}."
        if not isinstance(prices, Mapping):
            yield f"litellm_prices has {prices!r} for {model!r}: give {{input: 0.15, output: 0.6}}, per million."
            continue
        for what, price in prices.items():
            if what not in ("input", "output"):
                yield f"litellm_prices has {what!r} for {model!r}: give input and output, per million tokens."
            elif (cost := amount(price)) is None or not 0 <= cost < float("inf"):
                shown = "nothing" if price is None else repr(price)
                yield f"litellm_prices has {shown} as the {what} of {model!r}: give 0 or more, per million tokens."
        for what in ("input",) if kinds.get(model) == "embedding" else ("input", "output"):
            if what not in prices:
                yield f"litellm_prices has no {what} for {model!r}, which would be free: give it, or 0 to mean it."


def _drained(settings: Mapping[str, Any]) -> Iterator[str]:
    servers = [server for model in settings["litellm_models"] for server in model["servers"]]
    for server in settings["litellm_drained"]:
        if server not in servers:
            yield f"litellm_drained has {server!r}: use servers of litellm_models, which are {', '.join(servers)}."


def _fallbacks(settings: Mapping[str, Any]) -> Iterator[str]:
    known = [model.get("model") for model in settings["litellm_models"]]
    for model, others in settings["litellm_fallbacks"].items():
        if not isinstance(others, list):
            yield f"litellm_fallbacks has {others!r} for {model!r}: give a list of models."
            continue
        for name in (model, *others):
            if name not in known:
                yield (
                    f"litellm_fallbacks has {name!r}, which is none of the models {', '.join(map(str, known))}: "
                    "correct it."
                )
        if model in others:
            yield f"litellm_fallbacks has {model!r} as its own fallback: its replicas are tried anyway; take it out."


def _secrets(settings: Mapping[str, Any]) -> Iterator[str]:
    if not MASTER_KEY.fullmatch(settings["litellm_master_key"]):
        yield "litellm_master_key must be sk- and at least 20 of A-Z a-z 0-9 _ -, as LiteLLM takes it: make another."
    for name in ("litellm_salt_key", "litellm_backend_key"):
        if not KEY.fullmatch(settings[name]):
            yield (
                f"{name} is too short, or has a character that it may not: "
                "give at least 20 of A-Z a-z 0-9 . _ ~ + / = -."
            )
    if settings["litellm_salt_key"] == settings["litellm_master_key"]:
        yield "litellm_salt_key is litellm_master_key: make another master key, for the salt key can never be changed."


def _ports(ports: Sequence[int]) -> Iterator[str]:
    if len(ports) != 2 or len(set(ports)) != 2 or not all(1024 <= port <= MAX_PORT for port in ports):
        yield f"litellm_ports is {list(ports)}: give two ports from 1024 to {MAX_PORT}; instances alternate."


def _numbers(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, (least, what) in AT_LEAST.items():
        if settings[name] < least:
            yield f"{name} is {settings[name]}: use at least {least} {what}."
    if not 1 <= (days := settings["litellm_request_log_days"]) <= REQUEST_LOG_DAYS_MAX:
        yield f"litellm_request_log_days is {days}: use 1 to {REQUEST_LOG_DAYS_MAX} days."


def redis_problems(url: str) -> Iterator[str]:
    """Never returns a part of the URL, for it may hold a password."""
    if not url:
        return
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        yield "litellm_redis_url is no URL: percent-encode what is special in its user and password."
        return
    if parts.scheme not in ("redis", "rediss", "unix"):
        yield "litellm_redis_url is no URL of a Redis: give redis://, rediss:// (with TLS) or unix:///."
    elif (
        parts.netloc.count("@") > 1
        or parts.fragment
        or re.search(r"[\s\"'\\]", url)
        or "@" in f"{parts.path}{parts.query}"
    ):
        yield (
            "litellm_redis_url has a character that must be percent-encoded in a user or password: "
            "use the filter urlencode, and replace / by %2F."
        )
    elif parts.scheme == "unix":
        if host or not FOLDER.fullmatch(parts.path):
            yield "litellm_redis_url lacks the path of a socket: give unix:///run/redis/redis.sock."
    elif not host:
        yield "litellm_redis_url lacks a host: give rediss://:password@host:6379."
    elif port == 0:
        yield "litellm_redis_url has port 0: give Redis's, or none for 6379."
    elif not re.fullmatch(r"/?[0-9]*", parts.path):
        yield "litellm_redis_url has a path that is no number of a database: give rediss://:password@host:6379/0."
    elif parts.scheme == "redis" and host not in LOCAL_HOSTS:
        yield "litellm_redis_url leads to another host without TLS: give rediss://."


def _connections(settings: Mapping[str, Any]) -> Iterator[str]:
    """Two instances have theirs, while one takes the place of the other."""
    workers, each = settings["workers"], settings["litellm_database_connections"]
    most = settings["postgresql_max_connections"]
    needed = 2 * workers * each + SPARE_CONNECTIONS
    if most and needed > most:
        yield (
            f"litellm_database_connections is {each}: two instances with {workers} workers each take "
            f"{2 * workers * each}, and {SPARE_CONNECTIONS} are for backups and for you, but "
            f"postgresql_max_connections is {most}: raise that to {needed}, "
            "or lower litellm_workers or litellm_database_connections."
        )


def _gateways(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings["gateways"] < 2:
        return
    if is_local(settings["litellm_database_url"]):
        yield (
            f"There are {settings['gateways']} gateways, and litellm_database_url is this host's own: "
            "give one that all of them share, so that a key counts the same on each."
        )
    if not settings["litellm_redis_url"]:
        yield (
            f"There are {settings['gateways']} gateways, and litellm_redis_url is empty: "
            "give a Redis that all of them share, so that limits count together."
        )


def _alerts(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in ("litellm_alert_slack_url", "litellm_alert_webhook_url"):
        if settings[name] and not re.fullmatch(r"https?://[^\s\"'\\]+", settings[name]):
            yield f"{name} is no URL: give the address of the webhook, beginning with https://."


def _environment(environment: Mapping[str, Any]) -> Iterator[str]:
    for name, value in environment.items():
        if not ENVIRONMENT_NAME.fullmatch(str(name)):
            yield f"litellm_environment has {name!r}: that is no name of an environment variable."
        elif name in OWNED:
            yield f"litellm_environment has {name!r}, which the role sets: use the role's own variable."
        elif "\n" in str(value):
            yield f"litellm_environment has a line break in {name}: give a value of one line."


def _engines_dir(folder: str) -> Iterator[str]:
    if folder and not FOLDER.fullmatch(folder):
        yield f"litellm_prisma_engines_dir is {folder!r}: give the absolute path of a folder on the host."
