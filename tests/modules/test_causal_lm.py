"""Log-likelihoods against a loop over single examples, training that resumes, folders that plain transformers reads."""

import functools
import json
import logging
import math

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from genlight.callbacks.exact_resume import ExactResume
from genlight.callbacks.step_seed import StepSeed
from genlight.data.text_batches import Encoder, EvaluationQuestions, left_padded
from genlight.data.text_examples import Example
from genlight.data.text_tasks import TextTaskDataModule
from genlight.data.tokenizer import character_tokenizer
from genlight.errors import UserError
from genlight.experts.layer import ExpertLayer
from genlight.experts.maps import LayerMaps
from genlight.modules.causal_lm import CausalLMModule
from genlight.modules.lr_schedules import warmup_cosine
from genlight.modules.pretrained_lm import load_language_model
from genlight.trainer.checkpoint_io import AtomicCheckpointIO

SIZES = {"vocab_size": 104, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
# random tiny networks answer all alike, and tests pass for no reason, unless their weights are large
LARGE = {"initializer_range": 0.3, "max_position_embeddings": 64}
EXPERTS = {"num_key_value_heads": 2, "intermediate_size": 24, "moe_intermediate_size": 24}
CONFIGS = {
    "mixtral": functools.partial(
        transformers.MixtralConfig, **SIZES, **LARGE, intermediate_size=24, num_key_value_heads=2
    ),
    "qwen3_moe": functools.partial(
        transformers.Qwen3MoeConfig, **SIZES, **LARGE, **EXPERTS, head_dim=4, num_experts=8, num_experts_per_tok=2
    ),
    "olmoe": functools.partial(
        transformers.OlmoeConfig, **SIZES, **LARGE, intermediate_size=24, num_experts_per_tok=2, num_experts=8
    ),
    "llama": functools.partial(transformers.LlamaConfig, **SIZES, **LARGE, intermediate_size=24),
    "gpt2": functools.partial(
        transformers.GPT2Config, vocab_size=104, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
}
TASKS = {
    "choice": {"kind": "multiple_choice", "prompt": "{q}", "choices": "c", "answer": "a", "answer_prefix": ""},
    "letter": {"kind": "classification", "prompt": "{q}", "choices": ["A", "B", "C"], "answer": "a"},
    "written": {"kind": "generation", "prompt": "{q}", "answer": "a", "max_new_tokens": 5, "stop": ["z"]},
}
ROWS = {
    "choice": [{"q": f"{n}?" * (1 + n % 5), "c": ["x", "yes" * (1 + n % 3), f"n{n}"], "a": n % 3} for n in range(60)],
    "letter": [{"q": f"{n}!" * (1 + n % 7), "a": n % 3} for n in range(60)],
    "written": [{"q": f"{n}:" * (1 + n % 4), "a": "ab" * (1 + n % 3)} for n in range(60)],
}


class Data(TextTaskDataModule):
    """Three tasks at hand."""

    def __init__(self, **options) -> None:
        super().__init__(TASKS, **{"max_length": 40, "batch_size": 4, **options})

    def read_rows(self, name):
        return ROWS[name]

    def load_tokenizer(self):
        return character_tokenizer()


def module_of(name: str = "mixtral", seed: int = 0, **options) -> CausalLMModule:
    torch.manual_seed(seed)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    schedule = functools.partial(warmup_cosine, total_steps=4)
    module = CausalLMModule(CONFIGS[name](**options), optimizer=optimizer, lr_scheduler=schedule)
    module.check_data(Data())
    return module


def trainer_of(folder, **options) -> Trainer:
    for logger in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    plain = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **plain, use_distributed_sampler=False, enable_checkpointing=False, default_root_dir=folder,
        plugins=[AtomicCheckpointIO()], callbacks=[StepSeed(3), ExactResume()], **options,
    )  # fmt: skip


@torch.no_grad()
def log_likelihood(network, context, option) -> float:
    """One option by itself, without padding."""
    ids = torch.tensor([[*context, *option]])
    log_probability = network(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log_probability[len(context) - 1 + place, token]) for place, token in enumerate(option))


def scores_of(module, data) -> dict[tuple[int, int], float]:
    found = {}
    for batch in data.val_dataloader():
        with torch.no_grad():
            scores = module.log_likelihoods(batch)
        for (question, slot), score in zip(batch["option_place"].tolist(), scores.tolist(), strict=True):
            found[batch["index"][question].item(), slot] = score
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_log_likelihoods_are_those_of_single_examples(name) -> None:
    module, data = module_of(name), Data(num_samples=15)
    module.eval()
    encoder = Encoder(data.tokenizer, 40)
    expected = {}
    for index, example in enumerate(data.examples("report")[:15]):
        question = encoder.encode(example, data.tasks[example.task])
        for slot, option in enumerate(question.options):
            expected[index, slot] = log_likelihood(module.network, question.context, option)
    assert len({round(value, 3) for value in expected.values()}) > len(expected) * 0.9
    for size in (1, 4, 15):
        data.eval_batch_size = size
        found = scores_of(module, data)
        assert found.keys() == expected.keys()
        assert max(abs(found[key] - expected[key]) for key in expected) < 2e-5 * max(map(abs, expected.values()))


