"""What the simulated engine takes from a Hugging Face model directory: sizes, not weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.base import EngineOptions, ModelInfo

_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimModel:
    info: ModelInfo
    #: Ids that no answer contains: end, begin, padding and other special tokens.
    special_tokens: frozenset[int]
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    kv_bytes_per_token: int

    @property
    def usable_tokens(self) -> NDArray[np.uint32]:
        """What may be sampled, in order; everything when a vocabulary is all special."""
        everything = np.arange(self.info.vocab_size, dtype=np.uint32)
        usable = np.setdiff1d(everything, np.array(sorted(self.special_tokens), dtype=np.uint32))
        return usable if len(usable) else everything


def read_model(options: EngineOptions) -> SimModel:
    """Raises ValueError that names the file and key at fault."""
    directory = Path(options.model)
    config = _read_json(directory / "config.json")
    if not config:
        raise ValueError(f"model: {directory / 'config.json'} is missing or empty")
    # Models of text and more keep the text model's sizes one level down.
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config
    vocab_size = _size(text, "vocab_size", directory)
    own_length = _size(text, "max_position_embeddings", directory)
    layers = _size(text, "num_hidden_layers", directory)
    heads = _size(text, "num_attention_heads", directory)
    kv_heads = _size(text, "num_key_value_heads", directory, heads)
    head_dim = _size(text, "head_dim", directory, max(1, _size(text, "hidden_size", directory, heads) // heads))
    dtype = (
        str(text.get("torch_dtype") or text.get("dtype") or "bfloat16") if options.dtype == "auto" else options.dtype
    )
    if options.max_model_len is not None and options.max_model_len > own_length:
        raise ValueError(f"max_model_len: {options.max_model_len} is more than the model's {own_length}")

    generation = _read_json(directory / "generation_config.json")
    eos = _token_ids(generation.get("eos_token_id")) or _token_ids(text.get("eos_token_id"))
    special = {*eos, *_token_ids(text.get("bos_token_id")), *_token_ids(text.get("pad_token_id"))}
    special |= _added_special_tokens(_read_json(directory / "tokenizer_config.json"))
    return SimModel(
        info=ModelInfo(
            name=options.served_model_name,
            revision=_revision(directory, special),
            max_model_len=options.max_model_len or own_length,
            vocab_size=vocab_size,
            eos_token_ids=tuple(sorted(eos)),
        ),
        special_tokens=frozenset(special),
        dtype=dtype,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_bytes_per_token=options.kv_bytes_per_token or _kv_bytes_per_token(text, layers, kv_heads, head_dim, dtype),
    )


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} is not a JSON object")
    return content


def _size(config: Mapping[str, object], key: str, directory: Path, default: int | None = None) -> int:
    value = config.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"model: {directory / 'config.json'}: {key} must be a positive number, is {value!r}")
    return value


def _token_ids(value: object) -> set[int]:
    """Configurations hold one id, a list of ids, or nothing."""
    return {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int) and token >= 0}


def _added_special_tokens(tokenizer_config: Mapping[str, object]) -> set[int]:
    added = tokenizer_config.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return set()
    return {int(token) for token, entry in added.items() if isinstance(entry, dict) and entry.get("special")}


def _revision(directory: Path, special: set[int]) -> str:
    """Over all that decides which tokens come out."""
    content = hashlib.sha256((directory / "config.json").read_bytes())
    content.update(repr(sorted(special)).encode())
    return content.hexdigest()


def _kv_bytes_per_token(config: Mapping[str, object], layers: int, kv_heads: int, head_dim: int, dtype: str) -> int:
    """Rounded up to a whole number of 64-bit words."""
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"dtype: {dtype!r} is none of {', '.join(sorted(_DTYPE_BYTES))}")
    values = 2 * kv_heads * head_dim
    rank, rope = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if isinstance(rank, int) and isinstance(rope, int):
        values = rank + rope  # multi-head latent attention
    return -(-layers * values * _DTYPE_BYTES[dtype] // 8) * 8
