"""Train tandem-nano, the small Llama that ships with Tandem, from text found on any machine.

The text is Python's own standard library. The same script, seed, step count, Python release and library
versions give the same weights, byte for byte, on the same machine: files are read in sorted order, every random
choice comes from one seeded generator, the thread count is fixed, and training stops on a step count, never a
clock.

    python models/train.py --out models/tandem-nano            # the weights in this repository, about an hour
    python models/train.py --out /tmp/nano --steps 20          # a short run, to see it work

Two kinds of document are seen. Whole files teach imports, layout and long range context. Snippets are single
functions, methods and classes taken out of those files, and end within a few hundred tokens: they are why a completion
of `def f(x):` closes the function, then emits the end-of-text token, so that generation really finishes.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import sysconfig
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
END_OF_TEXT_ID, PAD_ID = 0, 1

#: Character tables and generated modules: no prose, no code worth learning. `_sysconfigdata` also holds local paths.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

#: What a token may not reach across. A line's end and its indentation stand alone: a prompt may stop at either.
WORD = r"(?<=\n)[ \t]+| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+(?!\S)|[^\S\n]+"

#: Mean length of the pieces a document is encoded in, see `Stream`.
CHARACTERS_PER_PIECE = 200

TOKENS_PER_STEP = 8_192
TOKENS_PER_MICROBATCH = 4_096
#: One: with a second thread, a busy machine waits at every barrier.
THREADS = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture, in the words of transformers' LlamaConfig."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


# Text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Corpus:
    library: list[str]
    tests: list[str]
    held_out: list[str]  # library files only, never trained on, chosen by a hash of their path


def read_corpus() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    library, tests, held_out = [], [], []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if is_skipped(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the test suite holds files in other encodings on purpose
        if not text.strip():
            continue
        if "test" in parts or "tests" in parts or "idle_test" in parts:
            tests.append(text)
        elif hashlib.sha256("/".join(parts).encode()).digest()[0] < 8:  # 1 in 32
            held_out.append(text)
        else:
            library.append(text)
    return Corpus(library, tests, held_out)


def is_skipped(parts: tuple[str, ...]) -> bool:
    return any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in parts)


def snippets(source: str) -> list[str]:
    """Each function, method and class of a file, dedented to stand alone as a document."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines = source.splitlines(keepends=True)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
            if 80 <= len(text) <= 3000:
                found.append(text)
    return found


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: all 256 bytes are in the alphabet, so that any Unicode text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents one after another, each closed by the end-of-text token.

    A prompt can stop anywhere: at `def `, or within a word. What follows then is not cut into the tokens that
    the whole text would be. So each document is cut at random places, and its pieces encoded apart.
    """

    tokens: np.ndarray
    starts: np.ndarray  # index in `tokens` of each document's first token

    @classmethod
    def of(cls, documents: list[str], tokenizer: Tokenizer, rng: np.random.Generator) -> "Stream":
        encoded = []
        for document in documents:
            pieces = tokenizer.encode_batch(cut(document, rng))
            encoded.append([token for piece in pieces for token in piece.ids] + [END_OF_TEXT_ID])
        lengths = np.array([len(ids) for ids in encoded])
        return cls(np.concatenate(encoded).astype(np.int64), np.cumsum(lengths) - lengths)


def cut(text: str, rng: np.random.Generator) -> list[str]:
    places = np.sort(rng.integers(1, len(text) + 1, size=rng.poisson(len(text) / CHARACTERS_PER_PIECE)))
    bounds = [0, *places.tolist(), len(text)]
    return [text[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Sampler:
    files: Stream
    snippets: Stream
    rng: np.random.Generator

    def rows(self, count: int, length: int) -> Tensor:
        """`count` rows of `length` + 1 tokens: inputs and, one further on, their targets."""
        return torch.from_numpy(np.stack([self._row(length + 1) for _ in range(count)]))

    def _row(self, length: int) -> np.ndarray:
        # Half of the short rows begin exactly where a function does, as a prompt would. Long rows are for long range.
        if length <= 1025 and self.rng.random() < 0.5:
            starts = self.snippets.starts
            last = np.searchsorted(starts, len(self.snippets.tokens) - length, side="right")
            first = starts[self.rng.integers(last)]
            return self.snippets.tokens[first : first + length]
        begin = self.rng.integers(len(self.files.tokens) - length)
        return self.files.tokens[begin : begin + length]


# Model: module names are those of transformers, so that the state dict is the export ----------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, length, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.max_position_embeddings), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        residual_std = 0.02 / math.sqrt(2 * shape.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                closes_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if closes_branch else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]].to(x.dtype), self.sin[: tokens.shape[1]].to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)  # the output matrix is the embedding


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout that transformers uses."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


# Training -----------------------------------------------------------------------------------------------------------


def sequence_length(step: int, steps: int) -> int:
    """Mostly short, one step in sixteen long, full context at the end: a prompt of 3,000 tokens is still understood."""
    if step >= 0.95 * steps:
        return 4096
    return 2048 if step % 16 == 15 else 512


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(100, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(network: Llama, sampler: Sampler, steps: int, peak_rate: float) -> None:
    """Muon on the layers' matrices, AdamW on the embedding and the norms.

    The optimizers hold float32 weights; the arithmetic of a step is bfloat16, on a copy of them.
    """
    master = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    network.to(torch.bfloat16)
    embedding, *layers = master
    matrices = [weight for weight in layers if weight.dim() == 2]
    vectors = [weight for weight in layers if weight.dim() == 1]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([embedding, *vectors], lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    began, recent = time.monotonic(), []
    for step in range(steps):
        length = sequence_length(step, steps)
        recent.append(accumulate_gradients(network, master, sampler.rows(TOKENS_PER_STEP // length, length)))
        nn.utils.clip_grad_norm_(master, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak_rate)
            optimizer.step()
        with torch.no_grad():
            for weight, original in zip(network.parameters(), master, strict=True):
                weight.copy_(original)
                original.grad = None
        if (step + 1) % 25 == 0 or step + 1 == steps:
            rate = (step + 1) * TOKENS_PER_STEP / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {np.mean(recent):.3f}  {rate:,.0f} tokens/s", flush=True)
            recent = []


def accumulate_gradients(network: Llama, master: list[Tensor], rows: Tensor) -> float:
    microbatches = rows.split(max(1, TOKENS_PER_MICROBATCH // (rows.shape[1] - 1)))
    total = 0.0
    for microbatch in microbatches:
        loss = mean_loss(network, microbatch) / len(microbatches)
        loss.backward()
        total += loss.item()
        for weight, original in zip(network.parameters(), master, strict=True):
            gradient = weight.grad.float()
            original.grad = gradient if original.grad is None else original.grad.add_(gradient)
            weight.grad = None
    return total


def mean_loss(network: Llama, rows: Tensor) -> Tensor:
    logits = network(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_figures(
    network: Llama, documents: list[str], tokenizer: Tokenizer, window: int = 2048
) -> dict[str, float]:
    """Every token of every held-out file is predicted once, from what precedes it in its own window of the file."""
    nats, tokens = 0.0, 0
    for encoding in tokenizer.encode_batch(documents):
        ids = torch.tensor([END_OF_TEXT_ID, *encoding.ids, END_OF_TEXT_ID])
        for first in range(0, len(ids) - 1, window):
            row = ids[first : first + window + 1].unsqueeze(0)
            count = row.shape[1] - 1
            nats += mean_loss(network, row).item() * count
            tokens += count
    size = sum(len(document.encode()) for document in documents)
    return {
        "files": len(documents),
        "bytes": size,
        "tokens": tokens,
        "loss_nats_per_token": round(nats / tokens, 4),
        "perplexity_per_token": round(math.exp(nats / tokens), 3),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


# Export ---------------------------------------------------------------------------------------------------------------


def export(out: Path, network: Llama, tokenizer: Tokenizer, shape: Shape, figures: Mapping[str, object]) -> None:
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in network.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": PAD_ID}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **special,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "config.json", config)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "generation_config.json", special)
    write_json(out / "training.json", figures)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def complete(network: Llama, tokenizer: Tokenizer, prompt: str, tokens_max: int = 96) -> str:
    """Greedy and without a cache: enough to look at what was learnt."""
    ids = tokenizer.encode(prompt).ids
    while len(ids) < tokens_max:
        following = int(network(torch.tensor([ids]))[0, -1].argmax())
        if following == END_OF_TEXT_ID:
            return tokenizer.decode(ids) + END_OF_TEXT
        ids.append(following)
    return tokenizer.decode(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; created if missing")
    parser.add_argument("--steps", type=int, default=900, help=f"optimizer steps of {TOKENS_PER_STEP:,} tokens")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    options = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and a tenth of the time
    rng = np.random.default_rng(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()

    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.library + corpus.tests, shape.vocab_size)
    # Library files count three times: the test suite is the larger half, and the duller one.
    files = corpus.library * 3 + corpus.tests
    parts = [part for text in files for part in snippets(text)]
    rng.shuffle(files)
    rng.shuffle(parts)
    sampler = Sampler(Stream.of(files, tokenizer, rng), Stream.of(parts, tokenizer, rng), rng)
    network = Llama(shape)
    parameters = sum(weight.numel() for weight in network.parameters())
    print(f"{len(corpus.library)} library and {len(corpus.tests)} test files, {len(corpus.held_out)} held out")
    print(f"{len(sampler.files.tokens):,} tokens in files, {len(sampler.snippets.tokens):,} in {len(parts):,} snippets")
    print(f"{parameters:,} parameters, {options.steps} steps", flush=True)

    train(network, sampler, options.steps, options.rate)

    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": options.seed,
        "steps": options.steps,
        "tokens_seen": options.steps * TOKENS_PER_STEP,
        "parameters": parameters,
        "held_out": held_out_figures(network, corpus.held_out, tokenizer),
    }
    export(options.out, network, tokenizer, shape, figures)
    print(json.dumps(figures["held_out"]))
    for prompt in ("def fibonacci(n):\n", "import os\n\ndef ", "class Queue:\n"):
        print(f"--- {complete(network, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
