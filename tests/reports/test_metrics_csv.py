from pathlib import Path

from genlight.reports.metrics_csv import merge_metrics


def test_a_resumed_part_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    first, second, empty = (tmp_path / f"{n}.csv" for n in range(3))
    first.write_text("epoch,step,train/loss\n0,9,1.0\n0,19,0.5\n0,29,0.4\n")
    second.write_text("epoch,step,train/loss,val/x\n0,19,0.6,\n0,24,,7\n")
    empty.write_text("")
    assert merge_metrics([first, empty, second], tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_text() == "epoch,step,train/loss,val/x\n0,9,1.0,\n0,19,0.6,\n0,24,,7\n"
    second.write_text("step,val/x\n19,7\n")  # went on with the validation after a step
    assert merge_metrics([first, second], tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_text() == "epoch,step,train/loss,val/x\n0,9,1.0,\n0,19,0.5,\n,19,,7\n"
    assert not merge_metrics([empty], tmp_path / "none.csv") and not (tmp_path / "none.csv").exists()
