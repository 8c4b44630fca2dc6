"""The real commands of DELE on a small table: comparison, searches, artifact, resuming, bad input."""

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import added, assert_accounted, copied, histories, report_of, run_in_ranks, the_error
from oracles.kills import at_checkpoint, at_line, kill
from scipy.stats import kendalltau

from genlight import io
from genlight.cli import main
from genlight.data.score_table import ScoreTableDataModule
from genlight.errors import UserError
from genlight.loops import predictor_work
from genlight.loops.predictor_search import PredictorSearch
from genlight.loops.predictor_work import PredictorWork
from genlight.predictors.contenders import NAMES
from genlight.predictors.predictor_file import load_predictor
from genlight.trainer.checkpoint_io import load_checkpoint

TOKENS = ("a", "b", "c", "d", "e")
SCORES = ("small", "noisy", "size")
COLUMNS = (*TOKENS, "score", *SCORES)


def write_table(path: Path, change: dict[int, str] | None = None) -> None:
    """243 candidates; the score of every tenth is not known. `size` is what a candidate costs."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, tokens in enumerate(itertools.product(range(3), repeat=5)):
            score = float(np.dot(tokens, (3.0, 2.0, 1.0, 0.6, 0.3)) - 1.5 * (tokens[0] == tokens[1]))
            cheap = [score + 3 * rng.normal(), score + 5 * rng.normal(), float(sum(tokens))]
            shown = (change or {}).get(number, "" if number % 10 == 9 else repr(score))
            writer.writerow([*tokens, shown, *map(repr, cheap)])


def words_of(root: Path, table: str = "table.csv") -> list[str]:
    return [
        "experiment=dele/score_table",
        f"data.path={root}/{table}",
        f"data.token_columns=[{','.join(TOKENS)}]",
        f"data.low_fidelity=[{','.join(SCORES)}]",
        "data.higher_is_better=true",
        "data.labels=12",
        "data.pretrain_steps=40",
        "data.batch_size=64",
        "module.network.width=12",
        "module.network.depth=1",
        "trainer.max_steps=60",
        "trainer.accelerator=cpu",
        "callbacks.checkpoint.every_n_train_steps=30",  # the end of the first step is saved besides
        f"run.root={root}",
    ]


SMALL = [
    "method.labels=[20]",
    "method.label_seeds=2",
    "method.finetune_steps=20",
    "method.search_seeds=2",
    "search.budget=24",
    "search.strategy.strategy.random=10",
    "search.strategy.strategy.round_size=4",
]


def validate(root: Path, name: str, *words: str, table: str = "table.csv") -> int:
    given = ["validate", *words_of(root, table), *SMALL, f"ckpt_path={root}/run/fit", f"run.name={name}", *words]
    return main(given)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `table.csv` and `run`, a finished fit and its comparison."""
    root = tmp_path_factory.mktemp("dele")
    write_table(root / "table.csv")
    assert main(["fit", *words_of(root), "run.name=run"]) == 0
    assert validate(root, "run") == 0
    return root


def data_of(root: Path, labels: int = 12, table: str = "table.csv") -> ScoreTableDataModule:
    return ScoreTableDataModule(f"{root}/{table}", TOKENS, "score", SCORES, labels, True)


def records_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = histories(folder).items()
    return {name: [json.loads(line) for line in lines.splitlines()[1:]] for name, lines in found}


