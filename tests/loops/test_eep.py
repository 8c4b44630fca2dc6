"""The real commands of EEP on a tiny mixture of experts: baselines, search, artifact, resuming, bad input."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from command_line import added, assert_accounted, copied, histories, report_of, run_in_own_process, the_error
from huggingface_hub import ModelCard
from oracles.kills import at_line, kill

from genlight import io
from genlight.cli import main
from genlight.data.text_examples import split_of
from genlight.data.tokenizer import character_tokenizer
from genlight.errors import UserError
from genlight.experts.editor import ExpertEditor
from genlight.experts.export import export
from genlight.experts.statistics import RoutingStatistics
from genlight.loops.expert_remarks import remarks_after, remarks_before
from genlight.loops.expert_work import ExpertObjective, ExpertWork
from genlight.modules.causal_lm import CausalLMModule
from genlight.search.records import Record
from genlight.search.spaces.expert_map_file import read_expert_maps

BASELINES = {"frequency", "soft_activation", "ean", "reap", "naee", "m_smoe", "hc_smoe"}
TASKS = (
    "data.tasks={letters: {kind: classification, prompt: '{q}', choices: [A, B, C], answer: a, path: FILE},"
    " written: {kind: generation, prompt: 'say {q}', answer: w, max_new_tokens: 2, path: FILE}}"
)
SEARCH = [
    "search.budget=16",
    "search.strategy.prune_evaluations=10",
    "search.strategy.prune.population=6",
    "search.strategy.prune.children=4",
    "search.strategy.merge.children=4",
    "search.fidelity=24",
    "search.shared=false",
    "search.finalists=3",
    "search.workers=2",
]


def words_of(root: Path) -> list[str]:
    return [
        "validate",
        "experiment=eep/mixtral",
        TASKS.replace("FILE", f"{root}/rows.jsonl"),
        "data.shares={train: 0.1, search: 0.4, select: 0.2, report: 0.3}",
        "data.max_length=32",
        "data.eval_batch_size=12",
        "data.num_samples=40",
        f"module.pretrained={root}/model",
        "module.dtype=float32",
        "method.groups=null",
        "method.tasks=[letters]",
        "method.num_experts=3",
        "method.random_draws=3",
        "method.calibration=24",
        "method.select=24",
        "trainer.accelerator=cpu",
        f"run.root={root}",
    ]


def validate(root: Path, name: str, *words: str) -> int:
    return main([*words_of(root), *SEARCH, f"run.name={name}", *words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `model`, whose experts differ much, and `run`, a finished search."""
    root = tmp_path_factory.mktemp("eep")
    rows = [{"q": f"{n * n % 97}+{n}?", "a": n % 3, "w": str(n % 7)} for n in range(160)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    assert validate(root, "run") == 0
    return root


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["kind"]: row for row in report_of(folder)["table"]}


def test_every_baseline_stands_beside_what_was_found(root: Path) -> None:
    folder = root / "run" / "validate"
    assert_accounted(folder)
    rows, metrics = rows_of(folder), report_of(folder)["metrics"]
    assert {"full", "random", "EEP prune", "EEP merge", *BASELINES} == rows.keys()
    assert rows["full"]["experts"] == 6 and all(rows[name]["experts"] == 3 for name in BASELINES)
    # the task that nothing was searched for is measured too
    assert all("written/accuracy" in rows[name] and "letters/log_likelihood" in rows[name] for name in BASELINES)
    best = {row["kind"]: row["search"] for row in rows.values() if row["kind"] in BASELINES}
    selections = BASELINES - {"m_smoe", "hc_smoe"}
    assert metrics["search_best_prune"] >= max(best[name] for name in selections)
    assert max(metrics["search_best_prune"], metrics["search_best_merge"]) >= max(best.values()) - 1e-12
    searched = [rows["EEP prune"], rows["EEP merge"]]
    (chosen,) = [row for row in rows.values() if row["chosen"]]
    # what the search began with is a candidate for the choice too
    assert chosen["select"] == max(row["select"] for row in searched)
    assert chosen["select"] >= max(rows[name]["select"] for name in BASELINES)
    assert rows["EEP prune"]["select"] >= max(rows[name]["select"] for name in selections)
    notes = " ".join(report_of(folder)["notes"])
    assert "search and select are val/choice_log_likelihood" in notes and "is by 19 questions: data.shares" in notes
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"kept_experts.png", "routing_load.png", "search.png", "pareto.png"} <= names


