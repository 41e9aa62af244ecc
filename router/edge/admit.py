"""Checks what a client asks for, against the model and the server's limits, and fills defaults in.

Every refusal names the field and the limit. Edges bring a protocol's fields into `Asked`; from there on there is one
set of rules, whatever the protocol.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property

from router.config import RequestLimits
from router.core.errors import Invalid, OutOfRange
from router.core.request import Lane, Sampling, Structure, StructureKind
from router.core.worker import LOGIT_BIAS, STRUCTURE, ModelFacts
from router.edge.text import ModelText

_LOGIT_BIAS_MAX = 100.0
#: Seeds are signed 64-bit on the wire, and engines take no negative ones.
SEED_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A client's sampling wishes; None takes the default."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    structure: Structure | None = None
    #: Token ids, and what to add to their logits.
    logit_bias: tuple[tuple[int, float], ...] = ()


class PastContext(OutOfRange):
    """Prompt and answer do not fit into the model's context."""


#: Inclusive ranges. Outside of them a value is a mistake: engines would clamp it, or answer noise.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (0, SEED_MAX),
}


class Rules:
    """For one model."""

    def __init__(self, limits: RequestLimits, text: ModelText) -> None:
        self._limits = limits
        self._text = text

    @cached_property
    def _token_bytes_max(self) -> int:
        """UTF-8 bytes that one token stands for at most: no vocabulary's spelling of them is shorter."""
        return max((len(entry.encode()) for entry in self._text.tokenizer.get_vocab()), default=1)

    def check_text(self, field: str, text: str, facts: ModelFacts) -> None:
        """Refuses, without tokenizing it, a text that surely has too many tokens."""
        if not text:
            raise Invalid(field, "the prompt is empty")
        nbytes = len(text.encode())
        if nbytes > self._token_bytes_max * facts.max_model_len:
            raise _past_context(field, f"at least {-(-nbytes // self._token_bytes_max)}", facts)

    def check_prompt(self, field: str, token_ids: tuple[int, ...], facts: ModelFacts) -> None:
        if not token_ids:
            raise Invalid(field, "the prompt is empty")
        if len(token_ids) >= facts.max_model_len:
            raise _past_context(field, str(len(token_ids)), facts)
        if max(token_ids) >= facts.vocab_size:
            at, token_id = next((at, it) for at, it in enumerate(token_ids) if it >= facts.vocab_size)
            raise OutOfRange(
                f"{field}[{at}]",
                f"token {token_id} is outside the model's vocabulary of {facts.vocab_size}",
                limit=str(facts.vocab_size),
            )

    def request_id(self, request_id: str) -> None:
        limit = self._limits.request_id_chars_max
        if len(request_id) > limit:
            raise Invalid("request_id", f"at most {limit} characters, has {len(request_id)}", limit=str(limit))
        if not request_id.isprintable() or "/" in request_id:
            raise Invalid("request_id", "must be printable characters without '/'")

    def lane(self, name: str) -> Lane:
        try:
            return Lane(name or Lane.STANDARD.value)
        except ValueError:
            known = ", ".join(lane.value for lane in Lane)
            raise Invalid("lane", f"must be one of {known}, is {name!r}") from None

    def sampling(self, asked: Asked, prompt_tokens: int, facts: ModelFacts) -> Sampling:
        for name, (low, high) in RANGES.items():
            _check(name, getattr(asked, name), low, high)
        if asked.top_p is not None and not 0 < asked.top_p <= 1:
            raise _outside("top_p", asked.top_p, "more than 0 and at most 1")
        if asked.repetition_penalty is not None and not 0 < asked.repetition_penalty <= 10:
            raise _outside("repetition_penalty", asked.repetition_penalty, "more than 0 and at most 10")
        _check("top_k", asked.top_k, 0, facts.vocab_size)
        _check("logprobs", asked.logprobs, 0, self._limits.logprobs_max)
        recommended = self._text.recommended.get
        max_tokens = self._max_tokens(asked.max_tokens, prompt_tokens, facts)
        _check("min_tokens", asked.min_tokens, 0, max_tokens)
        self._check_stops(asked, facts)
        self._check_logit_bias(asked.logit_bias, facts)
        if asked.structure is not None:
            self._check_structure(asked.structure, facts)
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=asked.min_tokens or 0,
            temperature=_or(asked.temperature, recommended("temperature", 1.0)),
            top_p=_or(asked.top_p, recommended("top_p", 1.0)),
            top_k=int(_or(asked.top_k, recommended("top_k", 0))),
            min_p=_or(asked.min_p, recommended("min_p", 0.0)),
            presence_penalty=_or(asked.presence_penalty, 0.0),
            frequency_penalty=_or(asked.frequency_penalty, 0.0),
            repetition_penalty=_or(asked.repetition_penalty, recommended("repetition_penalty", 1.0)),
            seed=asked.seed,
            stop_token_ids=asked.stop_token_ids,
            ignore_eos=bool(asked.ignore_eos),
            logprobs=asked.logprobs,
            structure=asked.structure,
            logit_bias=asked.logit_bias,
        )

    def _max_tokens(self, asked: int | None, prompt_tokens: int, facts: ModelFacts) -> int:
        room = facts.max_model_len - prompt_tokens
        if asked is None:
            return min(int(self._text.recommended.get("max_tokens", self._limits.max_tokens_default)), room)
        _check("max_tokens", asked, 1, facts.max_model_len)
        if asked > room:
            raise PastContext(
                "sampling.max_tokens",
                f"{asked} after a prompt of {prompt_tokens} is past the model's context, {facts.max_model_len} tokens",
                limit=str(facts.max_model_len),
            )
        return asked

    def _check_stops(self, asked: Asked, facts: ModelFacts) -> None:
        limits = self._limits
        if len(asked.stop) > limits.stop_strings_max:
            raise _outside("stop", len(asked.stop), f"at most {limits.stop_strings_max} strings")
        for at, stop in enumerate(asked.stop):
            if not 0 < len(stop) <= limits.stop_chars_max:
                raise _outside(f"stop[{at}]", len(stop), f"from 1 to {limits.stop_chars_max} characters")
        if len(asked.stop_token_ids) > limits.stop_token_ids_max:
            raise _outside("stop_token_ids", len(asked.stop_token_ids), f"at most {limits.stop_token_ids_max}")
        for at, token_id in enumerate(asked.stop_token_ids):
            if token_id >= facts.vocab_size:
                raise OutOfRange(
                    f"sampling.stop_token_ids[{at}]",
                    f"token {token_id} is outside the model's vocabulary of {facts.vocab_size}",
                    limit=str(facts.vocab_size),
                )

    def _check_logit_bias(self, logit_bias: tuple[tuple[int, float], ...], facts: ModelFacts) -> None:
        if not logit_bias:
            return
        if LOGIT_BIAS not in facts.features:
            raise Invalid("sampling.logit_bias", "is not supported by this model's engine")
        if len(logit_bias) > self._limits.logit_bias_max:
            raise _outside("logit_bias", len(logit_bias), f"at most {self._limits.logit_bias_max} tokens")
        for token_id, bias in logit_bias:
            if token_id >= facts.vocab_size:
                raise OutOfRange(
                    f"sampling.logit_bias[{token_id}]",
                    f"token {token_id} is outside the model's vocabulary of {facts.vocab_size}",
                    limit=str(facts.vocab_size),
                )
            _check(f"logit_bias[{token_id}]", bias, -_LOGIT_BIAS_MAX, _LOGIT_BIAS_MAX)

    def _check_structure(self, structure: Structure, facts: ModelFacts) -> None:
        """That the engine can follow it, only the engine can tell."""
        if STRUCTURE not in facts.features:
            raise Invalid("sampling.structure", "is not supported by this model's engine")
        limit, nbytes = self._limits.structure_bytes_max, len(structure.text.encode())
        if nbytes > limit:
            raise Invalid("sampling.structure", f"at most {limit} bytes, has {nbytes}", limit=str(limit))
        if structure.kind is StructureKind.JSON_SCHEMA and not _is_schema(structure.text):
            raise Invalid("sampling.structure", "must be a JSON Schema: a JSON object, or true")
        if structure.kind is StructureKind.GRAMMAR and not structure.text.strip():
            raise Invalid("sampling.structure", "the grammar is empty")


def _is_schema(text: str) -> bool:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(schema, dict) or schema is True


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise _outside(
            name, value, f"from {low:.12g} to {high:.12g}" if math.isfinite(high) else f"at least {low:.12g}"
        )


def _outside(name: str, value: float, allowed: str) -> Invalid:
    return Invalid(f"sampling.{name}", f"must be {allowed}, is {value:.12g}", limit=allowed)


def _past_context(field: str, tokens: str, facts: ModelFacts) -> PastContext:
    return PastContext(
        field,
        f"the prompt has {tokens} tokens; with the answer, the model's context is {facts.max_model_len}",
        limit=str(facts.max_model_len),
    )
