"""What is written predicts the same when it is read again, by genlight and by a dozen lines of torch alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from predictors.toy_pool import toy

from genlight.errors import UserError
from genlight.io import CorruptFileError, write_manifest
from genlight.predictors.expert_heads import ExpertScorePredictor, ScoreScale
from genlight.predictors.expert_training import ExpertTraining, finetune, pretrain
from genlight.predictors.experts import ExpertSettings
from genlight.predictors.predictor_file import TrainedExperts, load_predictor, save_predictor

TRAINING = ExpertTraining(10, 10)
# knows nothing of genlight: an MLP on one-hot tokens for each expert and for the gate
PLAIN = """
import json, sys, torch
from safetensors.torch import load_file

folder = sys.argv[1]
record, weights = json.load(open(folder + "/predictor.json")), load_file(folder + "/predictor.safetensors")
tokens = torch.tensor(json.loads(sys.argv[2]))
hot = torch.cat([torch.eye(n)[tokens[:, t]] for t, n in enumerate(record["vocabulary"])], dim=1)

def run(prefix, expert):
    part = lambda name: weights[prefix + name] if expert is None else weights[prefix + name][expert]
    hidden = hot
    for layer in range(record["network"]["depth"]):
        hidden = torch.relu(hidden @ part(f"0.layers.{layer}.weight").T + part(f"0.layers.{layer}.bias"))
    return hidden @ part("1.weight").T + part("1.bias")

experts = torch.cat([run("network.experts.network.", e) for e in range(len(record["low_fidelity"]))], dim=1)
score = (run("network.gate.", None).softmax(1) * experts).sum(1)
print(json.dumps(((score - weights["scale.score.mean"]) / weights["scale.score.std"]).tolist()))
"""


def trained(head: str = "fusion", encoder: str = "mlp") -> tuple[TrainedExperts, torch.Tensor]:
    pool, truth = toy()
    network = pretrain(ExpertSettings(encoder, width=8, embedding=6), TRAINING, pool, seed=0)
    measured = pool.tokens[:20], truth[:20]
    if head == "fusion":
        network = finetune(network, TRAINING, *measured, seed=0)
    return TrainedExperts(network, ScoreScale.of(network, pool.tokens), pool.names, head, *measured), pool.tokens


@pytest.mark.parametrize(
    ("head", "encoder"), [("fusion", "lstm"), ("fusion", "transformer"), ("gp", "mlp"), ("ridge", "mlp")]
)
def test_read_again_it_predicts_the_same_bit_for_bit(head: str, encoder: str, tmp_path: Path) -> None:
    written, tokens = trained(head, encoder)
    save_predictor(tmp_path, written, {"data": "f00d"})
    state = torch.get_rng_state()
    read = load_predictor(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert read.names == written.names and read.head == head
    for before, after in zip(written.fitted().predict(tokens), read.fitted().predict(tokens)):
        assert torch.equal(before, after)
    if head == "gp":
        pool, truth = toy()
        again = ExpertScorePredictor(written.network, pool, "gp").fit(tokens[:20], truth[:20]).predict(tokens)
        assert torch.allclose(again[0], read.fitted().predict(tokens)[0], atol=1e-8)


def test_a_fresh_process_with_torch_alone_gives_the_same_scores(tmp_path: Path) -> None:
    written, tokens = trained()
    save_predictor(tmp_path, written, {})
    words = [sys.executable, "-c", PLAIN, str(tmp_path), json.dumps(tokens[:30].tolist())]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    expected = written.fitted().predict(tokens[:30])[0]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5)


def test_texts_are_numbered_as_in_training(tmp_path: Path) -> None:
    written, _ = trained()
    save_predictor(tmp_path, replace(written, categories=(("a", "b", "c", "d"), (), (), (), ())), {})
    read = load_predictor(tmp_path)
    assert read.numbered([["c", 0, 1, 2, 3], ["a", 3, 2, 1, 0]]).tolist() == [[2, 0, 1, 2, 3], [0, 3, 2, 1, 0]]
    with pytest.raises(ValueError, match="category 0 is 'e'; it must be one of a, b, c, d"):
        read.numbered([["e", 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="has 4 categories, not 5"):
        read.numbered([["a", 0, 1, 2]])
    assert written.numbered([[3, 0, 1, 2, 3]]).tolist() == [[3, 0, 1, 2, 3]], "none has a name"


def test_what_is_no_predictor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no predictor.safetensors"):
        load_predictor(tmp_path)
    save_predictor(tmp_path, trained()[0], {})
    record = json.loads((tmp_path / "predictor.json").read_text())
    for change, error in [
        ({"version": 2}, UserError),
        ({"vocabulary": [4] * 4}, CorruptFileError),
        ({"network": {**record["network"], "width": 9}}, CorruptFileError),
        ({"network": {**record["network"], "colour": "red"}}, CorruptFileError),
        ({"low_fidelity": ["one"]}, CorruptFileError),
    ]:
        (tmp_path / "predictor.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(error):
            load_predictor(tmp_path)
    (tmp_path / "predictor.json").write_text(json.dumps(record))
    write_manifest(tmp_path)
    load_predictor(tmp_path)
    (tmp_path / "predictor.json").write_text(json.dumps({**record, "facts": {"altered": 1}}))
    with pytest.raises(CorruptFileError, match=r"predictor\.json"):
        load_predictor(tmp_path)
