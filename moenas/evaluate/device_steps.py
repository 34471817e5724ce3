"""Training steps that read nothing on the host, captured in a CUDA graph where that is possible.

What a step needs lies on the device: the tokens of the next steps, the learning rates, the number
of the step. What a step gives is added up there, and read once for a row of the learning curve.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn

from moenas.evaluate.cuda_graphs import CaptureError, capture, side_stream
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.optimizer import schedule
from moenas.evaluate.steps import ROWS, Gate, Sums, TrainingInputs, diverged, out_of_time

# Shapes: B sequences of S tokens, n steps.

WARM_UP = 3
"""Steps before a capture: kernels are loaded and the allocator has its blocks."""
WORTH = 32
"""Steps from which on a capture pays for itself."""
HOLD_S = 0.25
"""Seconds for which a device is held for steps: what one who measures a latency waits at most."""

_log = logging.getLogger(__name__)


class DeviceSteps:
    """The steps of one training run, on the device of the model.

    The numbers equal the numbers of `HostSteps`, up to the order of sums. AdamW's own kernel
    divides the gradients by the clipping factor, and skips a step whose gradient is not finite.
    """

    def __init__(self, inputs: TrainingInputs) -> None:
        recipe = inputs.recipe
        assert recipe.lr is not None
        self.trainee = inputs.trainee
        self.corpus, self.recipe, self.seed = inputs.corpus, recipe, inputs.seed
        self.device = device = inputs.device
        self.dtype = training_dtype(recipe, device)
        # A graph is captured on the stream that its warm-up ran on: autograd keeps the stream of
        # the first use with each parameter.
        real = device.type == "cuda" and torch.cuda.is_available()
        self._stream = side_stream(device) if real else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loaded = 0, 0
        self.done = 0
        """Steps that were taken, those before a checkpoint included."""
        self._first = 0
        """Steps that were taken before the checkpoint that the run continues from."""
        self.capture_fault: str | None = None
        """Why there is no graph, if a capture was tried."""
        self._tried, self._group, self.last_loss = False, 1, math.nan
        with self._on_stream():
            self.optimizer, self.meter = inputs.build_optimizer(), inputs.build_meter()
            rates = [recipe.lr * schedule(step, recipe) for step in range(recipe.steps)]
            self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
            self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the step
            self._row = torch.zeros(1, dtype=torch.int64, device=device)  # its place in _crops
            self._crops = torch.empty(0, device=device)  # (n, B, S + 1)
            self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, last norm
            # The first step with a loss, and with a gradient, that is not finite.
            self._bad = torch.full((2,), recipe.steps, dtype=torch.int64, device=device)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a graph."""
        return self._graph is not None

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def resume(self, done: int, last_loss: float) -> None:
        """See `Steps.resume`."""
        self.done = self._first = done
        self.last_loss = last_loss
        with self._on_stream():
            self._at.fill_(done)

    def load(self, first: int, last: int) -> None:
        """Put the tokens of steps `first` to `last` - 1 on the device, in one copy."""
        recipe = self.recipe
        steps = range(first, last)
        crops = self.corpus.crops(steps, recipe.batch, recipe.context, self.seed)
        with self._on_stream():
            tokens = torch.from_numpy(crops)
            if len(tokens) > len(self._crops):
                # A graph reads its tokens where they lay when it was captured: there is room for
                # the longest row from the first on.
                assert not self.captured, "more steps at once than a row of the curve has"
                room = max(len(tokens), 1 + recipe.steps // ROWS)
                self._crops = tokens.new_empty((room, *tokens.shape[1:]), device=self.device)
            self._crops[: len(tokens)].copy_(tokens)
            self._row.zero_()
        self._loaded = first, last

    def step(self, *, with_domains: bool = False) -> None:
        """Take the next step; nothing waits for the device.

        With `with_domains` the meter counts the domains of the tokens, and the step is not replayed
        from a graph.
        """
        first, last = self._loaded
        assert first <= self.done < last, "the tokens of this step are not loaded"
        with self._on_stream():
            if self._graph is None or with_domains:
                self._body(self._domains() if with_domains else None)
            else:
                self._graph.replay()
        self.done += 1

    def _domains(self) -> Tensor | None:
        recipe = self.recipe
        return self.corpus.batch_domains(self.done, recipe.batch, recipe.context, self.seed)

    def _body(self, where: Tensor | None = None) -> None:
        """Do one step; `where` (B, S) is the domain of each token."""
        recipe, trainee = self.recipe, self.trainee
        crops = self._crops.index_select(0, self._row).squeeze(0).long()
        tokens, targets = crops.narrow(1, 0, recipe.context), crops.narrow(1, 1, recipe.context)
        tokens, targets = tokens.contiguous(), targets.contiguous()
        trainee.zero_grad()
        loss, trained = trainee.losses(tokens, targets, self.dtype)
        trained.backward()
        with torch.no_grad():
            gradients = [p.grad for p in trainee.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            scale = None
            if recipe.grad_clip > 0:
                scale = ((norm.float() + 1e-6) / recipe.grad_clip).clamp_min(1.0)
            skip = (~norm.isfinite()).float()
            rate = self._rates.index_select(0, self._at).squeeze(0)
            self.optimizer.step(rate, scale, skip)
            trainee.after_step()
            self.meter.add(where)
            self._sums[0] += loss.double()
            self._sums[1].copy_(norm)
            finite = torch.stack((loss.isfinite(), norm.isfinite()))
            torch.minimum(self._bad, self._bad.where(finite, self._at), out=self._bad)
            self._at += 1
            self._row += 1

    def capture(self) -> bool:
        """Capture a step in a CUDA graph, which later steps replay; return whether there is one.

        Takes no step itself. If the capture fails, the run goes on without.
        """
        if self._stream is None or not self.trainee.capturable(self.dtype, self.device):
            return False
        assert self.done - self._first >= WARM_UP, "a capture needs steps before it"
        self.trainee.zero_grad()
        try:
            self._graph = capture(self._body, self.device)
        except CaptureError as error:
            self.capture_fault = str(error)
            _log.warning("training goes on without a CUDA graph: %s", self.capture_fault)
            self.trainee.zero_grad()
            return False
        return True

    def read(self) -> Sums:
        """Wait for the device and return what the steps since the last reading gave.

        Raises:
            DivergedError: naming the first step whose loss or gradient was not finite.
        """
        recipe = self.recipe
        with self._on_stream():
            loss, norm, *bad = torch.cat((self._sums, self._bad.double())).tolist()
            self._sums[0].zero_()
        first = int(min(bad))
        if first < recipe.steps:
            rate = (recipe.lr or 0.0) * schedule(first, recipe)
            loss_is_bad = int(bad[0]) == first
            raise diverged(
                loss=loss_is_bad, step=first, rate=rate, recipe=recipe, last=self.last_loss
            )
        return Sums(loss, norm)

    def advance(
        self, until: int, gate: Gate | None, deadline: float | None, *, with_domains: bool = False
    ) -> Sums:
        """See `Steps.advance`; others may have the device between groups of steps."""
        recipe, first, began = self.recipe, self.done, time.monotonic()
        counts = with_domains and bool(self.corpus.domain_names and self.meter.layers)
        if counts:
            self._drop_graph()  # these steps are eager, and need its memory
        self.load(first, until)
        while self.done < until:
            if deadline is not None and time.monotonic() > deadline:
                raise out_of_time(self.done, recipe)
            with gate.shared() if gate else nullcontext():
                for _ in range(min(self._group, until - self.done)):
                    self.step(with_domains=counts)
                taken = self.done - self._first
                if not (self._tried or counts) and taken >= WARM_UP and recipe.steps >= WORTH:
                    self._tried = True
                    self.capture()
        sums = self.read()
        self.last_loss = sums.loss / (until - first)
        self._group = max(1, int(HOLD_S * (until - first) / (time.monotonic() - began)))
        return sums

    def _drop_graph(self) -> None:
        """Free the graph, and the gradients, which lie in its memory."""
        if self._stream is not None:
            self._stream.synchronize()
        self.trainee.zero_grad()
        if self._graph is not None:
            self._graph = None
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free gradients and the graph, whose memory they share."""
        with suppress(RuntimeError):  # a device that is lost has said so before
            self._drop_graph()
