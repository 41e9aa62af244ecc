"""What a KServe request asks for.

There are two conventions for language models, that of Triton's vLLM backend and that of its TensorRT-LLM ensemble, and
clients of either are served: options come as tensors, in the JSON object of `sampling_parameters`, or in the request's
parameters, and a number may come as text. Where one is given twice, the tensor counts, then the JSON object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from router.core.errors import Invalid
from router.edge import kserve_wire as wire
from router.edge.admit import Asked
from router.edge.kserve_wire import Output, TensorFacts
from router.edge.tensors import Element, Tensor

Said = Element | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Infer:
    """One request, in Tandem's terms."""

    prompt: str | tuple[int, ...]
    prompt_field: str
    asked: Asked
    stream: bool
    #: The answer's text begins with the prompt's.
    with_prompt: bool
    outputs: tuple[Output, ...]
    #: Each response is to say whether it is the last, and the last may be empty.
    say_final: bool
    lane: str
    timeout_s: float | None
    #: What the client called an option, by ours.
    labels: Mapping[str, str]

    def relabelled(self, error: Invalid) -> Invalid:
        """The same, naming the tensor that the client sent."""
        name, bracket, index = error.field.removeprefix("sampling.").partition("[")
        label = self.labels.get(name, name) + bracket + index
        return type(error)(label, error.description, limit=error.limit)


def read(request: wire.InferRequest) -> Infer:
    """Raises Invalid."""
    tensors = wire.inputs(request)
    parameters = wire.parameters(request)
    prompt, prompt_field = _prompt(tensors)
    options = _Options(tensors, parameters)
    get = options.get
    asked = {name: get(name) for name in _ASKED}
    stream = bool(get("stream"))
    outputs = _outputs([output.name for output in request.outputs], options, isinstance(prompt, tuple))
    if asked["logprobs"] is None and any(name in _OF_LOGPROBS for name, _ in outputs):
        asked["logprobs"] = 0
    lengths = get("input_lengths")
    if lengths is not None and lengths != len(prompt):
        raise Invalid("input_lengths", f"is {lengths}, but input_ids has {len(prompt)}")
    # Zero is how TensorRT-LLM's clients say that they leave it to the model.
    asked["top_p"] = asked["top_p"] or None
    stop_token_ids = tuple(get("stop_token_ids") or ())
    end_id = get("end_id")
    without_prompt = get("exclude_input_in_output")
    timeout_us = get("timeout")
    return Infer(
        prompt=prompt,
        prompt_field=prompt_field,
        asked=Asked(
            **asked,
            stop=tuple(get("stop") or ()),
            stop_token_ids=stop_token_ids if end_id is None else (*stop_token_ids, end_id),
        ),
        stream=stream,
        with_prompt=isinstance(prompt, str) and not (stream if without_prompt is None else without_prompt),
        outputs=outputs,
        say_final=bool(get("triton_enable_empty_final_response")),
        lane=get("lane") or "",
        timeout_s=timeout_us / 1e6 if timeout_us else None,
        labels=options.labels,
    )


def _prompt(tensors: Mapping[str, Tensor]) -> tuple[str | tuple[int, ...], str]:
    text, ids = tensors.get("text_input"), tensors.get("input_ids")
    if text is not None and ids is not None:
        raise Invalid("input_ids", "is given beside text_input; one of them is the prompt")
    if ids is not None:
        return tuple(_natural(ids.name, element) for element in ids.elements), ids.name
    if text is None:
        raise Invalid("text_input", "must be given, or input_ids")
    return _text(text.name, text.elements), text.name


def _outputs(asked_for: Sequence[str], options: _Options, by_id: bool) -> tuple[Output, ...]:
    if not asked_for:
        flagged = [name for flag, names in _FLAGS.items() if options.get(flag) for name in names]
        asked_for = ["text_output", *(["output_ids"] if by_id else []), *flagged]
    for at, name in enumerate(asked_for):
        if name not in _OUTPUTS:
            raise Invalid(f"outputs[{at}].name", f"{name!r} is none of {', '.join(_OUTPUTS)}")
    return tuple(Output(name, _OUTPUTS[name]) for name in dict.fromkeys(asked_for))


