"""Causal language models of transformers: trained on text tasks, and measured by log-likelihood and by generation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from genlight.errors import UserError, in_config
from genlight.experts.editor import ExpertEditor
from genlight.metrics.text_tasks import TaskScores, answer_f1, exact_match, extracted
from genlight.modules.generation import LiveParameters
from genlight.modules.halving import InHalves
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.modules.pretrained import first_line
from genlight.modules.pretrained_lm import DTYPES, load_language_model
from genlight.recipes import fit_below_where_missing
from genlight.trainer.resident import is_sharded


class CausalLMModule(InHalves, LiveParameters, Optimization, LightningModule):
    """A causal language model, dense or with experts, pretrained or built from a config and trained from scratch.

    Training minimises the cross-entropy of the labelled tokens, and for experts the load-balancing loss of their family
    times the config's `router_aux_loss_coef`. Validation asks the questions of a `TextTaskDataModule` and logs
    val/accuracy and val/log_likelihood, means over the tasks, val/choice_log_likelihood and val/choice_probability,
    those over the tasks with choices, and for each task

    - val/<task>/log_likelihood: mean of log p(right answer | prompt), summed over its tokens, in nats;
    - val/<task>/choice_log_likelihood: the same among the options alone, which is what decides an answer: mean of
      log p(right answer | prompt, one of the options);
    - val/<task>/choice_probability: mean of that probability itself: what answers drawn from it have right;
    - val/<task>/accuracy: share of questions whose right option is the likeliest; of generated answers, exact matches;
    - val/<task>/accuracy_normalised: the same with log-likelihoods divided by the characters of the option;
    - val/<task>/exact_match, val/<task>/f1: of answers generated greedily.

    Args:
        config: of transformers, such as `transformers.MixtralConfig`, of a network to be made with random weights.
        pretrained: folder or hub id, read when it is needed first; instead of a config.
        recipe: the experiment whose fit makes the folder ``pretrained`` where it is missing.
        optimizer, lr_scheduler: partials, as in DiffusionModule.
        dtype: type of the weights: "float32", "float16", "bfloat16", or "auto": that of the stored weights, float32 for
            random ones.
        generate: let the model write the answers of generation tasks; False: only their log-likelihood is measured.
        trust_remote_code: run code that the folder brings along.

    Attributes:
        network: the model of transformers; None before a pretrained one was read.
        tokenizer: that of the data; set by ``check_data``.
        metrics: scores by task; set by ``check_data``.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    def __init__(
        self,
        config: Any = None,
        pretrained: str | None = None,
        *,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        dtype: str = "auto",
        generate: bool = True,
        trust_remote_code: bool = False,
        recipe: str | None = None,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise ValueError("module needs either a config or pretrained, and not both")
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"module.dtype = {dtype!r} must be auto, {', '.join(DTYPES)}")
        self.pretrained, self.weights_dtype, self.trust_remote_code = pretrained, dtype, trust_remote_code
        self.optimizer, self.lr_scheduler, self.generate, self.recipe = optimizer, lr_scheduler, generate, recipe
        self.network: Any = None if config is None else _untrained(config, DTYPES.get(dtype, torch.float32))
        self.tokenizer: Any = None
        self.metrics: TaskScores | None = None
        self._editor: ExpertEditor | None = None

    def prepare(self, run_root: str | Path = "", cache: str | Path = "") -> None:
        """Read the pretrained model, once; where its folder is missing, ``recipe`` makes it below ``run_root``.

        Raises:
            UserError: the folder is not what the fit makes, the fit failed, or as in `load_language_model`.
        """
        if self.network is None:
            source = str(self.pretrained)
            # what lies elsewhere, or on the hub, no fit makes
            if self.recipe and run_root and Path(source).absolute().is_relative_to(Path(run_root).absolute()):
                fit_below_where_missing(self.recipe, source, "module.pretrained", run_root, cache)
            self.network = load_language_model(source, self.weights_dtype, self.trust_remote_code)

    def setup(self, stage: str) -> None:
        """Read the model where that was not done yet; Lightning calls this before it shards."""
        self.prepare()

    def check_data(self, datamodule: Any) -> None:
        """Take tokenizer and tasks of the data.

        Raises:
            UserError: it has none, or its tokens or lengths are beyond what the model can take.
        """
        if not hasattr(datamodule, "task_names"):
            name = getattr(datamodule, "name", type(datamodule).__name__)
            raise UserError(f"module=causal_lm needs text tasks, which data={name} does not have: use data=text_tasks")
        self.prepare()
        if datamodule.tokenizer_source is None and self.pretrained is not None:
            datamodule.tokenizer_source = self.pretrained
        tokenizer, config = datamodule.tokenizer, self.network.config.get_text_config()
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, but module.config.vocab_size = {config.vocab_size}"
            )
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and datamodule.max_length > longest:
            raise UserError(
                f"data.max_length = {datamodule.max_length}, but module.config.max_position_embeddings = {longest}"
            )
        if self.pretrained is None:
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(self.network.config, key, getattr(tokenizer, key))
                setattr(self.network.generation_config, key, getattr(tokenizer, key))
        self.tokenizer, self.metrics = tokenizer, TaskScores(datamodule.task_names)

    def expert_editor(self) -> ExpertEditor:
        """Reads, prunes and merges the network's experts; the same editor at each call.

        Raises:
            UserError: a network without experts, of a family that is not known, or whose weights are not whole here.
        """
        if self._editor is None:
            self.prepare()
            with in_config("module"):
                self._editor = ExpertEditor(self.network)
        return self._editor

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> Tensor:
        # dense models do not know the word
        router = {"output_router_logits": True} if hasattr(self.network.config, "router_aux_loss_coef") else {}
        output = self.network(**batch, use_cache=False, **router)
        self.log("train/loss", output.loss, prog_bar=True, batch_size=len(batch["labels"]))
        if router:
            self.log("train/router_aux_loss", output.aux_loss, batch_size=len(batch["labels"]))
        return output.loss  # type: ignore[no-any-return]

    def log_likelihoods(self, batch: Mapping[str, Any]) -> Tensor:
        """log p(option | prompt) of each option, float32 [O], in nats; the batch is that of `scoring_batch`."""
        parts = self.in_halves(len(batch["input_ids"]), partial(self._option_scores, batch))
        found = [one for _, one in parts]
        order, scores = (torch.cat(each) for each in zip(*found, strict=True))
        return scores[order.argsort()]

    def _option_scores(self, batch: Mapping[str, Any], part: slice) -> tuple[Tensor, Tensor]:
        """Which options belong to a part of the rows, and their log p."""
        rows, mask = batch["option_row"], batch["attention_mask"][part]
        own = torch.logical_and(rows >= part.start, rows < part.stop).nonzero()[:, 0]
        targets, rows = batch["option_targets"][own], rows[own] - part.start
        logits = self.network(
            input_ids=batch["input_ids"][part],
            attention_mask=mask,
            position_ids=_positions(mask),
            logits_to_keep=targets.shape[1],
            use_cache=False,
        ).logits.float()  # [R, M, V]
        columns = torch.arange(targets.shape[1], device=targets.device)
        chosen = logits[rows[:, None], columns, targets.clamp_min(0)] - logits.logsumexp(-1)[rows]
        return own, torch.where(targets >= 0, chosen, 0.0).sum(1)

    def generate_answers(self, generation: Mapping[str, Any]) -> list[str]:
        """Greedy answers to the prompts of a batch's ``generation``, each cut at its first stop text.

        Generation of all rows ends where each has an end token, a stop text or as many tokens as it may have.
        """

        def answers(part: slice) -> list[str]:
            return self._answers({name: values[part] for name, values in generation.items()})

        parts = self.in_halves(len(generation["input_ids"]), answers)
        return [answer for _, found in parts for answer in found]

    @torch.no_grad()
    def _answers(self, generation: Mapping[str, Any]) -> list[str]:
        from transformers import GenerationConfig, StoppingCriteriaList

        limits, stops, tokenizer = generation["max_new_tokens"], generation["stop"], self.tokenizer
        ends = _end_tokens(tokenizer.eos_token_id, self.network.generation_config.eos_token_id)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
        settings: Any = GenerationConfig
        trainer = self._trainer
        given, done = generation["input_ids"], [False] * len(limits)
        greedy = settings(max_new_tokens=max(limits), do_sample=False, eos_token_id=ends or None, pad_token_id=pad)

        def text_of(row: list[int], limit: int) -> str:
            # behind an end token stands padding
            own = list(takewhile(lambda token: token not in ends, row[:limit]))
            return str(tokenizer.decode(own, skip_special_tokens=True))

        def ended(tokens: Tensor, _: Any, **__: Any) -> Tensor:
            for place, row in enumerate(tokens[:, given.shape[1] :].tolist()):
                if not done[place]:
                    text = text_of(row, limits[place]) if stops[place] else ""
                    done[place] = len(row) >= limits[place] or _has_ended(text, stops[place])
            return torch.tensor(done, device=tokens.device)

        # a pass for each token: experts are not merged anew in every one
        merged = nullcontext() if self._editor is None else self._editor.keeping_merged()
        # the folder's own settings would be taken for what is not said here
        with merged, _replaced(self.network, "generation_config", settings()):
            found = self.network.generate(
                input_ids=given,
                attention_mask=generation["attention_mask"],
                generation_config=greedy,
                stopping_criteria=StoppingCriteriaList([ended]),
                synced_gpus=trainer is not None and is_sharded(trainer),
            )[:, given.shape[1] :]
        texts = [text_of(row, limit) for row, limit in zip(found.tolist(), limits)]
        return [_until(text, stop) for text, stop in zip(texts, stops)]

    def on_validation_epoch_start(self) -> None:
        if self.metrics is None:
            raise UserError("the tasks are not known: call check_data with the datamodule first")
        self.metrics.to(self.device)
        self.metrics.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_index: int = 0) -> None:
        scores, task, label = self.log_likelihoods(batch), batch["task"], batch["label"]
        table, questions = _table(scores, batch["option_place"]), torch.arange(len(label), device=label.device)
        self._add(task, "log_likelihood", table[questions, label])
        if "generation" not in batch:
            among = table.log_softmax(1)[questions, label]
            self._add(task, "choice_log_likelihood", among)
            self._add(task, "choice_probability", among.exp())
            lengths = batch["option_length"].to(scores)
            self._add(task, "accuracy", _is_best(scores, batch))
            self._add(task, "accuracy_normalised", _is_best(scores / lengths, batch))
        elif self.generate:
            given, answers = batch["generation"], self.generate_answers(batch["generation"])
            answers = [extracted(answer, pattern) or "" for answer, pattern in zip(answers, given["extract"])]
            pairs = list(zip(answers, given["references"], given["normalise"]))
            matches = torch.tensor([exact_match(*pair) for pair in pairs], device=task.device)
            self._add(task, "accuracy", matches)
            self._add(task, "exact_match", matches)
            f1 = [answer_f1(answer, references) for answer, references, _ in pairs]
            self._add(task, "f1", torch.tensor(f1, device=task.device))

    def on_validation_epoch_end(self) -> None:
        if self.metrics is not None and not self.trainer.sanity_checking:
            # computed over all ranks already: equal everywhere
            self.log_dict({f"val/{name}": float(value) for name, value in self.metrics.compute().items()})

    def _add(self, task: Tensor, quantity: str, values: Tensor) -> None:
        if self.metrics is not None:
            self.metrics.update(task, quantity, values)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        self.prepare()
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def description(self) -> dict[str, Any]:
        """What the weights mean, as plain values: class and config of the network."""
        self.prepare()
        config = self.network.config.to_dict()
        return {"network": type(self.network).__name__, "config": json.loads(json.dumps(config, default=str))}

    def fingerprint(self, state: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 over the description and the weights; of ``state`` where the module holds a part of them only."""
        digest = hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode())
        for name, value in sorted((state or self.state_dict()).items()):
            digest.update(f"{name}/{value.dtype}/".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a folder of transformers, weights as safetensors."""
        self.prepare()
        self.network.save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))


