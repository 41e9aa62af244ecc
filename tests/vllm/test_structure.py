"""Answers that must have a form, and tokens made likelier, by one engine and by two."""

import asyncio
import json
import re

import pytest
from tokenizers import Tokenizer

from engine.base import (
    LOGIT_BIAS,
    STRUCTURE,
    DecodeLeg,
    FailureKind,
    FinishReason,
    LegError,
    Sampling,
    Structure,
    StructureKind,
)
from tests.vllm.harness import MODEL, Answer, Pair, becomes_idle, collect, is_idle, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "size": {"enum": ["small", "large"]},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    },
    "required": ["name", "size", "parts"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-[01][0-9]-[0-3][0-9]"
SUM = 'root ::= number " + " number\nnumber ::= [1-9] [0-9]?'
FORMS = [
    Structure(StructureKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    Structure(StructureKind.REGEX, DATE),
    Structure(StructureKind.GRAMMAR, SUM),
]


def text(answer: Answer) -> str:
    """Without the token that ended it."""
    assert answer.finish_reason is FinishReason.STOP
    return str(TOKENIZER.decode(answer.token_ids[:-1]))


def has_form(structure: Structure, said: str) -> bool:
    if structure.kind is StructureKind.REGEX:
        return re.fullmatch(DATE, said) is not None
    if structure.kind is StructureKind.GRAMMAR:
        return re.fullmatch(r"[1-9][0-9]? \+ [1-9][0-9]?", said) is not None
    value = json.loads(said)
    return (
        value.keys() == {"name", "size", "parts"}
        and re.fullmatch("[a-z]{1,8}", value["name"]) is not None
        and value["size"] in ("small", "large")
        and [type(part) for part in value["parts"]] == [bool, bool]
    )


async def test_the_engine_says_what_may_be_asked_of_it(pair: Pair) -> None:
    assert set(pair.infos[0].model.features) == {STRUCTURE, LOGIT_BIAS}


@pytest.mark.parametrize("structure", FORMS, ids=lambda structure: structure.kind.value)
@pytest.mark.parametrize("seed", [None, 3])
async def test_an_answer_by_two_engines_has_the_form_from_its_first_token(
    pair: Pair, structure: Structure, seed: int | None
) -> None:
    sampling = Sampling(max_tokens=120, temperature=0.0 if seed is None else 1.0, seed=seed, structure=structure)
    asked = prompt(80, 500)
    split = await pair.split(asked, sampling, resample=True)
    assert has_form(structure, text(split))
    whole = await pair.whole(asked, sampling)
    assert whole.token_ids == split.token_ids


async def test_a_json_object_is_one(pair: Pair) -> None:
    sampling = Sampling(max_tokens=40, temperature=0.0, structure=Structure(StructureKind.JSON_OBJECT))
    answer = await pair.split(prompt(80, 900), sampling, resample=True)
    assert TOKENIZER.decode(answer.token_ids).startswith("{")


async def test_neighbours_in_the_batch_are_what_they_are_alone(pair: Pair) -> None:
    plain = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
    formed = [Sampling(max_tokens=120, temperature=0.0, structure=structure) for structure in FORMS]
    alone = [await pair.whole(prompt(60, 100 * at), plain) for at in range(4)]
    together = await asyncio.gather(
        *(pair.whole(prompt(60, 100 * at), plain) for at in range(4)),
        *(pair.split(prompt(60, 70 * at), sampling, resample=True) for at, sampling in enumerate(formed)),
    )
    assert [answer.token_ids for answer in together[:4]] == [answer.token_ids for answer in alone]
    for structure, answer in zip(FORMS, together[4:], strict=True):
        assert has_form(structure, text(answer))


@pytest.mark.parametrize(
    "structure",
    [
        Structure(StructureKind.JSON_SCHEMA, "{"),
        Structure(StructureKind.JSON_SCHEMA, '{"type": "no-such"}'),
        Structure(StructureKind.REGEX, "(unclosed"),
        Structure(StructureKind.GRAMMAR, "root ::= nothing"),
        Structure(StructureKind.JSON_SCHEMA, "[" * 100_000),
    ],
    ids=range(5),
)
async def test_a_form_that_is_none_is_refused_and_harms_nobody(pair: Pair, structure: Structure) -> None:
    leg = DecodeLeg(
        leg_id=pair.number(),
        tenant="t",
        token_ids=prompt(20),
        prompt_tokens=20,
        sampling=Sampling(max_tokens=8, temperature=0.0, structure=structure),
    )
    with pytest.raises(LegError) as refused:
        await collect(pair.decode.decode(leg))
    assert refused.value.kind is FailureKind.INVALID
    assert is_idle(await becomes_idle(pair.decode))
    plain = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    assert len((await pair.split(prompt(50), plain)).token_ids) == 4


async def test_a_token_made_likelier_is_taken(pair: Pair) -> None:
    sampling = Sampling(max_tokens=5, temperature=0.0, ignore_eos=True, logit_bias=((77, 100.0),))
    assert (await pair.split(prompt(50), sampling)).token_ids == [77] * 5