def measured(metrics: dict[str, float], row: dict[str, Any]) -> bool:
    """Whether what validate logs, under the names of tasks, is that of a row."""
    known = {name: value for name, value in metrics.items() if name.startswith("val/") and name[4:] in row}
    return len(known) >= 4 and all(value == row[name[4:]] for name, value in known.items())


def metrics_of(card: Path) -> dict[str, float]:
    """The results in the metadata of a card; no two have one name."""
    results = ModelCard.load(card).data.eval_results or []
    found = {result.metric_name: result.metric_value for result in results}
    assert len(found) == len(results)
    return found


def test_the_numbers_of_the_card_are_those_of_the_saved_model(root: Path) -> None:
    folder = root / "run" / "validate"
    rows, metrics = rows_of(folder), report_of(folder)["metrics"]
    (chosen,) = [row for row in rows.values() if row["chosen"]]
    assert measured(metrics, chosen) and not measured(metrics, rows["full"])
    for name in ("letters/log_likelihood", "written/accuracy", "accuracy"):
        assert metrics[f"{name}_full"] == pytest.approx(rows["full"][name])
    # what is searched for is one of two tasks, and other means are over it alone
    assert "val/accuracy" not in metrics
    card = metrics_of(folder / "artifact" / "README.md")
    assert card == {name.removeprefix("val/"): value for name, value in metrics.items()}
    assert card["letters/accuracy"] == chosen["letters/accuracy"]


def test_no_candidate_is_measured_twice_and_pruning_comes_first(root: Path) -> None:
    lines = histories(root / "run" / "validate")["experts3"].splitlines()[1:]
    records = [json.loads(line) for line in lines]
    assert len({record["key"] for record in records}) == len(records)
    prunes = [bool(record["candidate"]["kept"]) for record in records if record["source"] != "initial"]
    assert prunes == [True] * 10 + [False] * 6


def test_plain_transformers_load_the_artifact(root: Path) -> None:
    """With the experts that the report counts; measured again it answers as the table says."""
    folder = root / "run" / "validate"
    artifact, rows = folder / "artifact", rows_of(folder)
    (chosen,) = [row for row in rows.values() if row["chosen"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact)
    assert model.config.num_local_experts == 3
    assert sum(weight.numel() for weight in model.parameters()) == chosen["parameters"]
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name or "gate.weight" in name]
    assert sum(weight.numel() for weight in experts) == chosen["expert parameters"]
    assert rows["full"]["expert parameters"] == 2 * chosen["expert parameters"]
    assert transformers.AutoTokenizer.from_pretrained(artifact)("12").input_ids
    assert "AutoModelForCausalLM" in (artifact / "README.md").read_text()
    content = io.read_json(artifact / "expert_maps.json")
    assert content["kind"] == "expert_maps" and content["candidates"].keys() == {"EEP prune", "EEP merge"}
    kept = content["kept_experts"]["EEP prune"]
    assert len(kept) == 3 and all(len(set(experts)) == 3 for experts in kept.values())
    words = [word for word in words_of(root) if word.startswith(("data.", "trainer.", "run."))]
    words = ["data=text_tasks", "module=causal_lm", "metrics=none", f"module.pretrained={artifact}", *words]
    assert main(["validate", *words, "run.name=again"]) == 0
    found = report_of(root / "again" / "validate")["metrics"]
    assert found["val/letters/log_likelihood"] == pytest.approx(chosen["letters/log_likelihood"], rel=1e-5)
    assert found["val/written/accuracy"] == pytest.approx(chosen["written/accuracy"])