def _untrained(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    builder: Any = AutoModelForCausalLM
    try:
        return builder.from_config(config, dtype=dtype)
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"module.config = {type(config).__name__}: {first_line(error)}") from error


def _positions(mask: Tensor) -> Tensor:
    """Places of the tokens [R, T], counted from the first that is no padding."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def _table(scores: Tensor, place: Tensor) -> Tensor:
    """Scores [O] by question and option [B, largest number of options]; -inf where there is no option."""
    questions, options = (int(size) + 1 for size in place.amax(0))
    table = scores.new_full((questions, options), -torch.inf)
    table[place[:, 0], place[:, 1]] = scores
    return table


def _is_best(scores: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Whether the right option of each question has the largest score [B]; the first of equal ones counts."""
    table, label = _table(scores, batch["option_place"]), batch["label"]
    right = table.gather(1, label[:, None])[:, 0]
    return torch.logical_and(table.argmax(1) == label, right.isfinite())


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _end_tokens(*given: int | list[int] | None) -> list[int]:
    """All end tokens of a tokenizer and a config, each of which may have none, one or several."""
    every = [each if isinstance(each, list) else [each] for each in given]
    return list(dict.fromkeys(token for tokens in every for token in tokens if token is not None))


def _has_ended(text: str, stop: list[str]) -> bool:
    """Whether `_until` would cut the text where it does now, whatever comes after."""
    ends = [place for mark in stop if (place := text.find(mark)) >= 0]
    # another stop text may have begun before, as long as the longest of them
    return bool(ends) and min(ends) + max(map(len, stop)) <= len(text)


def _until(text: str, stop: list[str]) -> str:
    """The text up to the first of some texts."""
    ends = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text
