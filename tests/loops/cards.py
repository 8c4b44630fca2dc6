"""Every artifact that a test of a method leaves has a model card."""

from pathlib import Path

from huggingface_hub import ModelCard

# what a method calls its result before, or what it is compared with, beside what it is now
_BEFORE = (
    "_last", "_best_other", "_teacher", "_full_precision", "_best_single", "_hand_made", "_full", "_plain",
    # DELE: other predictors, and a search without one
    "_vanilla", "_tokens_gp", "regret_random",
)  # fmt: skip


def check_card(artifact: Path) -> ModelCard:
    """A card that the hub can read: what it came from, how it was made and is loaded, what was measured."""
    card = ModelCard.load(artifact / "README.md")
    for part in ("- Base model: ", "- Method: ", "- Licence", "## Load", "## Command", "python -m genlight validate"):
        assert part in card.text, f"{artifact}: {part}"
    assert "## Before and after" in card.text and card.data.library_name in ("diffusers", "transformers", "genlight")
    names = [result.metric_type for result in card.data.eval_results or []]
    assert any(part in name for name in names for part in _BEFORE), f"{artifact}: only {names}"
    return card