def test_what_was_not_chosen_can_be_had_from_the_maps(root: Path, tmp_path: Path) -> None:
    artifact = root / "run" / "validate" / "artifact"
    saved, ids = read_expert_maps(artifact / "expert_maps.json"), torch.arange(3, 40)[None]
    model, chosen = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (root / "model", artifact))
    editor = ExpertEditor(model)
    saved.apply(editor)
    torch.testing.assert_close(model(ids).logits, chosen(ids).logits, rtol=1e-5, atol=1e-5)
    saved.apply(editor, "EEP prune")
    kept = io.read_json(artifact / "expert_maps.json")["kept_experts"]["EEP prune"]
    assert {name: maps.expert_map.argmax(1).tolist() for name, maps in editor.maps.items()} == kept
    export(editor, tmp_path / "pruned")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_local_experts == 3
    with pytest.raises(ValueError, match="there is no candidate 'best'; there are EEP prune, EEP merge"):
        saved.apply(editor, "best")
    with pytest.raises(ValueError, match="has 3 experts a layer, the one that was searched 6"):
        saved.apply(ExpertEditor(chosen))
    (tmp_path / "other.json").write_text('{"kind": "expert_maps", "version": 9}')
    with pytest.raises(UserError, match=r"no expert_maps of version 1: kind and version are \('expert_maps', 9\)"):
        read_expert_maps(tmp_path / "other.json")


def test_what_was_pruned_is_pruned_again(root: Path) -> None:
    """The model of three experts, read from its folder, is the whole one of the second search."""
    artifact = root / "run" / "validate" / "artifact"
    words = [f"module.pretrained={artifact}", "method.num_experts=2", "method.baselines=[frequency]"]
    words += ["method.random_draws=1", "search.budget=4", "search.strategy.prune_evaluations=3"]
    assert validate(root, "twice", *words) == 0
    before = next(row for row in rows_of(root / "run" / "validate").values() if row["chosen"])
    rows = rows_of(root / "twice" / "validate")
    whole, (chosen,) = rows["full"], [row for row in rows.values() if row["chosen"]]
    assert (whole["experts"], chosen["experts"]) == (3, 2) and whole["parameters"] == before["parameters"]
    assert whole["letters/log_likelihood"] == pytest.approx(before["letters/log_likelihood"], rel=1e-5)
    assert whole["tokens per second"] > 0 < chosen["tokens per second"]
    found = root / "twice" / "validate" / "artifact"
    model = transformers.AutoModelForCausalLM.from_pretrained(found)
    assert model.config.num_local_experts == 2
    assert sum(weight.numel() for weight in model.parameters()) == chosen["parameters"] < whole["parameters"]
    assert io.read_json(found / "expert_maps.json")["num_experts"] == [3, 2]


def test_states_that_are_kept_change_no_score(root: Path) -> None:
    assert validate(root, "cached", "method.cache_bytes=100000000") == 0
    assert histories(root / "cached" / "validate") == histories(root / "run" / "validate")
    assert any("of the layers of candidates" in note for note in report_of(root / "cached" / "validate")["notes"])


def test_a_killed_search_resumes_to_the_same_archive(root: Path) -> None:
    words = [*words_of(root), *SEARCH, "run.name=killed"]
    kill(words, at_line("experts3", 18))
    assert validate(root, "killed", "resume=true") == 0
    assert histories(root / "killed" / "validate") == histories(root / "run" / "validate")


@pytest.mark.slow  # in test_s3.py it is not, and the search is the same
def test_two_processes_give_the_archive_of_one(root: Path) -> None:
    words = [*words_of(root), *SEARCH, "run.name=ddp", "strategy=ddp", "trainer.devices=2"]
    run_in_own_process(*words)
    assert histories(root / "ddp" / "validate") == histories(root / "run" / "validate")
    two, one = rows_of(root / "ddp" / "validate"), rows_of(root / "run" / "validate")
    assert all(two[kind]["select"] == pytest.approx(one[kind]["select"]) for kind in one)


