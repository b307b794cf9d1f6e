# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: a model's files on the Hugging Face hub, read in small pieces and kept on the controller.

No Ansible import. What has been read is never asked for again: a commit's files do not change. Only what a branch or a
tag stands for is asked anew each time, with one request. The client is huggingface_hub's, with the patience of its own
that it lacks: it waits as long as the hub asks for but not for ever, and never takes more of a file than it needs.
"""

from __future__ import annotations

import email.utils
import json
import os
import re
import socket
import ssl
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from ansible_collections.llmfleet.serving.plugins.module_utils._checkpoint import (
    INDEX,
    LONGEST_JSON,
    PREFIX,
    ModelError,
    Tensors,
    header_length,
    parse_header,
)

# Else it asks the hub for things of its own, once a day. Read when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    import httpx2
    from ansible_collections.llmfleet.serving.plugins.module_utils._models import HUB_ID, REVISION
    from huggingface_hub import HfApi, get_session, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers
except ImportError:
    HUB_ERROR: str | None = traceback.format_exc()
else:
    HUB_ERROR = None

HUB = "https://huggingface.co"
ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LAYOUT = "v1"  # of the cache; another one where what is kept changes
FIRST_BYTES = 100_000  # of a shard; most headers are shorter (huggingface_hub has the same)
CONNECTIONS = 4
TIMEOUT = 30.0  # seconds without a byte
DEADLINE = 300.0  # seconds for one request
ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds, doubled each time
LONGEST_PAUSE = 90.0  # seconds that the hub may ask for
RETRIED = (408, 429, 500, 502, 503, 504)
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TOO_MANY = 401, 403, 404, 429
AGAIN = "run the task again, it goes on where it has stopped"

Answer = TypeVar("Answer")


class UnreachableError(ModelError):
    """The hub does not answer, or not as the hub would: what is cached may do in its place."""


@dataclass(frozen=True)
class Options:
    source: str
    revision: str
    cache_dir: Path
    endpoint: str = HUB
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.source):
            raise ModelError(
                f"vllm_models[].source is {self.source!r}, which is neither a folder ('/...') nor a model of the hub: "
                "write it as organisation/name"
            )
        if not REVISION.fullmatch(self.revision):
            raise ModelError(
                f"vllm_models[].revision is {self.revision!r}, which is no revision: name a branch, a tag or a commit"
            )
        if not ENDPOINT.fullmatch(self.endpoint):
            shown = re.sub(r"//[^/]*@", "//********@", self.endpoint)
            raise ModelError(
                f"vllm_hf_endpoint is {shown!r}, which is no address of a hub: write https://name, and the token in "
                "vllm_hf_token"
            )
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ModelError(
                "vllm_hf_token has a space, a line end or a letter that no header carries: give the token alone"
            )


class Cache:
    """JSON documents in files, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, *parts: str) -> Any:
        """None for what is not there, or cannot be used; it is fetched anew then."""
        try:
            return json.loads(self._path(parts).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, value: Any, *parts: str) -> None:
        path, temporary = self._path(parts), None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
            with os.fdopen(handle, "w") as file:
                json.dump(value, file)
            os.replace(temporary, path)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise ModelError(
                f"cache_dir is {str(self.folder)!r}, which cannot be written ({error.strerror}): set "
                "vllm_plan_cache_dir to a folder that can"
            ) from None

    def _path(self, parts: Sequence[str]) -> Path:
        # The last is a name that others have given: without "/", and never "..", because of the suffix.
        return self.folder.joinpath(*parts[:-1], quote(parts[-1], safe="") + ".json")


