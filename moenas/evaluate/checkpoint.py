"""Checkpoints of a training run: saved between two points of its curve, and restored later.

A checkpoint is a safetensors file, so that reading one runs no code. It holds the weights and
buffers of the model and of its heads for further tokens. It holds the moments and step counts of
the optimizer, and the state of the generators that training uses. It holds the expert loads that
the collapse detector has added up. The routing meter is empty between two points. The size is about
12 bytes a parameter.

On a CPU a restored run gives the weights of an uninterrupted one to the last bit. State of a user's
module outside of its parameters and buffers is not saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moenas.errors import CandidateError
from moenas.evaluate.training import TrainingRun

MODEL, FIRST, SECOND, STEPS = "model.", "moment1.", "moment2.", "steps."
"""Beginnings of names: of weights and buffers, and of a parameter's moments and step count."""
LOAD = "collapse.load."
"""Beginning of the name of the expert loads of a layer, which ends with its number."""
RUN, ROWS, CPU, CUDA = "run", "collapse.rows", "generator.cpu", "generator.cuda"


def save(run: TrainingRun) -> dict[str, Tensor]:
    """Return the state of a run between two points of its curve, on the CPU."""
    device = next(run.model.parameters()).device
    optimizer, steps = run.steps.optimizer, run.steps
    trainee = steps.trainee
    tensors = {MODEL + name: value for name, value in trainee.state_dict().items()}
    for name, weight in trainee.named_parameters():
        if weight in optimizer.moments:
            tensors[FIRST + name], tensors[SECOND + name] = optimizer.moments[weight]
            tensors[STEPS + name] = optimizer.steps[weight]
    tensors |= {f"{LOAD}{layer}": load for layer, load in run.collapse.loads.items()}
    tensors[ROWS] = torch.tensor(run.collapse.rows)
    tensors[RUN] = torch.tensor([steps.done, steps.last_loss, run.seconds], dtype=torch.float64)
    tensors[CPU] = torch.get_rng_state()
    if device.type == "cuda":
        tensors[CUDA] = torch.cuda.get_rng_state(device)
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


@torch.no_grad()
def restore(run: TrainingRun, state: Mapping[str, Tensor]) -> None:
    """Give a run that has taken no step the state that `save` returned.

    Raises:
        CandidateError: if the state does not belong to a run of this architecture.
    """
    device = next(run.model.parameters()).device
    optimizer, trainee = run.steps.optimizer, run.steps.trainee
    try:
        weights = {n.removeprefix(MODEL): v for n, v in state.items() if n.startswith(MODEL)}
        trainee.load_state_dict(weights)
        for name, weight in trainee.named_parameters():
            if weight in optimizer.moments:
                first, second = optimizer.moments[weight]
                first.copy_(state[FIRST + name])
                second.copy_(state[SECOND + name])
                optimizer.steps[weight].copy_(state[STEPS + name])
        done, last_loss, run.seconds = state[RUN].tolist()
        run.collapse.rows = int(state[ROWS])
        generator = state[CPU]
    except (KeyError, RuntimeError) as error:
        raise CandidateError(f"the checkpoint is not one of this candidate: {error}") from error
    loads = {n.removeprefix(LOAD): v for n, v in state.items() if n.startswith(LOAD)}
    run.collapse.loads = {int(layer): load for layer, load in loads.items()}
    run.steps.resume(int(done), last_loss)
    torch.set_rng_state(generator)
    if device.type == "cuda" and CUDA in state:
        torch.cuda.set_rng_state(state[CUDA], device)
