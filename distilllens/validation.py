"""What is measured on held-out rows while a run trains: closeness to the teacher, and ROUGE-L of greedy answers."""

from dataclasses import dataclass

import torch

from distilllens.config import EvaluateConfig
from distilllens.data import Prompts, load_examples, prompt_and_references, row_settings
from distilllens.engine import Engine
from distilllens.generate import Sampling, check_positions, end_tokens, generate
from distilllens.lens_samples import sample_lens, with_final, write_lens_samples
from distilllens.rouge import RougeL
from distilllens.student import Pairs
from distilllens.subjects import Subject, ends_of_references
from distilllens.teacher_forced import averages
from distilllens.training_run import TrainingRun
from distilllens.vocabulary import effective_vocab_size

ROWS_AT_A_TIME = 16
"""Rows answered together."""


@dataclass(frozen=True)
class Validation:
    """The held-out rows of a run, opened and checked; every rank calls every method."""

    run: TrainingRun
    prompts: Prompts | None
    """Rows of ``--eval-dataset`` as prompts with references."""
    ends: frozenset[int]
    """Tokens that end an answer."""

    @property
    def is_possible(self) -> bool:
        """Whether there are held-out rows at all."""
        return self.run.evaluation is not None or self.prompts is not None

    def measure(self, engine: Engine) -> dict[str, float]:
        """Averages over the held-out rows by their names in metrics.jsonl, the same on every rank."""
        engine.train(False)
        values = self._closeness(engine)
        if self.prompts is not None:
            values["rouge_l"] = self._rouge_l(engine)
        engine.train(True)
        return {f"eval/{name}": value for name, value in values.items()}

    def sample(self, engine: Engine, *, step: int) -> None:
        """Write the student's lens beside the teacher's, in a few examples, to the run's folder."""
        if self.run.evaluation is None:
            return
        evaluation, pairs = self.run.evaluation, with_final(self.run.evaluation.matching)
        engine.train(False)
        samples = sample_lens(
            engine.forward, evaluation.reader, pairs=pairs, tails=evaluation.matching.tails, device=engine.device
        )
        engine.train(True)
        if engine.is_main:
            write_lens_samples(self.run.config.output_dir, samples, step=step, pairs=pairs)

    def _closeness(self, engine: Engine) -> dict[str, float]:
        """Teacher-forced averages over the evaluation cache; ``loss`` is that of its text."""
        if self.run.evaluation is None:
            return {}
        matching = self.run.evaluation.matching
        with torch.no_grad():
            values = averages(
                lambda batch: engine.forward(batch, measured_pairs=matching.pairs),
                self.run.evaluation.reader,
                tails=matching.tails,
                device=engine.device,
                rank=engine.rank,
                world_size=engine.world_size,
                all_sum=engine.all_sum,
            )
        return {"loss": values["reference_loss"], **values}

    def _rouge_l(self, engine: Engine) -> float:
        """Mean ROUGE-L x 100 of greedy answers, as ``evaluate --no-do-sample`` gives it."""
        assert self.prompts is not None
        model, tokenizer, rows = self.run.model, self.run.tokenizer, self.prompts.prompts
        # Ranks that hold a part of each weight only have to call the model equally often: each answers all rows.
        own = rows if engine.is_sharded else rows[engine.rank :: engine.world_size]
        rouge, scores = RougeL(), []
        for start in range(0, len(own), ROWS_AT_A_TIME):
            some = own[start : start + ROWS_AT_A_TIME]
            with engine.autocast():
                answers = generate(
                    model,
                    tokenizer,
                    some,
                    _sampling(self.run),
                    seed=0,
                    vocab_size=effective_vocab_size(model, tokenizer),
                    ends=self.ends,
                )
            scores += [rouge.score(one.text, row.references) for one, row in zip(answers, some, strict=True)]
        sums = torch.tensor([sum(scores), len(scores)], dtype=torch.float64, device=engine.device)
        total, count = engine.all_sum(sums).tolist()
        return total / count


def open_validation(run: TrainingRun) -> Validation:
    """The held-out rows of a run. ValueError where they cannot be read, or don't fit the student's positions."""
    config = run.config
    if config.selects and config.best_metric.startswith("lens_jsd"):
        _require_pair(config.best_metric, run.evaluation.matching.pairs if run.evaluation else ())
    if config.eval_dataset is None:
        return Validation(run, None, frozenset())
    # Limit and revision of the rows trained on are not those of the held-out ones.
    shared = row_settings(config) | {"limit": config.eval_limit, "revision": None}
    prompts = prompt_and_references(config.eval_dataset, run.tokenizer, **shared)
    examples = load_examples(config.eval_dataset, run.tokenizer, max_length=config.max_length, **shared)
    check_positions(run.model, prompts.prompts, _sampling(run))
    subject = Subject(config.student, run.tokenizer, prompts, examples)
    return Validation(run, prompts, end_tokens(run.model, run.tokenizer) | ends_of_references(subject))


def _require_pair(metric: str, pairs: Pairs) -> None:
    names = [f"{own}:{teacher}" for own, teacher in pairs]
    if not names or metric.removeprefix("lens_jsd").lstrip("/") not in ("", *names):
        measured = f"pairs {', '.join(names)} are" if names else "no pair is"
        raise ValueError(f"--metric-for-best-model {metric} is not measured: {measured} matched with --eval-cache")


def _sampling(run: TrainingRun) -> Sampling:
    """Greedy, and otherwise as ``evaluate`` writes when it is told nothing."""
    return Sampling(
        max_new_tokens=run.config.eval_max_new_tokens,
        do_sample=False,
        no_repeat_ngram_size=EvaluateConfig.model_fields["no_repeat_ngram_size"].default,
    )