def test_the_table_holds_every_predictor_and_every_indicator(root: Path) -> None:
    folder = root / "run" / "validate"
    assert_accounted(folder)
    report = report_of(folder)
    rows = {(row["labels"], row["predictor"]): row for row in report["table"]}
    assert rows.keys() == {*itertools.product((12, 20), NAMES), *((0, name) for name in SCORES)}
    first, second = (io.read_json(folder / "comparison" / f"12-{seed}.json")["scores"] for seed in (0, 1))
    for name in NAMES:
        taus = [scores[name]["kendall_tau"] for scores in (first, second)]
        assert rows[12, name]["kendall_tau"] == pytest.approx(np.mean(taus))
        # two values: the half width is t = 12.706 times half their difference
        half = 12.7062047 * abs(taus[0] - taus[1]) / 2
        assert rows[12, name]["high"] - rows[12, name]["kendall_tau"] == pytest.approx(half, abs=1e-6)
    held = data_of(root).prepared
    table = list(csv.DictReader((root / "table.csv").open()))
    score = {tuple(int(row[name]) for name in TOKENS): float(row["small"]) for row in table}
    cheap = [score[tuple(tokens)] for tokens in held.held_out.tolist()]
    assert rows[0, "small"]["kendall_tau"] == pytest.approx(kendalltau(cheap, held.held_out_targets).statistic)
    assert all(-1 <= rows[0, name]["expert_tau"] <= 1 for name in SCORES) and rows[0, "small"]["expert_tau"] > 0.3
    assert report["num_samples"] == len(held.held_out)
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"tau", "regret", "gate"}


@pytest.mark.parametrize("name", ["expert_gp", "dele", "static_gate", "vanilla"])
def test_the_artifact_predicts_as_the_table_says(name: str, root: Path) -> None:
    run = "run" if name == "expert_gp" else name
    words = [f"method.predictor={name}", "method.predictors=[tokens_gp]", "method.searches=[]", "method.labels=null"]
    assert run == "run" or validate(root, run, *words, "method.label_seeds=1") == 0
    folder = root / run / "validate"
    held = data_of(root).prepared
    mean, deviation = load_predictor(folder / "artifact").fitted().predict(held.held_out)
    kept = io.read_json(folder / "comparison" / "12-0.json")["scores"][name]
    assert kendalltau(mean, held.held_out_targets).statistic == pytest.approx(kept["kendall_tau"])
    assert bool((deviation >= 0).all()) and report_of(folder)["metrics"][f"kendall_tau_{name}"]