def test_the_search_of_the_paper(root: Path, capsys: pytest.CaptureFixture) -> None:
    """Random beginning, accuracy, mixed probabilities: measured, and only the maps are written."""
    words = ["search=eep_paper", "search.budget=12", "search.strategy.prune_evaluations=8", "search.strategy.random=5"]
    words += ["search.fidelity=24", "method.objective=val/accuracy", "method.router_mapping=post_softmax"]
    assert main([*words_of(root), *words, "method.groups=2", "run.name=paper"]) == 0
    folder = root / "paper" / "validate"
    lines = histories(folder)["experts3"].splitlines()[1:]
    records = list(map(json.loads, lines))
    sources, scores = [r["source"] for r in records], [r["score"] for r in records]
    assert sources[:5] == ["random"] * 5 and set(sources[5:]) <= {"mutation", "crossover"} and len(sources) == 12
    assert {"full", "EEP prune", *BASELINES} <= rows_of(folder).keys()
    merged = rows_of(folder)["EEP merge"]["chosen"] == "yes"
    assert (folder / "artifact" / "config.json").is_file() is not merged
    # what accuracy cannot tell apart is said, and noted
    tied, said, notes = scores.count(min(scores)), capsys.readouterr().err, " ".join(report_of(folder)["notes"])
    assert all((f"3 experts: {tied} of 12 candidates" in text) is (tied > 1) for text in (said, notes)), scores
    assert "in steps of 4.2 points" in said and "in steps of 4.2 points" in notes