class _Options:
    def __init__(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Said]) -> None:
        #: By our name: what the client called it, and the elements.
        self._said: dict[str, tuple[str, Sequence[Said]]] = {}
        # Parameters are also how clients talk to what is between them and us: what is unknown is not for us.
        self._take("parameters.", {name: (value,) for name, value in parameters.items()}, unknown_is_ours=False)
        if (json := tensors.get("sampling_parameters")) is not None:
            self._take("sampling_parameters.", _json_object(json), unknown_is_ours=True)
        rest = {name: one.elements for name, one in tensors.items() if name not in _NOT_OPTIONS}
        self._take("", rest, unknown_is_ours=True)

    def _take(self, prefix: str, said: Mapping[str, Sequence[Said]], *, unknown_is_ours: bool) -> None:
        for name, elements in said.items():
            ours = _ALIASES.get(name, name)
            if ours in _KINDS:
                self._said[ours] = (prefix + name, elements)
            elif ours in _ONLY:
                _check_neutral(prefix + name, _ONLY[ours], elements)
            elif unknown_is_ours and ours not in _WITHOUT_EFFECT:
                raise Invalid(prefix + name, f"is not known; known: {', '.join(sorted({*_KINDS, *_ALIASES}))}")

    @property
    def labels(self) -> dict[str, str]:
        return {name: label for name, (label, _) in self._said.items()}

    def get(self, name: str) -> Any:
        if name not in self._said:
            return None
        label, elements = self._said[name]
        return _KINDS[name](label, elements)


def _json_object(tensor: Tensor) -> dict[str, Sequence[Said]]:
    text = _text(tensor.name, tensor.elements)
    try:
        said = msgspec.json.decode(text or "{}", type=dict[str, object])
    except msgspec.DecodeError:
        raise Invalid(tensor.name, "is not a JSON object") from None
    found: dict[str, Sequence[Said]] = {}
    for name, value in said.items():
        if value is None:
            continue
        elements = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Said)]
        if isinstance(value, list | dict) and len(elements) != len(value):
            raise Invalid(f"{tensor.name}.{name}", "must be a text, a number, true, false, or a list of them")
        found[name] = elements
    return found


def _check_neutral(label: str, neutral: tuple[Said, ...], elements: Iterable[Said]) -> None:
    """Of what is not supported, the values that ask for nothing are."""
    for element in elements:
        value = _decoded(label, element)
        if value not in neutral and str(value).lower() not in map(str, neutral):
            raise Invalid(label, f"is not supported; may be absent, or {neutral[0]!r}")


# Kinds of options: from the elements that came to one value. Raise Invalid.


def _one(label: str, elements: Sequence[Said]) -> bool | int | float | str:
    if len(elements) != 1:
        raise Invalid(label, f"must have one element, has {len(elements)}", limit="1")
    return _decoded(label, elements[0])


def _decoded(label: str, element: Said) -> bool | int | float | str:
    if not isinstance(element, bytes):
        return element
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise Invalid(label, "is not valid UTF-8") from None


def _text(label: str, elements: Sequence[Said]) -> str:
    value = _one(label, elements)
    if not isinstance(value, str):
        raise Invalid(label, "must be a text")
    return value


def _texts(label: str, elements: Sequence[Said]) -> list[str]:
    """Empty ones are how some clients send none."""
    return [text for element in elements if (text := _text(label, [element]))]


def _int(label: str, elements: Sequence[Said]) -> int:
    value = _one(label, elements)
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise Invalid(label, f"must be a whole number, is {str(value)[:64]!r}") from None


def _natural(label: str, element: Said) -> int:
    value = _int(label, [element])
    if value < 0:
        raise Invalid(label, f"must not be negative, is {value}", limit="0")
    return value


def _one_natural(label: str, elements: Sequence[Said]) -> int:
    return _natural(label, _one(label, elements))


def _naturals(label: str, elements: Sequence[Said]) -> list[int]:
    return [_natural(label, element) for element in elements]


def _float(label: str, elements: Sequence[Said]) -> float:
    value = _one(label, elements)
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise Invalid(label, f"must be a number, is {str(value)[:64]!r}") from None


def _bool(label: str, elements: Sequence[Said]) -> bool:
    value = str(_one(label, elements)).lower()
    if value not in ("true", "false", "1", "0"):
        raise Invalid(label, f"must be true or false, is {value[:64]!r}")
    return value in ("true", "1")