class Hub:
    """A model on the hub at one commit: a Store."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.endpoint = options.endpoint.rstrip("/")
        self.what = f"vllm_models[].source is {options.source!r}"
        self.remedy = f"name another model or vllm_models[].revision (it is {options.revision!r})"
        self.warnings: list[str] = []
        place = quote(self.endpoint.split("://")[1], safe="")
        self.cache = Cache(options.cache_dir / LAYOUT / place / options.source)
        # huggingface_hub would take the token of whoever runs this; the engine hosts have not got that one.
        self.api = HfApi(self.endpoint, options.token or False, "llmfleet.serving", "model_info")

    # --- what it stands for -----------------------------------------------------------------------------------------

    @cached_property
    def commit(self) -> str:
        revision = self.options.revision
        if COMMIT.fullmatch(revision):
            if self._listed(revision) is None:
                self._list()
            return revision
        known = self.cache.get("refs", revision)
        usable = isinstance(known, str) and COMMIT.fullmatch(known) and self._listed(known) is not None
        try:
            return self._list(hurried=bool(usable))
        except UnreachableError as error:
            if not usable:
                raise
            self.warnings.append(f"{error}. Until then {revision!r} is what it was at the last look, {known}")
            return str(known)

    def _listed(self, commit: str) -> dict[str, int] | None:
        found = self.cache.get(commit, "files")
        return found if isinstance(found, dict) else None

    def _list(self, hurried: bool = False) -> str:
        """Ask the hub which commit the revision is and which files it has, and keep both."""
        given = self.options

        def ask() -> tuple[str, dict[str, int]]:
            found = self.api.model_info(given.source, revision=given.revision, files_metadata=True, timeout=TIMEOUT)
            return str(found.sha), {each.rfilename: int(each.size) for each in found.siblings}  # type: ignore[union-attr]

        try:
            commit, files = self._patiently(ask, 2 if hurried else ATTEMPTS)
            if not COMMIT.fullmatch(commit):
                raise ValueError(commit)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UnreachableError(
                f"{self.endpoint} does not answer as the hub does: check vllm_hf_endpoint, and that no proxy or login "
                "page stands between"
            ) from None
        self.cache.put(files, commit, "files")
        return commit

    def remember(self) -> None:
        """Once all of it has been read: this is what to fall back on."""
        if self.commit != self.options.revision:
            self.cache.put(self.commit, "refs", self.options.revision)

    # --- a Store ----------------------------------------------------------------------------------------------------

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return self._listed(self.commit) or {}

    def read(self, name: str) -> bytes:
        """A small file. What is kept is its text; of the index just what is used, for it can have 10 MB."""
        text = self.cache.get(self.commit, name)
        if not isinstance(text, str):
            data = self._fetch(name, 0, min(self.sizes[name], LONGEST_JSON))
            text = data.decode()
            if name == INDEX:
                text = _files_of(text)
            self.cache.put(text, self.commit, name)
        return text.encode()

    def tensors(self, names: Sequence[str]) -> Iterable[Tensors]:
        pool = ThreadPoolExecutor(CONNECTIONS)
        try:
            return list(pool.map(self._shard, names))
        finally:  # after a failure, what has not begun does not begin; what has is kept
            pool.shutdown(cancel_futures=True)

    def _shard(self, name: str) -> Tensors:
        try:
            return Tensors.from_json(self.cache.get(self.commit, "headers", name))
        except (TypeError, KeyError):
            found = self._header(name)
        self.cache.put(found.as_json(), self.commit, "headers", name)
        return found

    def _header(self, name: str) -> Tensors:
        start = self._fetch(name, 0, FIRST_BYTES)
        end = PREFIX + header_length(self, name, start)
        if end > len(start):
            start += self._fetch(name, len(start), end - len(start))
        return parse_header(self, name, start[PREFIX:end])

    # --- requests ---------------------------------------------------------------------------------------------------

    def _fetch(self, name: str, first: int, count: int) -> bytes:
        count = min(count, self.sizes[name] - first)
        if count <= 0:
            return b""
        data = self._patiently(lambda: self._request(name, first, count), ATTEMPTS)
        if len(data) < count:
            raise UnreachableError(f"{self.endpoint} sends {len(data)} of {count} bytes of {name}: {AGAIN}")
        return data

    def _request(self, name: str, first: int, count: int) -> bytes:
        """So many bytes of a file, from ``first`` on; no more are taken from a server that would send all of it."""
        given = self.options
        url = hf_hub_url(given.source, name, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers(
            token=given.token or False, library_name=self.api.library_name, library_version=self.api.library_version
        )
        headers |= {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
        deadline = time.monotonic() + DEADLINE
        # httpx2 takes the token off when it is sent on to another host.
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            left_out = 0 if response.headers.get("Content-Range", "").startswith(f"bytes {first}-") else first
            data = bytearray()
            for block in response.iter_bytes():
                data += block
                if len(data) >= left_out + count:
                    break
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("too slow", request=response.request)
        return bytes(data[left_out : left_out + count])

    def _patiently(self, request: Callable[[], Answer], attempts: int) -> Answer:
        pause = FIRST_PAUSE
        for attempt in range(1, attempts + 1):
            wait = pause
            try:
                return request()
            except HfHubHTTPError as error:
                wait = max(wait, _asked_pause(error.response.headers))
                if error.response.status_code not in RETRIED or attempt == attempts or wait > LONGEST_PAUSE:
                    self._explain(error, wait)
            except OfflineModeIsEnabled:
                raise UnreachableError(
                    f"{self.what}, and HF_HUB_OFFLINE keeps the hub from being asked: unset it, or look the model up "
                    "once without it"
                ) from None
            except httpx2.TransportError as error:
                if attempt == attempts or _is_final(error):
                    raise UnreachableError(self._no_connection(error)) from None
            except httpx2.HTTPError as error:
                raise UnreachableError(self._no_connection(error)) from None
            time.sleep(wait)
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    # --- what goes wrong --------------------------------------------------------------------------------------------

    def _explain(self, error: HfHubHTTPError, wait: float) -> NoReturn:
        response, given = error.response, self.options
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{given.source}"
        if status == UNAUTHORIZED and given.token and code not in ("RepoNotFound", "RevisionNotFound"):
            raise ModelError(
                f"vllm_hf_token is refused by {self.endpoint} ({status}): set it to a token that is valid and whose "
                f"account may read {page}"
            )
        if code == "GatedRepo" and status == UNAUTHORIZED:
            raise ModelError(
                f"{self.what}, which is gated: accept its licence at {page}, and set vllm_hf_token to a token of the "
                "account that did"
            )
        if code == "GatedRepo" or status == FORBIDDEN:
            raise ModelError(
                f"{self.what}, which the account of vllm_hf_token may not read ({status}): accept its licence at "
                f"{page}, wait until that is granted, and let the token read gated repositories"
            )
        if code == "RevisionNotFound":
            short = re.fullmatch(r"[0-9a-f]{7,39}", given.revision)
            remedy = "write all 40 digits of the commit" if short else f"choose one that {page}/tree/main lists"
            raise ModelError(
                f"vllm_models[].revision is {given.revision!r}, which {given.source!r} does not have: {remedy}"
            )
        if code == "EntryNotFound":
            raise ModelError(f"{self.what}, where {self.endpoint} lists a file that it does not have: {self.remedy}")
        if code == "RepoNotFound" or status in (UNAUTHORIZED, NOT_FOUND):
            private = "a token that may read it" if given.token else "a token"
            raise ModelError(
                f"{self.what}, which {self.endpoint} does not have ({status}): check the spelling, and if the model is "
                f"private set vllm_hf_token to {private}"
            )
        if status == TOO_MANY:
            later = f"in {wait:.0f} s" if wait > LONGEST_PAUSE else "later"
            raise UnreachableError(f"{self.endpoint} answers no more requests for now ({status}): try {later}, {AGAIN}")
        raise UnreachableError(f"{self.endpoint} answers {status} for {given.source!r}: {AGAIN}")

    def _no_connection(self, error: Exception) -> str:
        causes = list(_causes(error))
        for kind, text in NETWORK:
            for cause in causes:
                if isinstance(cause, kind):
                    return text.format(hub=self.endpoint, cause=cause, timeout=TIMEOUT, again=AGAIN)
        if isinstance(error, httpx2.TimeoutException):
            return TIMED_OUT.format(hub=self.endpoint, timeout=TIMEOUT, again=AGAIN)
        # Not the error's own words: they may quote what was sent.
        return f"{self.endpoint} cut the connection ({type(error).__name__}): {AGAIN}"


TIMED_OUT = "{hub} does not answer within {timeout:g} s: check the controller's network, proxy and firewall; {again}"
NETWORK: list[tuple[type[BaseException], str]] = [  # the first that fits
    (
        socket.gaierror,
        "{hub} cannot be resolved ({cause.strerror}): check vllm_hf_endpoint and the controller's DNS",
    ),
    (
        ssl.SSLCertVerificationError,
        "the certificate of {hub} is not trusted ({cause.verify_message}): set SSL_CERT_FILE on the controller to a "
        "bundle with its authority",
    ),
    (ssl.SSLError, "{hub} speaks no TLS ({cause.reason}): check vllm_hf_endpoint and the controller's proxy"),
    (TimeoutError, TIMED_OUT),
    (ConnectionRefusedError, "{hub} refuses connections: check vllm_hf_endpoint, and the proxy of the controller"),
    (ConnectionError, "{hub} cut the connection: {again}"),
    (
        OSError,
        "{hub} cannot be reached ({cause.strerror}): check vllm_hf_endpoint and the controller's network",
    ),
]


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        # Not those of the client, which have no strerror of their own.
        if type(error).__module__.split(".")[0] not in ("httpx2", "httpcore2"):
            yield error
        error = error.__cause__ or error.__context__


def _is_final(error: Exception) -> bool:
    """What a moment does not mend."""
    return any(
        isinstance(cause, ssl.SSLError) or (isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME)
        for cause in _causes(error)
    )


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that the hub asks for."""
    limit = parse_ratelimit_headers(headers)
    pause = float(limit.reset_in_seconds) if limit and not limit.remaining else 0.0
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return max(pause, float(text))
    try:
        return max(pause, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return pause


def _files_of(index: str) -> str:
    """The index with one tensor for each file, which is enough to tell them; as it is where it is broken."""
    try:
        files = {str(name) for name in json.loads(index)["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return index
    return json.dumps({"weight_map": {name: name for name in sorted(files)}})
