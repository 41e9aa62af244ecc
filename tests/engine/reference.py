"""The simulated model without memory, blocks, batches or numpy arithmetic: what every engine must answer."""

from engine.sim_memory import _MULTIPLIER, Chain, _stream

MASK = (1 << 64) - 1
STRIDE = 16
WEIGHTS = [int(word) | 1 for word in _stream("weight", 1024)]


def mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def chain_values(chain: Chain, salt: str, token_ids: list[int]) -> list[int]:
    values: list[int] = []
    for token in token_ids:
        extend(chain, salt, values, token)
    return values


def extend(chain: Chain, salt: str, values: list[int], token: int) -> None:
    before = values[-1] if values else chain.seed(salt)
    values.append((before * _MULTIPLIER + int(chain._token_hash[token])) & MASK)


def next_token(values: list[int], usable: list[int], sampling_seed: int | None = None) -> int:
    position = len(values) - 1
    offset = mix(position) % STRIDE
    read = sum(values[stride * STRIDE + offset] * WEIGHTS[stride] for stride in range(position // STRIDE))
    drawn = 0 if sampling_seed is None else (mix(sampling_seed + 1) | 1) * (position + 1)
    return usable[mix((mix(values[position]) + read + drawn) & MASK) % len(usable)]


def answer(
    chain: Chain, usable: list[int], salt: str, prompt: tuple[int, ...], count: int, seed: int | None = None
) -> list[int]:
    values, tokens = chain_values(chain, salt, list(prompt)), []
    for _ in range(count):
        tokens.append(next_token(values, usable, seed))
        extend(chain, salt, values, tokens[-1])
    return tokens