def validated(module, folder, **options) -> dict[str, float]:
    data = Data(**options)
    return trainer_of(folder).validate(module, datamodule=data, verbose=False)[0]


@pytest.mark.filterwarnings("ignore")
def test_what_is_logged_are_means_of_single_examples(tmp_path) -> None:
    module = module_of()
    found = validated(module, tmp_path, eval_batch_size=7)
    data = Data()
    encoder, scores = Encoder(data.tokenizer, 40), scores_of(module.eval(), data)
    right: dict[str, list] = {}
    for index, example in enumerate(data.examples("report")):
        values = [scores[index, slot] for slot in range(len(example.options))]
        right.setdefault(f"{example.task}/log_likelihood", []).append(values[example.label])
        if example.references:
            question = encoder.encode(example, data.tasks[example.task])
            ids = torch.tensor([question.context])
            for _ in range(5):  # greedy, one token after the other, over the whole text each time
                ids = torch.cat([ids, module.network(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            written = ids[0, len(question.context) :].tolist()
            end = data.tokenizer.eos_token_id
            text = data.tokenizer.decode(written[: written.index(end)] if end in written else written).split("z")[0]
            right.setdefault("written/accuracy", []).append(text.strip() == example.references[0])
            continue
        among = values[example.label] - float(torch.tensor(values).logsumexp(0))
        right.setdefault(f"{example.task}/choice_log_likelihood", []).append(among)
        right.setdefault(f"{example.task}/choice_probability", []).append(math.exp(among))
        normalised = [value / len(text) for value, text in zip(values, example.options, strict=True)]
        right.setdefault(f"{example.task}/accuracy", []).append(values.index(max(values)) == example.label)
        best = normalised.index(max(normalised)) == example.label
        right.setdefault(f"{example.task}/accuracy_normalised", []).append(best)
    means = {f"val/{name}": sum(values) / len(values) for name, values in right.items()}
    for name, value in means.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["val/written/exact_match"] == found["val/written/accuracy"] and "val/written/f1" in found
    for name in ("accuracy", "log_likelihood"):
        mean = sum(means[f"val/{task}/{name}"] for task in TASKS) / 3
        assert found[f"val/{name}"] == pytest.approx(mean, abs=1e-4)
    for name in ("choice_log_likelihood", "choice_probability"):
        mean = sum(means[f"val/{task}/{name}"] for task in ("choice", "letter")) / 2
        assert found[f"val/{name}"] == pytest.approx(mean, abs=1e-4)
    assert found["val/choice/accuracy"] != found["val/choice/accuracy_normalised"]
    again = validated(module, tmp_path, eval_batch_size=2)
    assert again.keys() == found.keys()
    assert all(again[name] == pytest.approx(value, abs=1e-5) for name, value in found.items())
    assert validated(module, tmp_path, eval_batch_size=2) == again  # no dropout, no sampling
    module.generate = False
    assert set(found) - set(validated(module, tmp_path)) == {
        "val/written/accuracy",
        "val/written/exact_match",
        "val/written/f1",
    }


def test_a_length_divides_and_scores_that_are_no_numbers_are_wrong() -> None:
    """Two options of 1 and 4 characters: the second is less likely, and the likelier for its length."""
    from genlight.modules.causal_lm import _is_best

    example = Example("choice", "", "", "q", ("x", "yyyy"), 1)
    data = Data()
    encoder = Encoder(data.tokenizer, 40)
    questions = EvaluationQuestions([example], lambda _: encoder.encode(example, data.tasks["choice"]), data.tasks, 0)
    batch = questions.__getitems__([0])
    assert batch["option_length"].tolist() == [1, 4]
    scores = torch.tensor([-1.5, -4.0])
    assert _is_best(scores, batch).tolist() == [False]
    assert _is_best(scores / batch["option_length"], batch).tolist() == [True]
    assert _is_best(torch.tensor([-1.5, torch.nan]), batch).tolist() == [False]
    assert _is_best(torch.tensor([-torch.inf, -torch.inf]), {**batch, "label": torch.tensor([0])}).tolist() == [False]


PROMPTS = ("a", "bcdef", "gh" * 6)


def answers(module, prompts=PROMPTS, limits=(6, 6, 6), stop=([], [], [])) -> list[str]:
    ids, mask = left_padded([module.tokenizer(text).input_ids for text in prompts], 0)
    given = {"input_ids": ids, "attention_mask": mask, "stop": list(stop), "max_new_tokens": list(limits)}
    return module.eval().generate_answers({name: values[: len(prompts)] for name, values in given.items()})


def test_answers_do_not_depend_on_what_is_beside_them() -> None:
    module = module_of()
    together = answers(module, limits=[6, 3, 6])
    alone = [answers(module, [prompt], limits=[6])[0] for prompt in PROMPTS]
    assert together == [alone[0], alone[1][:3], alone[2]] and len(set(together)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "num_beams": 3, "repetition_penalty": 9.0},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a", "b", "c"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 2},
        {"suppress_tokens": list(range(60)), "encoder_repetition_penalty": 1.5, "bad_words_ids": [[70]]},
        {"forced_eos_token_id": 5, "min_new_tokens": 6},
        {"max_length": 3, "min_length": 60},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_a_folder_for_writing_change_no_answer(settings) -> None:
    module = module_of()
    expected = answers(module)
    for name, value in settings.items():
        setattr(module.network.generation_config, name, value)
    own = module.network.generation_config
    assert answers(module) == expected and module.network.generation_config is own


def test_an_answer_ends_with_an_end_token_of_the_tokenizer_or_of_the_folder() -> None:
    module = module_of()
    whole = answers(module)[1]
    (end,) = module.tokenizer(whole[3]).input_ids
    for given in (end, [module.tokenizer.eos_token_id, end]):
        module.network.generation_config.eos_token_id = given
        assert answers(module)[1] == whole[: whole.index(whole[3])]
    module.network.generation_config.eos_token_id = None
    assert answers(module)[1] == whole


def test_writing_ends_where_all_answers_have_their_stop_text() -> None:
    """With the answer of one that is written to its end, and cut then; also where stop texts overlap."""
    module, passes = module_of(), []
    module.network.register_forward_pre_hook(lambda *_: passes.append(1))
    whole = answers(module, limits=[40] * 3)
    assert len(passes) == 40 and min(map(len, whole)) > 30
    marks = [[text[4]] for text in whole], [[text[4], text[3:8]] for text in whole]
    for stop in marks:
        passes.clear()
        expected = [text[: min(text.index(mark) for mark in own)] for text, own in zip(whole, stop, strict=True)]
        assert answers(module, limits=[40] * 3, stop=stop) == expected
        assert len(passes) < 12
    passes.clear()
    # one has no stop text, but a limit
    assert answers(module, limits=[40, 40, 12], stop=[*marks[0][:2], []])[2] == whole[2][:12]
    assert len(passes) == 12


def test_experts_are_merged_once_for_all_tokens_of_an_answer(monkeypatch) -> None:
    module, merged = module_of(), []
    editor, own = module.expert_editor(), ExpertLayer.edited_weights
    maps = torch.rand(2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    editor.apply(dict.fromkeys(editor.layers, LayerMaps(*maps)))
    monkeypatch.setattr(ExpertLayer, "edited_weights", lambda layer: merged.append(layer) or own(layer))
    ids, mask = left_padded([module.tokenizer("abc").input_ids], 0)
    given = {"input_ids": ids, "attention_mask": mask, "stop": [[]], "max_new_tokens": [5]}
    assert len(module.eval().generate_answers(given)[0]) > 1 and len(merged) == len(editor.layers) == 2


def test_questions_that_do_not_fit_are_asked_in_halves() -> None:
    module, data = module_of(), Data(num_samples=30, eval_batch_size=8)
    module.eval()
    batches = list(data.val_dataloader())
    written = [batch["generation"] for batch in batches if "generation" in batch]
    expected = [module.log_likelihoods(batch) for batch in batches]
    answers = [module.generate_answers(generation) for generation in written]
    asked: list[int] = []

    def memory(_, __, given) -> None:
        asked.append(len(given["input_ids"]))
        if asked[-1] > 3:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    module.network.register_forward_pre_hook(memory, with_kwargs=True)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = [module.log_likelihoods(batch) for batch in batches]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert [module.generate_answers(generation) for generation in written] == answers and written
    assert max(asked) > 3


def test_the_loss_is_cross_entropy_of_the_answer_and_balance_of_the_router() -> None:
    module = module_of(router_aux_loss_coef=0.5)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    batch = next(iter(Data().train_dataloader()))
    loss = module.training_step(batch)
    with torch.no_grad():
        output = module.network(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        )
    expected, count = 0.0, 0
    for row, logits in zip(batch["labels"], output.logits.double().log_softmax(-1), strict=True):
        for place in range(1, len(row)):
            if row[place] != -100:
                expected, count = expected - logits[place - 1, row[place]], count + 1
    assert loss.item() == pytest.approx(float(expected / count + 0.5 * output.aux_loss), rel=1e-5)
    assert logged["train/router_aux_loss"].item() == pytest.approx(output.aux_loss.item())
    # the router's balance counts no padding: nothing changes with more of it
    wider = {
        name: torch.nn.functional.pad(value, (0, 3), value=-100 if name == "labels" else 0)
        for name, value in batch.items()
    }
    assert module.training_step(wider).item() == pytest.approx(loss.item(), rel=1e-5)
    dense = module_of("llama")
    dense.log = lambda *_, **__: None
    assert dense.training_step(batch).isfinite()


def fitted(folder, steps: int, resume=None) -> CausalLMModule:
    module = module_of()
    trainer = trainer_of(folder, max_steps=steps, limit_val_batches=1, val_check_interval=2)
    trainer.fit(module, datamodule=Data(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


@pytest.mark.filterwarnings("ignore")
def test_two_steps_and_two_more_are_four(tmp_path) -> None:
    whole = fitted(tmp_path, 4)
    before = fitted(tmp_path / "parts", 2)
    resumed = fitted(tmp_path / "parts", 4, tmp_path / "parts" / "2.ckpt")
    assert resumed.fingerprint() == whole.fingerprint() != before.fingerprint()
    assert before.fingerprint() != module_of().fingerprint()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt2"])
def test_folders_hold_model_and_tokenizer(name, tmp_path) -> None:
    module = module_of(name)
    module.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    ids = torch.tensor([tokenizer("what is it?").input_ids])
    assert torch.equal(model(input_ids=ids).logits, module.network.eval()(input_ids=ids).logits)
    again = CausalLMModule(pretrained=str(tmp_path))
    data = TextTaskDataModule(TASKS, max_length=40)
    again.check_data(data)  # takes the tokenizer of the folder
    assert data.tokenizer("abc").input_ids == character_tokenizer()("abc").input_ids
    assert again.network.dtype == torch.float32
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in again.state_dict().items())
    half = CausalLMModule(pretrained=str(tmp_path), dtype="bfloat16")
    half.load_state_dict(module.state_dict())
    assert half.network.dtype == torch.bfloat16


def test_faults_of_a_folder_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"module\.pretrained = \S+ is neither a folder nor a hub id"):
        load_language_model(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="it has no config"):
        load_language_model(str(tmp_path))
    module_of().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def edited(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return str(tmp_path)

    with pytest.raises(UserError, match=r"is of type other, .*module\.trust_remote_code=true"):
        load_language_model(edited(model_type="other"))
    with pytest.raises(UserError, match=r"do not fit its config\.json: missing"):
        load_language_model(edited(num_hidden_layers=3))
    with pytest.raises(UserError, match=r"do not fit its config.json|cannot be loaded as a causal language model"):
        load_language_model(edited(num_local_experts=4))
    with pytest.raises(UserError, match=r"do not fit its config.json|cannot be loaded as a causal language model"):
        load_language_model(edited(vocab_size=90))
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_language_model(edited(model_type="vit"))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_language_model(edited())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no weights as safetensors; pickled weights are not read"):
        load_language_model(edited())
    for name in ("../outside.safetensors", str(tmp_path / "model.safetensors"), ""):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
        with pytest.raises(UserError, match="a file of its own folder is needed"):
            load_language_model(edited())


def test_data_and_arguments_that_do_not_fit_are_named() -> None:
    module = module_of()
    with pytest.raises(UserError, match=r"module=causal_lm needs text tasks, which data=int does not have"):
        module.check_data(3)
    with pytest.raises(UserError, match=r"data\.max_length = 65, but module\.config\.max_position_embeddings = 64"):
        module.check_data(Data(max_length=65))
    with pytest.raises(UserError, match=r"the tokenizer has 99 tokens, but module\.config\.vocab_size = 90"):
        module_of(vocab_size=90)
    with pytest.raises(UserError, match=r"network\.\S+ has shape"):
        module.load_state_dict(module_of(hidden_size=32).state_dict())
    with pytest.raises(ValueError, match="module needs either a config or pretrained, and not both"):
        CausalLMModule()
    with pytest.raises(ValueError, match=r"module\.dtype = 'int8' must be auto, float32"):
        CausalLMModule(pretrained="x", dtype="int8")
    with pytest.raises(ValueError, match=r"module\.config = ViTConfig"):
        CausalLMModule(transformers.ViTConfig())
    with pytest.raises(UserError, match="call check_data"):
        CausalLMModule(CONFIGS["llama"]()).on_validation_epoch_start()
