"""Next tokens by temperature, nucleus and stop tokens, against transformers and by counting."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moenas.model.architecture import Architecture, Model
from moenas.model.decoding import TokenSampler, next_token_scores


def logits(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_scores_are_those_of_transformers(temperature: float, top_p: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    wanted = process.TemperatureLogitsWarper(temperature)(None, logits())
    if top_p < 1:
        wanted = process.TopPLogitsWarper(top_p)(None, wanted)
    torch.testing.assert_close(next_token_scores(logits(), temperature, top_p), wanted)


def test_draws_follow_the_softmax() -> None:
    one = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = TokenSampler(one.device, 0.7, 1.0, seed=1)
    n = 20_000
    counts = Counter(sampler.next_tokens(one.expand(n, -1)).flatten().tolist())
    for token, chance in enumerate((one / 0.7).softmax(-1)[0].tolist()):
        deviation = (chance * (1 - chance) / n) ** 0.5
        assert abs(counts[token] / n - chance) < 4 * deviation


def model() -> Model:
    mixer = {"kind": "attention", "head_dim": 8}
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 16}
    block = {"mixer": mixer, "ffn": ffn}
    return Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": [block]}).build(seed=3)


def prompt() -> torch.Tensor:
    return torch.arange(12).view(3, 4)


def test_a_draw_is_made_from_the_logits_of_all_tokens_before() -> None:
    """The draws of a stream with a cache equal the draws of passes over the whole sequence."""
    net = model().eval()
    for tensor in net.parameters():
        tensor.data.mul_(4)
    sampler = TokenSampler(torch.device("cpu"), 0.8, 0.9, seed=5)
    tokens = prompt()
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat((tokens, sampler.next_tokens(net(tokens)[:, -1])), dim=1)
    made = net.generate(prompt(), 8, temperature=0.8, top_p=0.9, seed=5)
    assert torch.equal(made, tokens)
    assert torch.equal(net.generate(prompt(), 8, temperature=0.8, top_p=0.9, seed=5), made)
    assert not torch.equal(net.generate(prompt(), 8, temperature=0.8, top_p=0.9, seed=6), made)


def test_a_tiny_nucleus_is_the_most_likely_token() -> None:
    net = model()
    drawn = net.generate(prompt(), 8, temperature=1.0, top_p=1e-6)
    assert torch.equal(drawn, net.generate(prompt(), 8))


def test_stop_tokens_end_each_sequence_and_the_stream() -> None:
    net = model()
    free = net.generate(prompt(), 12, temperature=1.0, seed=2)
    stop = [int(free[0, 6]), int(free[1, 5]), int(free[2, 8])]
    made = net.generate(prompt(), 12, temperature=1.0, seed=2, stop=stop)
    ends = []
    for row, unstopped in zip(made[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = next(i for i, token in enumerate(unstopped) if token in stop)
        assert row[: end + 1] == unstopped[: end + 1]
        assert set(row[end:]) == {row[end]}
        ends.append(end)
    assert made.shape[1] == 4 + max(ends) + 1
    assert max(ends) < 11


def test_a_stream_gives_each_token_before_the_next_is_computed() -> None:
    net, passes = model().train(), []
    net.head.register_forward_hook(lambda *_: passes.append(1))
    stream = net.stream(prompt(), 5)
    assert passes == []
    first = next(stream)
    assert (first.shape, len(passes), net.training) == ((3, 1), 1, False)
    stream.close()
    assert net.training
    whole = torch.cat(list(net.stream(prompt(), 5)), dim=1)
    assert torch.equal(whole, net.generate(prompt(), 5)[:, 4:])
    assert torch.equal(whole[:, :1], first)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -0.1}, "temperature is at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature is at least 0"),
        ({"top_p": 0.0}, "top_p is a probability above 0, not 0.0"),
        ({"top_p": 1.1}, "top_p is a probability above 0, not 1.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        model().stream(prompt(), 3, **options)
