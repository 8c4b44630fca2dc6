"""`inspect`: every layer once, what a method does with it, and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DiTTransformer2DModel
from experts.tiny_models import tiny_model
from modules.tiny_folders import tiny_folder

from genlight.cli import main
from genlight.modules.outline import read_outline
from genlight.modules.pipeline_calls import load_pipeline
from genlight.quantization.accounting import count_macs as macs_of_layers
from genlight.reports.cost import count_macs
from genlight.reports.inspection import layer_rows, work_of


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The printed lines by their first word; "" is all of them."""
    assert main(["inspect", *words]) == 0
    out = capsys.readouterr().out
    return {"": out, **{line.split()[0]: line.rstrip() for line in out.splitlines() if line.strip()}}


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    """The folder of a network in half precision, without a pipeline around it."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(2, 8, in_channels=4, out_channels=4, num_layers=3, sample_size=8, norm_num_groups=4)
    network.half().save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def test_an_outline_has_the_sizes_and_the_work_of_the_network_itself(dit: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(dit).float()
    inputs = (torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))
    outline = read_outline(str(dit)).networks["network"]
    work, totals = work_of(outline), []
    assert work.layers == macs_of_layers(network, lambda: totals.append(count_macs(network, *inputs)))
    assert work.total == totals[0] > sum(work.layers.values())  # attention belongs to no layer
    assert all(p.is_meta and p.dtype == torch.float16 for p in outline.parameters())
    rows = {row["layers"]: row for row in layer_rows(outline, "", {}, work)}
    assert rows["transformer_blocks.*.attn1.to_q"]["count"] == 3
    assert rows["transformer_blocks.*.attn1.to_q"]["bytes"] == f"{3 * (16 * 16 + 16) * 2 / 1000:.1f} kB"


def test_the_first_group_decides_unless_a_layer_is_kept(dit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = "_target_: genlight.loops.quantization_settings.GroupSettings, pattern: "
    groups = f"method.groups=[{{{group}attn1, metric: psnr, weight_bits: 4}}, {{{group}.*}}]"
    lines = lines_of(capsys, f"module.pretrained={dit}", "method=viditq", groups)
    assert lines["transformer_blocks.*.attn1.to_q"].endswith("yes: group 0 (psnr), W4 A8")
    assert lines["transformer_blocks.*.ff.net.2"].endswith("yes: group 1 (sqnr), W8 A8")
    assert lines["proj_out_1"].endswith("no: method.keep")
    assert lines["transformer_blocks.*.norm1.emb.class_embedder.embedding_table"].endswith("no: no quantized form")


def test_a_pipeline_shows_its_networks_and_what_was_skipped(tmp_path, capsys) -> None:
    folder = tiny_folder("sdxl", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "Checker"], "text_encoder_2": ["transformers", "NoSuchModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    lines = lines_of(capsys, f"module.pretrained={folder}", "method=mixdq", "method.keep=nowhere")
    out = lines[""]
    assert "skipped safety_checker: stable_diffusion.Checker: " in out
    assert "skipped text_encoder_2: transformers.NoSuchModel: transformers as installed has no such class" in out
    assert "the method would refuse this network: " in out and "'nowhere'" in out
    assert "yes: group 0 (ssim), W2/4/8 A4/8/16" in lines["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    assert "no: not the denoiser" in lines["encoder.conv_in"]
    pipe = load_pipeline(str(tiny_folder("sdxl", tmp_path / "whole")), "auto", None, False)
    assert f"{count_macs(pipe.vae, torch.zeros(1, 3, 32, 32)) / 1e6:.1f} M multiplications" in lines["vae:"]


def test_a_language_model_shows_its_experts(tmp_path, capsys) -> None:
    model = tiny_model("olmoe")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    source = f"module.pretrained={tmp_path}"
    lines = lines_of(capsys, source, "method=eep", "search=eep", "method.num_experts=4")
    assert "model.layers.*.mlp × 2 of family olmoe: 8 experts of 2.3 k parameters, 2 for each token" in lines[""]
    assert lines["model.layers.*.mlp.experts"].endswith("yes, to 4")
    unused = sum(p.numel() * 6 // 8 for name, p in model.named_parameters() if ".experts." in name)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    a_token = model.num_parameters() - unused - vectors - model.model.embed_tokens.weight.numel()
    assert f"bfloat16: {model.num_parameters() / 1000:.1f} k parameters" in lines["network:"]
    assert f"{a_token / 1000:.1f} k multiplications a token" in lines["network:"]
    assert "no: a language model" in lines_of(capsys, source, "method=viditq")["lm_head"]


def test_a_dense_language_model_says_which_families_are_known(tmp_path, capsys) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    said = lines_of(capsys, f"module.pretrained={tmp_path}")["experts:"]
    assert "model_type = 'llama' is no known mixture of experts; known are mixtral" in said


def test_the_module_of_the_config_is_shown_and_nothing_written(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = lines_of(capsys, "method=viditq")
    assert "UNet2DModel of float32" in lines["network:"] and "no: method.keep" in lines["conv_in"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["module.pretrained=no/such/folder"], "module.pretrained = no/such/folder is neither a folder nor a hub id"),
        (["module.pretrained=."], "describes no network of diffusers or transformers"),
        (["--multirun", "seed=1,2"], "inspect shows one model"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(words, expected, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *words]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