def test_doubts_of_the_experts_are_said_and_noted(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are of the pretrained experts, on the labels of the data, with a gate that nothing has trained."""

    def doubts(network: Any, names: Any, tokens: torch.Tensor, targets: torch.Tensor) -> list[str]:
        kept = load_checkpoint(root / "run" / "fit" / "checkpoints" / "step-000040.ckpt")["state_dict"]
        same = [
            torch.equal(value, kept[f"network.experts.{name}"]) for name, value in network.experts.named_parameters()
        ]
        return [f"{names} of {len(tokens)} and {len(targets)}, {all(same)}"]

    monkeypatch.setattr(predictor_work, "expert_doubts", doubts)
    words = ["method.predictors=[tokens_gp]", "method.searches=[]", "method.labels=null", "method.label_seeds=1"]
    assert validate(root, "doubts", *words) == 0
    said = f"{SCORES} of 12 and 12, True"
    assert f"warning: {said}" in capsys.readouterr().err and said in report_of(root / "doubts" / "validate")["notes"]


def test_experts_are_those_of_the_first_step(root: Path) -> None:
    state = load_checkpoint(root / "run" / "fit" / "checkpoints" / "step-000040.ckpt")["state_dict"]
    saved = load_predictor(root / "run" / "validate" / "artifact").network.state_dict()
    experts = [name for name in saved if name.startswith("experts.")]
    assert experts and all(torch.equal(saved[name], state[f"network.{name}"]) for name in experts)


def test_experts_that_true_scores_have_trained_are_refused(root: Path) -> None:
    method: Any = SimpleNamespace(ckpt_path=f"{root}/run/fit")
    module = SimpleNamespace(net=torch.nn.Linear(1, 1), finetuned=True, pretrained_steps=None)
    for steps, message in ((60, "holds experts that true scores have trained"), (50, "step-000050.ckpt is not there")):
        with pytest.raises(UserError, match=message):
            PredictorSearch._experts(method, module, steps)


def test_regret_is_what_the_archives_say(root: Path) -> None:
    folder = root / "run" / "validate"
    content, records = io.read_json(folder / "artifact" / "comparison.json"), records_of(folder)
    assert records.keys() == {f"{name}-{seed}" for name in ("random", "expert_gp", "dele") for seed in (0, 1)}
    known = [float(row["score"]) for row in csv.DictReader((root / "table.csv").open()) if row["score"]]
    for name, seeds in content["regrets"].items():
        for seed, regret in enumerate(seeds):
            of = records[f"{name}-{seed}"]
            assert len({record["key"] for record in of}) == len(of) == 24
            best = np.maximum.accumulate([-record["score"] for record in of])
            assert regret == pytest.approx(max(known) - best, abs=1e-5) and min(regret) >= -1e-6
    for seed in (0, 1):
        begin = [[record["key"] for record in records[f"{name}-{seed}"][:10]] for name in content["regrets"]]
        assert begin[0] == begin[1] == begin[2], "all searches begin with the same random candidates"
        assert {record["source"] for record in records[f"dele-{seed}"][10:]} == {"predicted"}


def test_what_is_proposed_was_not_measured(root: Path) -> None:
    rows = list(csv.DictReader((root / "table.csv").open()))
    proposals = io.read_json(root / "run" / "validate" / "artifact" / "comparison.json")["proposals"]
    assert len(proposals) == 10 and all(rows[each["row"]]["score"] == "" for each in proposals)
    assert all([int(rows[each["row"]][name]) for name in TOKENS] == each["tokens"] for each in proposals)


def test_true_scores_beside_the_labels_change_no_comparison(root: Path) -> None:
    data = data_of(root)
    labelled = {tuple(row) for row in data.prepared.pool.tokens[data.prepared.labelled].tolist()}
    held = {tuple(row) for row in data.prepared.held_out.tolist()}
    hidden = [
        number
        for number, tokens in enumerate(itertools.product(range(3), repeat=5))
        if number % 10 != 9 and tokens not in labelled | held
    ]
    assert len(hidden) > 80
    write_table(root / "other.csv", {number: repr(100.0 - number) for number in hidden})
    words = ["method.labels=null", "method.label_seeds=1", "method.searches=[]"]
    assert validate(root, "other", *words, table="other.csv") == 0
    files = [root / run / "validate" / "comparison" / "12-0.json" for run in ("run", "other")]
    one, two = (io.read_json(file)["scores"] for file in files)
    assert one == two


def test_a_comparison_counts_for_its_own_truth_only(root: Path) -> None:
    held = tuple(data_of(root).prepared.held_out[0].tolist())
    number = list(itertools.product(range(3), repeat=5)).index(held)
    words = ["method.labels=null", "method.label_seeds=1", "method.searches=[]", "method.predictors=[tokens_gp]"]
    found = []
    for change, more in (({}, ()), ({number: "100.0"}, ("resume=true",))):
        write_table(root / "truth.csv", change)
        assert validate(root, "truth", *words, *more, table="truth.csv") == 0
        found.append(io.read_json(root / "truth" / "validate" / "comparison" / "12-0.json")["scores"]["tokens_gp"])
    assert found[0]["kendall_tau"] != found[1]["kendall_tau"]


def test_no_search_measures_what_costs_too_much(root: Path) -> None:
    words = ["method.cost=size", "method.cost_limit=4", "method.label_seeds=1", "method.predictors=[expert_gp]"]
    words += ["method.labels=null", "method.searches=[expert_gp]", "method.search_seeds=1"]
    assert validate(root, "limited", *words) == 0
    records = records_of(root / "limited" / "validate")
    assert all(sum(r["candidate"]["tokens"]) == r["cost"]["size"] <= 4 for of in records.values() for r in of)
    proposals = io.read_json(root / "limited" / "validate" / "artifact" / "comparison.json")["proposals"]
    assert proposals and all(sum(each["tokens"]) <= 4 for each in proposals)


def test_a_limit_of_cost_in_another_unit_is_doubted_and_failed_measurements_cost_too_much() -> None:
    costs = torch.tensor([[0.5], [-1.0], [11.7], [torch.nan], [3.0]])

    def limited(limit: float) -> PredictorWork:
        method: Any = SimpleNamespace(cost="latency", cost_limit=limit)
        work = PredictorWork(method, None, SimpleNamespace(low_fidelity=("latency",)), None)  # type: ignore[arg-type]
        work.table = SimpleNamespace(low_fidelity=costs, target=torch.arange(5.0), tokens=torch.zeros(5, 1))
        return work

    assert limited(4.0).searched.tolist() == [0, 4] and limited(4.0).cost_doubts() == []
    expected = "method.cost_limit = 4000.0 leaves no candidate out: latency goes from 0.5 to 11.7"
    assert limited(4000.0).cost_doubts() == [expected]
    with pytest.raises(UserError, match=r"0.004: every candidate costs more; latency goes from 0.5 to 11.7"):
        limited(0.004).searched  # noqa: B018


@pytest.mark.parametrize("search", ["guided", "evolution"])
def test_evolution_searches_the_table_too(search: str, root: Path) -> None:
    words = ["method.label_seeds=1", "method.predictors=[expert_gp]", "method.labels=null", "method.search_seeds=1"]
    words += ["method.searches=[expert_gp]", f"search={search}", "search.budget=24", "search.fidelity=1"]
    evolution = "{_target_: genlight.search.evolution.Evolution, population: 8, children: 6}"
    more = ["search.strategy.strategy.min_measured=12", "search.strategy.strategy.stage_size=6"]
    more += [f"+search.strategy.strategy.evolution={evolution}"]
    given = [word for word in SMALL if not word.startswith("search.")]
    words = ["validate", *words_of(root), *given, *words, *(more if search == "guided" else [])]
    assert main([*words, f"ckpt_path={root}/run/fit", f"run.name={search}"]) == 0
    sources = {r["source"] for of in records_of(root / search / "validate").values() for r in of}
    assert ("guided" in sources) == (search == "guided") and sources >= {"random", "mutation"}


def test_a_killed_search_resumes_to_the_same_archives_and_compares_nothing_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["validate", *words_of(root), *SMALL, f"ckpt_path={root}/run/fit", "run.name=killed"]
    kill(words, at_line("expert_gp-1", 17))
    fitted, fit = [], PredictorWork.labelled
    monkeypatch.setattr(PredictorWork, "labelled", lambda self, *each: fitted.append(each) or fit(self, *each))
    assert main([*words, "resume=true"]) == 0
    # for the estimate of the time, and for what is saved and drawn
    assert set(fitted) == {(20, 0), (12, 0)}
    assert histories(root / "killed" / "validate") == histories(root / "run" / "validate")
    assert report_of(root / "killed" / "validate")["table"] == report_of(root / "run" / "validate")["table"]


def test_a_comparison_killed_between_two_choices_of_labels_measures_none_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["validate", *words_of(root), *SMALL, f"ckpt_path={root}/run/fit", "run.name=between"]
    words += ["method.searches=[]", "method.predictors=[tokens_gp]"]
    kept = root / "between" / "validate" / "comparison"
    # two are measured for the estimate of the time; this is before the last is written
    kill(words, lambda _, path: path.parent == kept and len(list(kept.glob("*.json"))) == 3)
    found = {path.stem: path.read_bytes() for path in kept.glob("*.json")}
    assert found.keys() == {"12-0", "12-1", "20-0"}
    fitted, fit = [], PredictorWork.labelled
    monkeypatch.setattr(PredictorWork, "labelled", lambda self, *each: fitted.append(each) or fit(self, *each))
    assert main([*words, "resume=true"]) == 0
    assert (12, 1) not in fitted and (20, 1) in fitted
    assert {name: (kept / f"{name}.json").read_bytes() for name in found} == found
    for file in kept.glob("*.json"):
        other = io.read_json(root / "run" / "validate" / "comparison" / file.name)
        assert io.read_json(file)["scores"]["tokens_gp"] == other["scores"]["tokens_gp"]


def test_two_processes_compare_and_search_as_one(root: Path) -> None:
    words = ["validate", *words_of(root), *SMALL, f"ckpt_path={root}/run/fit", "run.name=ranks"]
    run_in_ranks(*words, "strategy=ddp", "trainer.devices=2")
    folder, one = root / "ranks" / "validate", root / "run" / "validate"
    assert histories(folder) == histories(one)
    assert report_of(folder)["table"] == report_of(one)["table"]
    assert (folder / "artifact" / "comparison.json").read_bytes() == (one / "artifact" / "comparison.json").read_bytes()


def test_a_killed_fit_resumes_to_the_same_experts(root: Path) -> None:
    words = ["fit", *words_of(root), "run.name=dead"]
    kill(words, at_checkpoint(root / "dead" / "fit", "first checkpoint"))
    assert main([*words, "resume=true"]) == 0
    one, two = (
        load_checkpoint(root / run / "fit" / "checkpoints" / "step-000060.ckpt")["state_dict"]
        for run in ("run", "dead")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_larger_budget_goes_on_from_the_archives(root: Path, capsys: pytest.CaptureFixture) -> None:
    longer = copied(root / "run" / "validate", "longer")
    assert validate(root, "longer", "resume=true", "search.budget=28", "data.higher_is_better=false") != 0
    assert "data.higher_is_better: was True, now False" in the_error(capsys.readouterr().err)
    assert validate(root, "longer", "resume=true", "search.budget=28") == 0
    assert set(added(root / "run" / "validate", longer).values()) == {4}


def test_a_dry_run_says_what_it_would_cost(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "dry", "dry_run=true") == 0
    assert "comparisons" in capsys.readouterr().out
    assert not (root / "dry" / "validate" / "report.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.predictor=gp"], "method.predictor: gp must be one of dele"),
        (["method.predictor=scores_gp"], "method.predictor: scores_gp must be one of dele"),
        (["method.searches=[best]"], "method.searches: best"),
        (["method.labels=[300]"], "method.labels = 300 must be at most"),
        (["method.labels=[1]"], "method.labels = [1]"),
        (["method.label_seeds=0"], "method.label_seeds = 0"),
        (["method.cost=size"], "method.cost = size and method.cost_limit = None go together"),
        (["method.cost=time", "method.cost_limit=1"], "method.cost: data.low_fidelity has no time"),
        (
            ["method.cost=size", "method.cost_limit=-1"],
            "method.cost_limit = -1: every candidate costs more; size goes from 0 to 10",
        ),
        (["search.strategy.strategy.acquisition=best"], "strategy.acquisition = 'best'"),
        (["ckpt_path=null"], "ckpt_path"),
        (["data.pretrain_steps=60"], "data.pretrain_steps = 60, but 40 in the fit of ckpt_path="),
        (["data.low_fidelity=[small]"], "data.low_fidelity"),
        (["data.path=nowhere.csv"], "nowhere.csv"),
        (["module=classifier", "data=digits", "metrics=digits"], "module=predictor"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    given = [*words_of(root), *SMALL, f"ckpt_path={root}/run/fit"]
    if "data=digits" in words:
        given = [w for w in given if not w.startswith(("data.", "module.", "ckpt_path"))]
    assert main(["validate", *given, "run.name=wrong", "run.overwrite=true", *words]) != 0
    assert expected in the_error(capsys.readouterr().err)
