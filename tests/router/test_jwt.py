"""Tokens of an identity provider: minted here, with real keys and real signatures."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from protos import inference_pb2
from router.config import AuthConfig, JwtRules, RouterConfig
from router.core.errors import Unauthenticated, Unavailable
from router.core.request import Lane
from router.edge.identity import Identity, Presented, Scope
from router.edge.jwt import JwtVerifier
from tests.router.running import MODEL, MODEL_DIR, running

ISSUER, AUDIENCE = "https://issuer.example", "tandem"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
OTHER = ec.generate_private_key(ec.SECP256R1())
ALGORITHMS: dict[str, Any] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def jwk(key_id: str, key: Any, **more: str) -> dict[str, str]:
    algorithm = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256", ed25519.Ed25519PrivateKey: "EdDSA"}
    name = next(name for kind, name in algorithm.items() if isinstance(key, kind))
    as_text = jwt.get_algorithm_by_name(name).to_jwk(key.public_key())
    return {**json.loads(as_text), "kid": key_id, **more}


def token(algorithm: str = "ES256", key: Any = None, key_id: str | None = None, **claims: Any) -> str:
    said = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, "tenant": "acme", "sub": "me", **claims}
    said = {name: value for name, value in said.items() if value is not None}
    headers = {"kid": algorithm if key_id is None else key_id}
    return jwt.encode(said, key or ALGORITHMS[algorithm], algorithm, headers=headers)


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    write(path, *(jwk(name, key) for name, key in ALGORITHMS.items()))
    return path


def write(path: Path, *keys: dict[str, str]) -> None:
    write_text(path, json.dumps({"keys": keys}))


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def verifier(jwks: Path | str, clock: Clock | None = None, **rules: Any) -> JwtVerifier:
    return JwtVerifier(
        JwtRules(issuer=ISSUER, audience=AUDIENCE, jwks=str(jwks), **rules), clock=clock or time.monotonic
    )


async def identify(verifier: JwtVerifier, token: str) -> Identity:
    identity = await verifier.identify(Presented(token), time.time())
    assert identity is not None
    return identity


async def refused(verifier: JwtVerifier, token: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await verifier.identify(Presented(token), time.time())
    return caught.value.reason


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_good_token_is_its_tenant(jwks: Path, algorithm: str) -> None:
    identity = await identify(verifier(jwks), token(algorithm))
    assert identity == Identity(tenant="acme", lane_max=Lane.REALTIME, scopes=frozenset({Scope.INFERENCE}), key_id="me")


async def test_claims_name_tenant_lane_and_scopes(jwks: Path) -> None:
    asked = verifier(jwks, tenant_claim="https://x.example/org", lane_claim="lane", scope_claim="scope")
    claims: dict[str, Any] = {"https://x.example/org": "b", "lane": "batch", "scope": "openid tandem:admin"}
    identity = await identify(asked, token(**claims))
    assert (identity.tenant, identity.lane_max, identity.scopes) == ("b", Lane.BATCH, {Scope.ADMIN})
    listed = await identify(asked, token(**claims | {"scope": ["tandem:inference", "tandem:admin"]}))
    assert listed.scopes == set(Scope)
    assert not (await identify(asked, token(**claims | {"scope": None}))).scopes
    assert await refused(asked, token(**claims | {"lane": "fastest"})) == "TOKEN_CLAIM"
    assert await refused(asked, token(**claims | {"lane": None})) == "TOKEN_CLAIM"


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": time.time() - 60}, "TOKEN_EXPIRED"),
        ({"exp": None}, "TOKEN_CLAIM"),
        ({"nbf": time.time() + 600}, "TOKEN_NOT_YET_VALID"),
        ({"iss": "https://other.example"}, "TOKEN_ISSUER"),
        ({"iss": None}, "TOKEN_CLAIM"),
        ({"aud": "other"}, "TOKEN_AUDIENCE"),
        ({"aud": None}, "TOKEN_CLAIM"),
        ({"tenant": None}, "TOKEN_CLAIM"),
        ({"tenant": ["a"]}, "TOKEN_CLAIM"),
        ({"tenant": "a" * 257}, "TOKEN_CLAIM"),
        ({"tenant": "a\nb"}, "TOKEN_CLAIM"),
    ],
)
async def test_a_token_that_does_not_hold_says_why(jwks: Path, claims: dict[str, Any], reason: str) -> None:
    assert await refused(verifier(jwks), token(**claims)) == reason


async def test_clocks_may_differ_by_the_leeway(jwks: Path) -> None:
    await identify(verifier(jwks, leeway_s=30.0), token(exp=time.time() - 10))
    assert await refused(verifier(jwks, leeway_s=0.0), token(exp=time.time() - 10)) == "TOKEN_EXPIRED"


async def test_a_forged_signature_is_refused(jwks: Path) -> None:
    assert await refused(verifier(jwks), token("ES256", OTHER)) == "TOKEN_INVALID"
    head, body, signature = token().split(".")
    changed = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))) | {"tenant": "other"}
    forged = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()
    assert await refused(verifier(jwks), f"{head}.{forged}.{signature}") == "TOKEN_INVALID"


async def test_algorithms_off_the_list_are_refused_whatever_signs(jwks: Path) -> None:
    unsigned = jwt.encode({"tenant": "acme"}, "", algorithm="none")
    assert await refused(verifier(jwks), unsigned) == "TOKEN_ALGORITHM"
    shared = jwt.encode({"tenant": "acme"}, "x" * 32, algorithm="HS256", headers={"kid": "RS256"})
    assert await refused(verifier(jwks), shared) == "TOKEN_ALGORITHM"
    assert await refused(verifier(jwks, algorithms=("RS256",)), token("ES256")) == "TOKEN_ALGORITHM"


async def test_a_key_is_used_with_its_own_algorithm_only(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    write(path, jwk("RS256", RSA, alg="RS512"), jwk("ES256", RSA), jwk("EdDSA", ED, use="enc"))
    asked = verifier(path)
    assert await refused(asked, token("RS256")) == "TOKEN_KEY_UNKNOWN"
    assert await refused(asked, token("ES256")) == "TOKEN_INVALID"
    assert await refused(asked, token("EdDSA")) == "TOKEN_KEY_UNKNOWN"


async def test_what_is_no_token_is_left_to_others_or_refused(jwks: Path) -> None:
    assert await verifier(jwks).identify(Presented("tdm_key"), 0) is None
    assert await verifier(jwks).identify(Presented(), 0) is None
    assert await refused(verifier(jwks), "a.b.c") == "TOKEN_INVALID"


async def test_a_new_key_is_fetched_when_first_seen_but_not_for_every_made_up_one(jwks: Path) -> None:
    clock = Clock()
    asked = verifier(jwks, clock)
    await identify(asked, token())
    fresh = ec.generate_private_key(ec.SECP256R1())
    write(jwks, jwk("new", fresh))
    assert await refused(asked, token("ES256", fresh, "new")) == "TOKEN_KEY_UNKNOWN"
    clock.now += 10.0
    await identify(asked, token("ES256", fresh, "new"))
    assert await refused(asked, token()) == "TOKEN_KEY_UNKNOWN"


async def test_a_key_that_the_issuer_dropped_is_dropped_in_time(jwks: Path) -> None:
    clock = Clock()
    asked = verifier(jwks, clock)
    await identify(asked, token())
    write(jwks, jwk("new", OTHER))
    clock.now += 300.0
    assert await refused(asked, token()) == "TOKEN_KEY_UNKNOWN"


async def test_without_the_issuer_known_keys_stay_in_force(jwks: Path) -> None:
    clock = Clock()
    asked = verifier(jwks, clock)
    await identify(asked, token())
    write_text(jwks, "no JSON")
    clock.now += 300.0
    await identify(asked, token())
    with pytest.raises(Unavailable):
        await verifier(jwks).identify(Presented(token()), 0)


@pytest.fixture
def issuer(jwks: Path) -> Iterator[HTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/moved" else 200)
            if self.path == "/moved":
                self.send_header("location", "/jwks")
            self.end_headers()
            self.wfile.write(jwks.read_bytes())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


async def test_keys_come_over_http_too_and_redirects_are_not_followed(issuer: HTTPServer) -> None:
    url = f"http://127.0.0.1:{issuer.server_port}"
    assert (await identify(verifier(f"{url}/jwks"), token())).tenant == "acme"
    with pytest.raises(Unavailable):
        await verifier(f"{url}/moved").identify(Presented(token()), 0)


async def test_a_router_takes_them(jwks: Path, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[tenants.acme]\n")
    rules = JwtRules(issuer=ISSUER, audience=AUDIENCE, jwks=str(jwks))
    async with running(tenants_file=str(tenants), auth=AuthConfig(mode="jwt", jwt=rules)) as router:
        metadata = (("authorization", f"Bearer {token()}"),)
        await router.worker("w", answer=(1, 2))
        request = inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.Sampling(max_tokens=2))
        messages = [message async for message in router.inference.Generate(request, metadata=metadata)]
        assert messages[-1].HasField("finished")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"issuer": ""}, "auth.jwt.issuer: must not be empty"),
        ({"algorithms": ("HS256",)}, "auth.jwt.algorithms: 'HS256' is none of RS256"),
        ({"algorithms": ("none",)}, "auth.jwt.algorithms: 'none' is none of"),
        ({"algorithms": ()}, "auth.jwt.algorithms: must not be empty"),
        ({"jwks": "http://issuer.example/jwks"}, "auth.jwt.jwks: must be a file or an https URL"),
        ({"jwks": "/nowhere.json"}, "auth.jwt.jwks: /nowhere.json is not a file"),
        ({"jwks_fetch_interval_s_min": 0.0}, "auth.jwt.jwks_fetch_interval_s_min: must be at least 1"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("")
    rules = JwtRules(**{"issuer": ISSUER, "audience": AUDIENCE, "jwks": "https://issuer.example/jwks", **changes})
    auth = AuthConfig(mode="jwt", jwt=rules)
    with pytest.raises(ValueError, match="auth") as caught:
        RouterConfig(model_dir=str(MODEL_DIR), model_name=MODEL, tenants_file=str(tenants), auth=auth)
    assert words in str(caught.value)
