"""The page of results: a row for each bar and each claim, and the page of the repository is the one that is made."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from genlight.errors import UserError
from genlight.io import atomic_write_json
from genlight.reports.proof import bar_at_least, bar_at_most, read_proof, write_proof
from genlight.reports.results_page import CLAIMS, Claim, read_claims, read_proofs, results_page, write_results_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
BARS = [bar_at_most("near", "distance", 0.9, 1.5), bar_at_least("gain", "gain", 18.0, 20)]
CLAIM = Claim("M", "better", "3 | 4", "a model", "Table 1", "small", ["gain"], "large models", "a/b")


@pytest.fixture
def folder(tmp_path):
    table = [{"a": "x|y", "b": 1.23456}]
    write_proof(tmp_path / "small.json", bars=BARS, seeds=[0, 1], wall_seconds=200.0, table=table)
    write_proof(tmp_path / "other.json", bars=[bar_at_most("steps", "steps", 5, 10)], seeds=[0], wall_seconds=1.0)
    return tmp_path


def claims(folder, *entries):
    atomic_write_json(folder / CLAIMS, [asdict(entry) for entry in entries])


def claim_cells(folder):
    rows = [line for line in results_page(folder).splitlines() if line.startswith("| M |")]
    return [cell.strip() for cell in rows[0].replace("\\|", "/").strip("|").split("|")]


def on_a_gpu(folder, name, bars):
    proof = write_proof(folder / f"{name}.json", bars=bars, seeds=[0], wall_seconds=1.0)
    atomic_write_json(folder / f"{name}.json", asdict(replace(proof, machine={**proof.machine, "gpus": ["H200"]})))


def test_one_row_for_each_bar(folder):
    write_results_page(folder)
    page = (folder / "README.md").read_text()
    assert page == results_page(folder)
    assert "| [small](small.json) | `near` | distance | 0.9 | ≤ 1.5 | yes |" in page
    assert "| [small](small.json) | `gain` | gain | 18 | ≥ 20 | **no** |" in page
    assert "| [other](other.json) | `steps`" in page and "| x\\|y | 1.235 |" in page and "seeds 0, 1" in page
    assert "papers" not in page


def test_a_claim_stands_beside_its_bars(folder):
    claims(folder, CLAIM)
    method, claim, paper, here, gpu, shown, needs = claim_cells(folder)
    assert (method, claim, shown, needs) == ("M", "better", "large models", "a/b")
    assert paper == "3 / 4: a model (Table 1)"
    assert here == "gain: 18 (wanted ≥ 20; **missed**)" and gpu == "not measured"


def test_what_a_gpu_measured_has_its_own_column(folder):
    claims(folder, CLAIM)
    on_a_gpu(folder, "small-h200", [bar_at_least("gain", "gain", 25.0, 20)])
    on_a_gpu(folder, "smaller", [bar_at_least("gain", "gain", 99.0, 20)])
    cells = claim_cells(folder)
    assert "18" in cells[3] and cells[4] == "gain: 25 (wanted ≥ 20)"


def test_a_proof_of_its_own_on_a_gpu_joins_by_name(folder):
    claims(folder, replace(CLAIM, gpu={"large_gpu": ["speed"]}))
    on_a_gpu(folder, "large_gpu", [bar_at_least("speed", "times as fast", 1.4, 1.3), bar_at_least("gain", "g", 1, 2)])
    assert claim_cells(folder)[4] == "times as fast: 1.4 (wanted ≥ 1.3)"
    claims(folder, replace(CLAIM, gpu={"large_gpu": ["gone"]}))
    with pytest.raises(UserError, match=r"large_gpu\.json has no bar 'gone'"):
        results_page(folder)


def test_no_bar_and_no_file_are_not_measured(folder):
    claims(folder, replace(CLAIM, bars=[]))
    assert claim_cells(folder)[3:5] == ["not measured", "not measured"]
    claims(folder, replace(CLAIM, proof="later"))
    assert claim_cells(folder)[3] == "not measured"


def test_a_bar_that_is_not_there_is_named(folder):
    claims(folder, replace(CLAIM, bars=["gain", "gone"]))
    with pytest.raises(UserError, match=r"small\.json has no bar 'gone'"):
        results_page(folder)


def test_a_claim_with_a_field_too_few_is_named(folder):
    record = asdict(CLAIM)
    del record["open"]
    atomic_write_json(folder / CLAIMS, [record])
    with pytest.raises(UserError, match=r"claims\.json: 0\.open"):
        read_claims(folder / CLAIMS)


def test_the_page_of_the_repository_is_the_one_that_is_made():
    assert (RESULTS / "README.md").read_text() == results_page(RESULTS), (
        "docs/results/README.md was not made anew: genlight.reports.results_page.write_results_page('docs/results')"
    )


def test_every_method_has_a_claim_and_every_claim_a_proof():
    found, proofs = read_claims(RESULTS / CLAIMS), read_proofs(RESULTS)
    pages = {path.read_text().splitlines()[0] for path in (ROOT / "docs" / "methods").glob("*.md")}
    for claim in found:
        assert claim.open and claim.checkpoint and claim.source, claim
        for name in (claim.proof, *claim.gpu):
            assert (ROOT / "tools" / "proofs" / f"{name}.py").is_file(), name
        if claim.proof in proofs:
            assert set(claim.bars) <= {bar.id for bar in read_proof(RESULTS / f"{claim.proof}.json").bars}
    papers = {claim.method for claim in found}
    assert papers == {"S³", "LCSC", "OMS-DPM", "DELE", "EEP", "Distilled Decoding", "ViDiT-Q", "MixDQ"}
    assert all(any(title.startswith(f"# {method}") for title in pages) for method in papers)