def test_several_numbers_of_experts_within_limits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One search and one folder for each number that keeps the limits; the picture and the table hold them all.

    What is known of the whole model is measured once.
    """
    once: list[str] = []
    fingerprint, enter, evaluate = CausalLMModule.fingerprint, RoutingStatistics.__enter__, ExpertObjective.evaluate

    def evaluated(self: ExpertObjective, candidate: Any, fidelity: int) -> Any:
        once.extend(["whole " + self.metric.draw] if candidate is None else [])
        return evaluate(self, candidate, fidelity)

    monkeypatch.setattr(CausalLMModule, "fingerprint", lambda *given: once.append("weights") or fingerprint(*given))
    monkeypatch.setattr(RoutingStatistics, "__enter__", lambda self: once.append("calibration") or enter(self))
    monkeypatch.setattr(ExpertObjective, "evaluate", evaluated)
    four = 1 - 2 / 6  # of the experts of a layer; what is not expert is left whole
    whole = rows_of(root / "run" / "validate")["full"]
    limit = whole["parameters"] - (1 - four) * whole["expert parameters"] - 1
    words = ["method.num_experts=[2,4,3]", f"method.limits={{parameters: {limit}}}", "search.budget=4"]
    words += ["search.strategy.prune_evaluations=3", "method.baselines=[frequency]", "method.random_draws=1"]
    assert validate(root, "several", *words) == 0
    assert sorted(once) == ["calibration", "weights", "whole search", "whole select"]
    folder = root / "several" / "validate"
    report = report_of(folder)
    shared, chosen = metrics_of(folder / "artifact" / "README.md"), {}
    for row in report["table"]:
        chosen |= {row["experts"]: row} if row["chosen"] else {}
    assert not any(name.startswith("val/") for name in report["metrics"])
    assert shared["letters/log_likelihood_full"] == whole["letters/log_likelihood"] and "letters/accuracy" not in shared
    assert [row["experts"] for row in report["table"] if row["chosen"]] == [3, 2]
    assert {row["experts"] for row in report["table"]} == {6, 3, 2} and histories(folder).keys() == {
        "experts3",
        "experts2",
    }
    assert all(row["parameters"] <= limit for row in report["table"] if row["kind"] == "EEP prune")
    assert {"accuracy_eep_prune_3", "accuracy_eep_prune_2"} <= report["metrics"].keys()
    for count in (3, 2):
        config = io.read_json(folder / "artifact" / f"{count}_experts" / "config.json")
        assert config["num_local_experts"] == count
        assert io.read_json(folder / "artifact" / f"{count}_experts" / "expert_maps.json")["num_experts"] == [6, count]
        assert (folder / "figures" / f"kept_experts_{count}.png").is_file()
        card = folder / "artifact" / f"{count}_experts" / "README.md"
        assert measured({f"val/{name}": value for name, value in metrics_of(card).items()}, chosen[count])
        assert "AutoModelForCausalLM" in card.read_text() and "accuracy_eep_prune" in metrics_of(card)


def test_limits_alone_choose_the_number_of_experts(root: Path, capsys: pytest.CaptureFixture) -> None:
    whole = rows_of(root / "run" / "validate")["full"]
    least = whole["parameters"] - whole["expert parameters"]
    limit = 4 * (least + 0.7 * whole["expert parameters"])  # bytes of 32-bit weights: four experts, not five
    words = ["method.num_experts=null", "dry_run=true", "method.baselines=[frequency]", "run.overwrite=true"]
    assert validate(root, "limits", *words, f"method.limits={{bytes: {limit}, ms_per_token: 1000}}") == 0
    assert "4 experts" in capsys.readouterr().out
    assert validate(root, "limits", *words, f"method.limits={{bytes: {4 * least}}}") != 0
    assert "method.limits" in (error := the_error(capsys.readouterr().err)) and "1 experts" in error


def test_successive_halving_compares_what_answered_all_questions(root: Path) -> None:
    words = [f"search.strategy.{phase}.fidelities=[8,24]" for phase in ("prune", "merge")]
    words += [f"search.strategy.{phase}.strategy.children=4" for phase in ("prune", "merge")]
    words += ["search=eep_halving", "search.strategy.prune_evaluations=14", "search.budget=22", "search.fidelity=8"]
    assert main([*words_of(root), *words, "method.baselines=[frequency, reap]", "run.name=halving"]) == 0
    folder = root / "halving" / "validate"
    records = [json.loads(line) for line in histories(folder)["experts3"].splitlines()[1:]]
    of = {count: {r["key"]: r["score"] for r in records if r["fidelity"] == count} for count in (8, 24)}
    assert len(of[8]) + len(of[24]) == len(records) and of[24].keys() < of[8].keys()
    best = min(
        score for key, score in of[24].items() if any(r["key"] == key and r["candidate"]["kept"] for r in records)
    )
    assert report_of(folder)["metrics"]["search_best_prune"] == pytest.approx(-best)


def test_exact_match_of_written_answers_can_be_the_objective(root: Path, capsys: pytest.CaptureFixture) -> None:
    """Solved examples before each question, and the answer is what stands before the first line break."""
    words = ["method.objective=val/written/exact_match", "method.tasks=[written]", "+data.tasks.written.num_shots=2"]
    words += ["method.baselines=[frequency]", "data.max_length=60", "search.budget=4", "method.random_draws=1"]
    assert validate(root, "written", *words, "search.strategy.prune_evaluations=2") == 0
    assert "in steps of 4.2 points" in capsys.readouterr().err
    rows = rows_of(root / "written" / "validate")
    assert all(0 <= rows[kind]["search"] <= 1 for kind in ("EEP prune", "frequency"))
    assert rows["EEP prune"]["accuracy"] == rows["EEP prune"]["written/accuracy"]


def test_answers_of_the_report_change_the_report_alone(root: Path) -> None:
    """With other answers in its questions the same candidates are measured, and the same one is chosen."""
    shares = {"train": 0.1, "search": 0.4, "select": 0.2, "report": 0.3}
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["a"] = (row["a"] + (split_of(row["q"], shares) == "report")) % 3
    (root / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert validate(root, "other", f"data.tasks.letters.path={root}/other.jsonl") == 0
    mine, theirs = (root / name / "validate" for name in ("other", "run"))
    records = [histories(folder)["experts3"].splitlines()[1:] for folder in (mine, theirs)]
    measured = [[(r["key"], r["score"]) for r in map(json.loads, lines)] for lines in records]
    assert measured[0] == measured[1]
    assert [(r["model"], r["chosen"], r["select"]) for r in report_of(mine)["table"] if r["chosen"]] == [
        (r["model"], r["chosen"], r["select"]) for r in report_of(theirs)["table"] if r["chosen"]
    ]
    assert rows_of(mine)["full"]["letters/log_likelihood"] != rows_of(theirs)["full"]["letters/log_likelihood"]


def test_merging_without_pruning(root: Path) -> None:
    """All experts stay and each token gets one of them: the search begins with merging."""
    words = ["method.num_experts=6", "method.num_experts_per_tok=1", "method.baselines=[frequency]"]
    assert validate(root, "one", *words, "method.random_draws=0", "search.budget=5") == 0
    rows = rows_of(root / "one" / "validate")
    assert rows["EEP merge"]["per token"] == 1 and rows["full"]["per token"] == 2
    config = io.read_json(root / "one" / "validate" / "artifact" / "config.json")
    assert config["num_experts_per_tok"] == 1 and config["num_local_experts"] == 6


def test_a_search_that_begins_with_nothing(root: Path) -> None:
    words = ["method.baselines=[]", "method.random_draws=0", "search.budget=4", "search.strategy.prune_evaluations=3"]
    assert validate(root, "bare", *words) == 0
    assert rows_of(root / "bare" / "validate").keys() == {"full", "EEP prune", "EEP merge"}


def test_a_budget_that_pruning_takes_up_claims_no_merging(root: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where a baseline merges; what is chosen only prunes."""
    words = ["method.baselines=[frequency, m_smoe]", "method.random_draws=1", "search.budget=3"]
    assert validate(root, "unmerged", *words, "search.strategy.prune_evaluations=3") == 0
    folder, said = root / "unmerged" / "validate", capsys.readouterr().err
    report, rows = report_of(folder), rows_of(folder)
    assert rows.keys() == {"full", "random", "EEP prune", "frequency", "m_smoe"} and rows["EEP prune"]["chosen"]
    assert not any("merge" in name for name in report["metrics"])
    remark = "3 experts: no evaluation was left for merging (search.budget = 3, search.strategy.prune_evaluations = 3)"
    assert remark in said and any(remark in note for note in report["notes"])
    assert io.read_json(folder / "artifact" / "expert_maps.json")["candidates"].keys() == {"EEP prune"}


