"""Tiny models and tokenizers, built in the tests; real data and a real tiny model where the machine has them."""

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in ("", "cache", "tools"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

TENSOR_ROOMS = (
    "chunked", "collate", "divergence", "fused", "fused_divergences", "fused_tiles", "lens", "loss_parts", "losses",
    "mixed_targets", "positions", "sketch_fit", "student", "tail_sampling", "tails", "targets", "teacher_pass",
)  # fmt: skip
install_import_hook([f"distilllens.{room}" for room in TENSOR_ROOMS], "beartype.beartype")

# Started in the background, a shell's children ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"

TEXT = [
    "the cat sat on the mat and the dog sat on the rug",
    "what is the capital of france? the capital of france is paris.",
    "one two three four five six seven eight nine ten",
    "the teacher writes and the student reads what the teacher wrote",
    "below is an instruction that describes a task. write a response.",
    "café naïve über 日本語 🙂",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = ("llama", "gpt2", "qwen2")


def build_tokenizer(*, chat_template: str | None = None, vocab_size: int = 320):
    """A byte-level BPE tokenizer trained on a few sentences; pad and eos are one token, as in GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    eos = "<|im_end|>" if chat_template else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A trained tokenizer of 320 tokens without a chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_chat_tokenizer():
    """The same with a ChatML template."""
    return build_tokenizer(chat_template=CHATML)


def build_model(
    architecture: str = "llama",
    *,
    tied: bool = False,
    num_layers: int = 4,
    vocab_size: int = 320,
    seed: int = 0,
    **settings: object,
):
    """A random model of hidden size 32 in float32 and evaluation mode, with lively weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": num_layers, "n_head": 4, "n_positions": 256}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"intermediate_size": 64, "max_position_embeddings": 256}
        if architecture in ("gemma2", "cohere", "granite"):
            sizes |= {"head_dim": 8}
    config = AutoConfig.for_model(architecture, **{**common, **sizes, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """Factory of random models: ``tiny_model("llama" | "gpt2" | "qwen2", tied=..., num_layers=...)``."""
    return build_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Callable[..., Path]:
    """Factory of saved random models with a tokenizer; equal arguments give one folder."""
    made: dict[tuple, Path] = {}

    def make(architecture: str = "llama", *, tokenizer=None, **settings: object) -> Path:
        tokenizer = tokenizer or tiny_tokenizer
        key = (architecture, id(tokenizer), *sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            build_model(architecture, vocab_size=len(tokenizer), **settings).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[dict]], Path]:
    """``write_jsonl(path, rows)`` writes one JSON object a line and returns the path."""

    def write(path: Path, rows: Iterable[dict]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, str]]:
    """Instruction rows of many lengths."""
    words = " ".join(TEXT).split()
    return [
        {
            "instruction": " ".join(words[(3 * n) % 40 : (3 * n) % 40 + 3 + n % 5]),
            "input": " ".join(words[n % 30 : n % 30 + n % 3]),
            "output": " ".join(words[(5 * n) % 40 : (5 * n) % 40 + 2 + (7 * n) % 11]),
        }
        for n in range(24)
    ]


@pytest.fixture(scope="session")
def dolly_rows() -> Path:
    """Real instruction data, where the machine has it."""
    path = SHARED / "data" / "dolly_train.jsonl"
    return path if path.is_file() else pytest.skip("the shared Dolly rows are not on this machine")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real tiny Llama, where the machine has it."""
    path = SHARED / "models" / "stories260K"
    return path if path.is_dir() else pytest.skip("the shared stories260K model is not on this machine")
