"""What one router process is told. Built once, validated here, passed as values from there on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from router.core.estimate import UNKNOWN, StepModel
from router.core.limits import CoreLimits
from router.core.tenant import BookRefused
from router.tenants import read_book
from trust.tls import TlsFiles, is_loopback

#: gRPC frames a message's length in 32 bits; past 1 GiB every message is a mistake.
_MESSAGE_BYTES_MAX = 1 << 30
_EDGES_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for."""

    message_bytes_max: int = 16 * 1024 * 1024
    request_id_chars_max: int = 128
    stop_strings_max: int = 16
    stop_chars_max: int = 256
    stop_token_ids_max: int = 64
    logprobs_max: int = 20
    #: Of a JSON schema, expression or grammar that an answer must follow.
    structure_bytes_max: int = 65_536
    #: Tokens that one request may make likelier or less so.
    logit_bias_max: int = 1_024
    #: Tokens to generate when the client names no number.
    max_tokens_default: int = 256
    #: Time a request gets when the client names no deadline, and the most it can get.
    timeout_s_max: float = 3600.0
    #: Answers that one call may ask for: its prompts, times `n`.
    answers_max: int = 64
    #: Tokens that may wait for a client that reads slowly; one more ends its request.
    stream_tokens_max: int = 4_096

    def problems(self) -> list[str]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = [f"requests.{name}: must be at least 1, is {value}" for name, value in values.items() if value < 1]
        if self.message_bytes_max > _MESSAGE_BYTES_MAX:
            found.append(
                f"requests.message_bytes_max: must be at most {_MESSAGE_BYTES_MAX}, is {self.message_bytes_max}"
            )
        return found


#: As browsers write it.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What clients may take of the HTTP port. Bodies: `RequestLimits.message_bytes_max`."""

    connections_max: int = 10_000
    head_bytes_max: int = 65_536
    #: For a request's head, and again for its body, to come in.
    read_timeout_s: float = 30.0
    #: For a client to read what was sent, before its connection is cut.
    write_timeout_s: float = 120.0
    #: Whose pages may read answers in browsers, beside this machine's own: "https://chat.example". "*": everybody's.
    origins: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "origins"}
        found = [f"http.{name}: must be more than 0, is {value}" for name, value in values.items() if value <= 0]
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                found.append(f'http.origins: {origin!r} is neither "*" nor scheme://host or scheme://host:port')
        return found