def test_a_larger_budget_goes_on_from_the_archive(root: Path, capsys: pytest.CaptureFixture) -> None:
    longer = copied(root / "run" / "validate", "longer")
    assert validate(root, "longer", "resume=true", "search.budget=20", "method.objective=val/accuracy") != 0
    assert "method.objective: was None, now 'val/accuracy'" in the_error(capsys.readouterr().err)
    assert validate(root, "longer", "resume=true", "search.budget=20") == 0
    assert added(root / "run" / "validate", longer) == {"experts3": 4}


def test_a_dry_run_says_what_it_would_cost(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "dry", "dry_run=true") == 0
    assert "search experts3" in capsys.readouterr().out
    assert not (root / "dry" / "validate" / "report.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.num_experts=7"], "num_experts = 7"),
        (["method.num_experts=0"], "method.num_experts"),
        (["method.num_experts=[2,2]"], "method.num_experts"),
        (["method.num_experts=null"], "method.num_experts"),
        (["method.limits={size: 1}"], "method.limits"),
        (["method.num_experts_per_tok=4"], "num_experts_per_tok = 4"),
        (["method.tasks=[sums]"], "method.tasks"),
        (["method.tasks=[letters,written,letters]"], "method.tasks names letters twice: name each task once"),
        (["data.evaluate=[letters,letters]"], "data.evaluate names letters twice: name each task once"),
        (["method.objective=val/bleu"], "method.objective"),
        (["method.mode=min"], "more of it is better; set method.mode=max"),
        (["method.tasks=null", "method.objective=val/choice_log_likelihood"], "says nothing of written"),
        (["method.baselines=[best]"], "method.baselines"),
        (["method.groups=4"], "groups = 4"),
        (["search.strategy.random=10"], "search.strategy.random"),
        (["search=none"], "there is no key 'search.budget'"),
        (
            ["module.pretrained=null", "module.config={_target_: transformers.LlamaConfig, num_hidden_layers: 1,"
             " hidden_size: 8, intermediate_size: 8, num_attention_heads: 2, vocab_size: 200}", "data.tokenizer=MODEL"],
            "Describe another one in FAMILIES of genlight/experts/families.py",
        ),
        (["data=digits"], "data"),
    ],
    ids=lambda v: v[0].split("=")[0] if isinstance(v, list) else None,
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    given = [*words_of(root), *SEARCH]
    if words == ["data=digits"]:
        given = [word for word in given if not word.startswith("data.")]
    words = [word.replace("MODEL", f"{root}/model") for word in words]
    assert main([*given, "run.name=wrong", "run.overwrite=true", *words]) != 0
    assert expected in the_error(capsys.readouterr().err)


