"""What a person should know of the checkpoints that are combined: said at the start, and in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genlight.checkpoints.lora import LoraMixer
from genlight.checkpoints.mixing import WeightMixer
from genlight.loops.few_samples import few_samples
from genlight.metrics.generative import GenerativeMetrics

if TYPE_CHECKING:
    from genlight.loops.checkpoint_work import CheckpointWork, Variant

_ON_A_LINE = 1.1


def remarks_before(work: CheckpointWork) -> list[str]:
    """What is known before the search."""
    trajectory, live = work.space.trajectory, work.module.live_weights()
    held = set(trajectory.names)
    others = [name for name, weight in live.items() if weight.requires_grad and name not in held]
    remarks = [f"left out of the search: {reason}" for reason in getattr(trajectory, "damaged", ())]
    if others:
        remarks.append(
            f"the checkpoints lack {len(others)} of {len(live)} parameters ({others[0]}, …), which stay as ckpt_path "
            "or module.pretrained has them: where a training averaged its weights (callbacks.ema) they are the "
            "average, among parts of single checkpoints"
        )
    norms = [name for name, _ in work.module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if stale := [name for name in norms if f"{name.rpartition('.')[0]}.weight" in held]:
        remarks.append(
            f"{len(stale)} running statistics of norms ({stale[0]}, …) are not mixed: they stay as ckpt_path or "
            "module.pretrained has them. Recompute them for the artifact (torch.optim.swa_utils.update_bn)"
        )
    metrics, method = getattr(work.module, "metrics", None), work.method
    if isinstance(metrics, GenerativeMetrics) and method.objective == f"val/{metrics.name_of('fd')}":
        remarks += few_samples(metrics, method.settings.fidelity, "search.fidelity")
    return remarks


def remarks_after(work: CheckpointWork, winner: Variant) -> list[str]:
    """What is known with the winner of the searches, which is written into the module."""
    work.apply(winner.weights)
    mixer = work.space.mixer(work.module)
    if isinstance(mixer, LoraMixer) and mixer.truncation:
        worst = max(mixer.truncation, key=lambda name: mixer.truncation[name])
        return [
            f"of {winner.name} the adapters' rank holds all but {100 * mixer.truncation[worst]:.2g} % of each layer's "
            f"change, where it is most ({worst})"
        ]
    if not isinstance(mixer, WeightMixer):
        return []
    rank, size = mixer.effective_rank(), mixer.coordinates.size
    line = ": they nearly lie on a line, as they do where the learning rate has fallen to nothing" * (rank < _ON_A_LINE)
    return [f"the differences of the {size + 1} basis vectors have an effective rank of {rank:.3g} of {size}{line}"]