#: Of tokens' signatures. All asymmetric: a public key can't be taken for a shared secret.
JWT_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtRules:
    """Which tokens are believed, and what their claims mean."""

    issuer: str = ""
    audience: str = ""
    #: The issuer's public keys: a file or an https URL.
    jwks: str = ""
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    tenant_claim: str = "tenant"
    #: Holds the highest lane the token may use; empty: every lane its tenant may.
    lane_claim: str = ""
    #: A list, or one text with spaces; `tandem:inference` and `tandem:admin` count. Empty: tokens are for inference.
    scope_claim: str = ""
    #: How far the issuer's clock may be off.
    leeway_s: float = 30.0
    #: How old the JWKS may become, and how soon after an attempt an unknown key may have it fetched again.
    jwks_age_s_max: float = 300.0
    jwks_fetch_interval_s_min: float = 10.0

    def problems(self) -> list[str]:
        found = [
            f"{name}: must not be empty"
            for name in ("issuer", "audience", "jwks", "tenant_claim", "algorithms")
            if not getattr(self, name)
        ]
        found += [
            f"algorithms: {name!r} is none of {', '.join(JWT_ALGORITHMS)}"
            for name in self.algorithms
            if name not in JWT_ALGORITHMS
        ]
        if not 0 <= self.leeway_s <= 600:
            found.append(f"leeway_s: must be from 0 to 600, is {self.leeway_s:g}")
        if not 1 <= self.jwks_fetch_interval_s_min <= self.jwks_age_s_max:
            found.append(
                f"jwks_fetch_interval_s_min: must be at least 1 and at most jwks_age_s_max ({self.jwks_age_s_max:g}), "
                f"is {self.jwks_fetch_interval_s_min:g}"
            )
        if "://" in self.jwks:
            parts = urlsplit(self.jwks)
            if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
                found.append(f"jwks: must be a file or an https URL, is {self.jwks}")
        elif self.jwks and not Path(self.jwks).is_file():
            found.append(f"jwks: {self.jwks} is not a file")
        return [f"jwt.{problem}" for problem in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """How callers say who they are. docs/tenancy.md tells more."""

    #: Each takes names in clients' certificates; `jwt` and `certificates` take API keys, too, if there is a key file.
    mode: Literal["none", "keys", "jwt", "certificates"] = "none"
    #: Without it, a router that asks nobody who they are listens on this machine's own addresses only.
    allow_unauthenticated: bool = False
    #: Written by `tandem key`.
    keys_file: str = ""
    #: Empty: a file called `pepper` beside the key file.
    pepper_file: str = ""
    jwt: JwtRules = field(default_factory=JwtRules)

    def problems(self, host: str) -> list[str]:
        found = self.jwt.problems() if self.mode == "jwt" else []
        if self.mode == "none" and not is_loopback(host) and not self.allow_unauthenticated:
            found.append(
                f"mode: is none, and {host} can be reached from other machines: everybody there could use and steer "
                "this cluster. Take keys or jwt, or set allow_unauthenticated = true"
            )
        if self.mode == "keys" and not self.keys_file:
            found.append("keys_file: must be given with mode keys")
        if self.mode != "none" and self.keys_file:
            found += [
                f"{name}: {path} is not a file; `tandem key create` makes it"
                for name, path in (("keys_file", Path(self.keys_file)), ("pepper_file", self.pepper_path))
                if not path.is_file()
            ]
        return [f"auth.{problem}" for problem in found]

    @property
    def pepper_path(self) -> Path:
        return Path(self.pepper_file) if self.pepper_file else Path(self.keys_file).with_name("pepper")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    #: A model directory with tokenizer.json; the router needs no weights.
    model_dir: str
    model_name: str
    router_id: str = "router"
    #: Clients and operators come to this port, and workers unless they have one of their own; 0 takes any free one.
    host: str = "127.0.0.1"
    port: int = 50051
    #: Processes that speak with clients on these ports; with more than one, workers need a port of their own.
    edges: int = 1
    #: host:port for workers alone, so that networks can keep others away from it; port 0 takes any free one.
    worker_listen: str = ""
    #: Ours, made for many streams of small messages, or gRPC's own.
    grpc_server: Literal["tandem", "grpcio"] = "tandem"
    #: Prometheus metrics over HTTP; None serves none, 0 takes any free port.
    metrics_port: int | None = None
    #: OpenAI's protocol over HTTP, and metrics; None serves none, 0 takes any free port.
    http_port: int | None = None
    #: Who the tenants are and what they may (TOML), read again when it changes; empty: all callers are one tenant
    #: without limits.
    tenants_file: str = ""
    #: What was spent of the tenants' budgets, so that a restart forgets nothing; empty: it forgets. One router's alone.
    budget_journal: str = ""
    #: A folder for what each request used, one line of JSON per request; empty: that is not kept. One router's alone.
    #: What is open is journaled too then, here where there is no budget_journal, so that a crash leaves its bill.
    usage_ledger: str = ""
    #: SHA-256, in hex, of a key that may do what operators do: of whoever started this process. Empty: there is none.
    operator_key_hash: str = ""
    auth: AuthConfig = field(default_factory=AuthConfig)
    #: By this both ends of a worker's link prove that they are of one cluster: `trust.join.join_key` of its secret.
    #: Empty, on this machine's own addresses only: whoever reaches the port may be a worker.
    join_key: bytes = field(default=b"", repr=False)
    #: Names (SPIFFE ids, DNS) in verified certificates that make their holder a worker without such a proof.
    worker_certificates: tuple[str, ...] = ()
    #: Of the ports for clients, operators and metrics.
    tls: TlsFiles = TlsFiles()
    #: Of `worker_listen`.
    worker_tls: TlsFiles = TlsFiles()
    limits: CoreLimits = field(default_factory=CoreLimits)
    #: How long computing and moving prompts takes here; by default unknown, and prompts are told apart by length only.
    step: StepModel = UNKNOWN
    requests: RequestLimits = field(default_factory=RequestLimits)
    http: HttpLimits = field(default_factory=HttpLimits)
    #: How old a client's connection becomes before it is asked to open another; 0: for ever. Calls are let finish,
    #: and workers' links stay.
    connection_age_s_max: float = 3600.0
    #: How often workers report their load.
    load_report_interval_s: float = 1.0
    #: How long requests may go on after the router was told to stop.
    shutdown_grace_s: float = 30.0
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        found = self.step.problems() + self.requests.problems() + self.http.problems() + self.auth.problems(self.host)
        if self.tenants_file:
            found += _book_problems(self.tenants_file)
        elif self.auth.mode != "none":
            found.append(f"tenants_file: must be given with auth.mode {self.auth.mode}: it says who the tenants are")
        if not 1 <= self.edges <= _EDGES_MAX:
            found.append(f"edges: must be from 1 to {_EDGES_MAX}, is {self.edges}")
        if self.edges > 1 and not self.worker_listen:
            found.append(f"worker_listen: must be given with edges {self.edges}: workers can't come to the edges' port")
        for name in ("port", "metrics_port", "http_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65_535:
                found.append(f"{name}: must be from 0 to 65535, is {port}")
        if self.metrics_port and self.metrics_port == self.port:
            found.append(f"metrics_port: {self.metrics_port} is the gRPC port already")
        if self.http_port and self.http_port in (self.port, self.metrics_port):
            found.append(f"http_port: {self.http_port} is the gRPC or the metrics port already")
        if not 0 < self.load_report_interval_s < self.limits.silence_s_max / 2:
            found.append(
                "load_report_interval_s: must be more than 0 and less than half of limits.silence_s_max "
                f"({self.limits.silence_s_max}), is {self.load_report_interval_s}"
            )
        found += self._tls_problems() + self._join_problems()
        if self.connection_age_s_max < 0:
            found.append(f"connection_age_s_max: must not be negative, is {self.connection_age_s_max}")
        if self.shutdown_grace_s < 0:
            found.append(f"shutdown_grace_s: must not be negative, is {self.shutdown_grace_s}")
        if not (Path(self.model_dir) / "tokenizer.json").is_file():
            found.append(f"model_dir: {self.model_dir} has no tokenizer.json")
        for name in ("model_name", "router_id", "host"):
            if not getattr(self, name):
                found.append(f"{name}: must not be empty")
        if self.host.startswith("["):
            found.append(
                f"host: brackets are for addresses with a port: must be {self.host.strip('[]')}, is {self.host}"
            )
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        if self.log_level not in levels:
            found.append(f"log_level: must be one of {', '.join(levels)}, is {self.log_level!r}")
        return found

    def _tls_problems(self) -> list[str]:
        found = [f"tls.{problem}" for problem in self.tls.problems() + self.tls.listen_problems(self.host)]
        if not self.worker_listen:
            return found
        host, colon, port = self.worker_listen.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and int(port) < 65_536):
            return [*found, f"worker_listen: {self.worker_listen!r} is not host:port"]
        problems = self.worker_tls.problems() + self.worker_tls.listen_problems(host)
        return found + [f"worker_tls.{problem}" for problem in problems]

    def _join_problems(self) -> list[str]:
        """Whoever joins sees every prompt it is given and makes up answers."""
        tls = self.worker_tls if self.worker_listen else self.tls
        host = self.worker_listen.rpartition(":")[0] if self.worker_listen else self.host
        if self.auth.mode == "certificates" and not (self.tls.serves and self.tls.ca):
            return ["tls.ca: must say who vouches for callers, with auth.mode certificates"]
        if self.grpc_server == "grpcio":  # whose server asks for certificates when it insists on them, or not at all
            if self.auth.mode == "certificates" and not self.tls.require_client_cert:
                return ["tls.require_client_cert: must be true, with auth.mode certificates and grpc_server grpcio"]
            if self.worker_certificates and not tls.require_client_cert:
                return ["require_client_cert: must be true, with worker_certificates and grpc_server grpcio"]
        if self.worker_certificates and not (tls.serves and tls.ca):
            return ["worker_certificates: needs a port that knows who vouches for them (tls.cert, tls.key, tls.ca)"]
        if self.join_key or self.worker_certificates or (self.auth.mode == "none" and is_loopback(host)):
            return []
        return ["join_key: must be given, or worker_certificates: without them anybody there could be a worker"]


def _book_problems(file: str) -> list[str]:
    try:
        read_book(Path(file))
    except OSError as error:
        return [f"tenants_file: {file} cannot be read: {error.strerror}"]
    except BookRefused as refused:
        return [f"tenants_file: {file}: {problem}" for problem in refused.problems]
    return []


def with_absolute_paths(config: RouterConfig) -> RouterConfig:
    """For a process that will run in another folder."""
    auth = config.auth
    jwks = auth.jwt.jwks if "://" in auth.jwt.jwks else _absolute(auth.jwt.jwks)
    auth = replace(
        auth,
        keys_file=_absolute(auth.keys_file),
        pepper_file=_absolute(auth.pepper_file),
        jwt=replace(auth.jwt, jwks=jwks),
    )
    return replace(
        config,
        model_dir=_absolute(config.model_dir),
        tenants_file=_absolute(config.tenants_file),
        budget_journal=_absolute(config.budget_journal),
        usage_ledger=_absolute(config.usage_ledger),
        auth=auth,
        tls=config.tls.absolute(),
        worker_tls=config.worker_tls.absolute(),
    )


def _absolute(path: str) -> str:
    return path and str(Path(path).absolute())


def to_json(config: RouterConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config))


def from_json(text: bytes | str) -> RouterConfig:
    """Raises ValueError that names the key."""
    try:
        return msgspec.json.decode(text, type=RouterConfig)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