def test_tasks_that_a_mean_of_nats_forgets_are_named() -> None:
    logged = {"val/a/log_likelihood": -15.6, "val/b/log_likelihood": -0.31}
    (warning,) = remarks_before("val/log_likelihood", ["a", "b"], 600, logged)
    assert "15.6 nats of a and 0.31 of b" in warning
    assert not remarks_before("val/log_likelihood", ["a", "b"], 600, {**logged, "val/b/log_likelihood": -3.0})
    assert not remarks_before("val/choice_log_likelihood", ["a", "b"], 600, logged)
    assert not remarks_before("val/log_likelihood", ["a"], 600, logged)


def test_a_whole_model_without_a_mistake_is_named() -> None:
    logged = {"val/accuracy": 0.7, "val/a/accuracy": 1.0, "val/b/accuracy": 0.4, "val/a/log_likelihood": -0.1}
    (warning,) = remarks_before("val/accuracy", ["a"], 600, logged)
    assert "val/accuracy of the whole model is 1, where it ends" in warning and "method.objective=null" in warning
    assert not remarks_before("val/accuracy", ["a", "b"], 600, logged)
    assert remarks_before("val/a/accuracy", ["a", "b"], 600, logged) == [warning.replace("accuracy", "a/accuracy", 1)]
    assert not remarks_before("val/choice_log_likelihood", ["a"], 600, logged)


def test_candidates_that_tie_are_named() -> None:
    """Scores are negated accuracies; a likelihood has no other advice than more questions."""
    (all_,) = remarks_after("val/accuracy", "max", [-0.25] * 8)
    assert "all 8 candidates of the search have val/accuracy = 0.25" in all_ and "by a log-likelihood" in all_
    (many,) = remarks_after("val/accuracy", "max", [-0.75] * 3 + [-0.5] * 17)
    assert "3 of 20 candidates of the search have its best score, val/accuracy = 0.75" in many
    (least,) = remarks_after("val/log_likelihood", "min", [2.0, 2.0])
    assert "val/log_likelihood = 2" in least and least.endswith("ask more questions (search.fidelity)")
    assert not remarks_after("val/accuracy", "max", [-0.75] * 2 + [-0.5] * 18)
    assert not remarks_after("val/accuracy", "max", [-0.75, -0.5, -0.5])
    assert not remarks_after("val/accuracy", "max", [-0.75]) and not remarks_after("val/accuracy", "max", [])


def work_of(**known: Any) -> ExpertWork:
    """Of three experts, compared by accuracy; with values for its properties."""
    whole: Any = SimpleNamespace(evaluations=SimpleNamespace(shares=1, display=SimpleNamespace(counted=list)))
    work = ExpertWork(SimpleNamespace(mode="max"), 3, whole, None, "val/accuracy")  # type: ignore[arg-type]
    vars(work).update(known)
    return work


@pytest.mark.parametrize(("scores", "tied"), [([-0.5] * 3, True), ([-0.5, -0.25, -0.5], False), ([-0.5, None], False)])
def test_a_beginning_that_ties_is_named_at_once(scores: list[float | None], tied: bool) -> None:
    said: list[str] = []
    plan = SimpleNamespace(plan=SimpleNamespace(initial=[0] * len(scores)))
    work = work_of(task=plan, runner=SimpleNamespace(remark=said.extend))
    for index, score in enumerate(scores):
        assert not said
        trial: Any = SimpleNamespace(source="initial", index=index)
        work._seen(Record(trial, score, {}, None))
    assert len(said) == tied and all("3 experts: all 3 candidates that the search begins with" in text for text in said)


def test_a_lost_device_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> ExpertWork:
        def evaluate(*_: Any) -> None:
            raise error

        monkeypatch.setattr(ExpertWork, "objective", lambda *_: SimpleNamespace(evaluate=evaluate))
        return work_of()

    assert failing(FloatingPointError("x")).judge([None], "select", 3) == [float("inf")]
    with pytest.raises(torch.AcceleratorError):
        failing(torch.AcceleratorError("device lost")).judge([None], "select", 3)