def _end_id(label: str, elements: Sequence[Said]) -> int | None:
    """Below zero: the model's own alone."""
    value = _int(label, elements)
    return None if value < 0 else value


#: Options of sampling, and how they are read.
_ASKED: dict[str, Callable[[str, Sequence[Said]], object]] = {
    "max_tokens": _int,
    "min_tokens": _int,
    "temperature": _float,
    "top_p": _float,
    "top_k": _int,
    "min_p": _float,
    "presence_penalty": _float,
    "frequency_penalty": _float,
    "repetition_penalty": _float,
    "seed": _int,
    "ignore_eos": _bool,
    "logprobs": _int,
}

#: Options that ask for outputs.
_FLAGS = {
    "return_finish_reason": ("finish_reason",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_logprobs": ("logprobs",),
    "return_cumulative_logprob": ("cumulative_logprob",),
    "return_log_probs": ("output_log_probs", "cum_log_probs"),
}

_KINDS: dict[str, Callable[[str, Sequence[Said]], object]] = {
    **_ASKED,
    **dict.fromkeys(_FLAGS, _bool),
    "stop": _texts,
    "stop_token_ids": _naturals,
    "end_id": _end_id,
    "stream": _bool,
    "exclude_input_in_output": _bool,
    "input_lengths": _one_natural,
    "lane": _text,
    # Microseconds, as Triton's clients give it.
    "timeout": _one_natural,
    "triton_enable_empty_final_response": _bool,
}

_ALIASES = {
    "streaming": "stream",
    "stop_words": "stop",
    "random_seed": "seed",
    "request_output_len": "max_tokens",
    "min_length": "min_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
}

#: What is not supported, and the values of it that ask for nothing.
_ONLY: dict[str, tuple[Said, ...]] = {
    "bad_words": ("",),
    "beam_width": (1,),
    "n": (1,),
    "best_of": (1,),
    "num_return_sequences": (1,),
    "return_context_logits": (False, "false"),
    "return_generation_logits": (False, "false"),
    "skip_special_tokens": (True, "true"),
    "include_stop_str_in_output": (False, "false"),
}

#: Nothing that is done here depends on them: padding, penalties of beams, Triton's own queue.
_WITHOUT_EFFECT = frozenset({"pad_id", "length_penalty", "len_penalty", "early_stopping", "priority", "detokenize"})

_NOT_OPTIONS = ("text_input", "input_ids", "sampling_parameters")

_OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
    "logprobs": "BYTES",
    "cumulative_logprob": "FP32",
    "output_ids": "INT32",
    "sequence_length": "INT32",
    "output_log_probs": "FP32",
    "cum_log_probs": "FP32",
    "batch_index": "INT32",
    "sequence_index": "INT32",
}
_OF_LOGPROBS = ("logprobs", "cumulative_logprob", "output_log_probs", "cum_log_probs")

#: What models' metadata tells.
INPUTS = (
    TensorFacts("text_input", "BYTES", optional=False),
    TensorFacts("input_ids", "INT32", -1),
    TensorFacts("stream", "BOOL"),
    TensorFacts("sampling_parameters", "BYTES"),
    TensorFacts("exclude_input_in_output", "BOOL"),
    TensorFacts("max_tokens", "INT32"),
    TensorFacts("min_tokens", "INT32"),
    TensorFacts("temperature", "FP32"),
    TensorFacts("top_p", "FP32"),
    TensorFacts("top_k", "INT32"),
    TensorFacts("min_p", "FP32"),
    TensorFacts("presence_penalty", "FP32"),
    TensorFacts("frequency_penalty", "FP32"),
    TensorFacts("repetition_penalty", "FP32"),
    TensorFacts("random_seed", "UINT64"),
    TensorFacts("stop_words", "BYTES", -1),
    TensorFacts("end_id", "INT32"),
    TensorFacts("ignore_eos", "BOOL"),
    TensorFacts("logprobs", "INT32"),
    *(TensorFacts(flag, "BOOL") for flag in _FLAGS),
)
OUTPUTS = tuple(
    TensorFacts(name, datatype, -1 if name in ("output_ids", "output_log_probs") else 1)
    for name, datatype in _OUTPUTS.items()
)
