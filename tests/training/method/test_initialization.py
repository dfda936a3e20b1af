"""Where a bottleneck starts: the features of the whole vocabulary beside NumPy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_models import FAMILIES, VOCAB_SIZE, llava

from adalink.runtime.errors import ConfigError
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.method import initialization as initial
from adalink.training.method.attach import attach
from adalink.training.method.config import INITS, AdaLinkConfig
from adalink.training.method.initialization import center_features
from adalink.training.models.loading import input_embedding
from adalink.training.settings import RATES

CENTERED = AdaLinkConfig(rank=5, activation="gelu", bias=True, init="centered")
D, V, RANK = 24, 50, 7


class Scaled(torch.nn.Module):
    """A table whose rows have a scale of the module's own, as Gemma's have."""

    def __init__(self, table):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(table, dtype=torch.float32))

    def forward(self, ids):
        return self.weight[ids] * 3.0


def table_and_down(seed=3, shift=2.0):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((V, D)) + shift * rng.standard_normal(D)
    torch.manual_seed(seed)
    return table.astype(np.float32), torch.nn.Linear(D, RANK)


def by_hand(down, seen):
    """The weight that is expected, from the one that there is."""
    weight, seen = down.weight.detach().numpy().astype(np.float64), seen.astype(np.float64)
    mean = seen.mean(axis=0)
    if mean.any():
        weight = weight @ (np.eye(weight.shape[1]) - np.outer(mean, mean) / (mean @ mean))
    return weight / np.sqrt(np.mean((seen @ weight.T) ** 2))


@pytest.mark.parametrize("at_once", [1, 7, 50, 8192])
def test_features_have_no_mean_and_one_size(at_once, monkeypatch):
    monkeypatch.setattr(initial, "_TOKENS_AT_ONCE", at_once)
    table, down = table_and_down()
    expected, bias = by_hand(down, 3.0 * table), down.bias.detach().clone()
    center_features(down, Scaled(table), V)
    weight = down.weight.detach().numpy().astype(np.float64)
    np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    features = 3.0 * table.astype(np.float64) @ weight.T
    assert np.abs(features.mean(axis=0)).max() < 2e-5
    assert np.sqrt(np.mean(features**2)) == pytest.approx(1.0, rel=1e-6)
    assert np.abs(features).min(axis=0).max() > 1e-4  # each token has its own
    assert torch.equal(down.bias, bias)


def test_embeddings_without_a_mean_are_only_scaled():
    table, down = table_and_down(shift=0.0)
    table = np.concatenate([table[: V // 2], -table[: V // 2]])
    expected = by_hand(down, 3.0 * table)
    center_features(down, Scaled(table), V)
    np.testing.assert_allclose(down.weight.detach().numpy(), expected, rtol=0, atol=1e-5)


def test_tokens_that_are_all_alike_leave_it_as_it_is():
    table, down = table_and_down()
    before = down.weight.detach().clone()
    center_features(down, Scaled(np.repeat(table[:1], V, axis=0)), V)
    assert torch.equal(down.weight, before)
    center_features(down, Scaled(np.zeros_like(table)), V)
    assert torch.equal(down.weight, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_of_text_starts_centered(family):
    model = FAMILIES[family]()
    embedding = input_embedding(model.get_encoder() if model.config.is_encoder_decoder else model)
    with torch.no_grad():
        embedding.weight += 1.0
        seen = embedding(torch.arange(VOCAB_SIZE)).numpy().astype(np.float64)
    torch.manual_seed(4)
    attached = attach(model, CENTERED)
    adapter = attached.adapters["text"]
    features = seen @ adapter.down.weight.detach().numpy().astype(np.float64).T
    assert np.abs(features.mean(axis=0)).max() < 2e-5
    assert np.sqrt(np.mean(features**2)) == pytest.approx(1.0, rel=1e-5)
    assert not adapter.up.weight.any()
    assert not adapter.down.bias.any()
    attached.detach()


def test_images_and_the_seed_after_it_are_as_without():
    """Only the text's ``down`` differs, so a run of the same seed draws the same numbers afterwards."""
    drawn = {}
    for init in ("kaiming", "centered"):
        torch.manual_seed(9)
        config = AdaLinkConfig(rank=5, modalities=("text", "image"), soft_tokens=0, init=init)
        attached = attach(llava(), config)
        drawn[init] = {**attached.adapters.state_dict(), "later": torch.rand(3)}
    differ = {name for name in drawn["kaiming"] if not torch.equal(drawn["kaiming"][name], drawn["centered"][name])}
    assert differ == {"text.down.weight"}


def test_it_is_no_part_of_the_adapter(tmp_path):
    model = FAMILIES["llama"]()
    attached = attach(model, CENTERED)
    save_adapter(tmp_path / "adapter", to_adapter(attached, "tiny"))
    wanted = attached.weights()
    attached.detach()
    for name, weight in load_adapter(tmp_path / "adapter", model).weights().items():
        np.testing.assert_array_equal(weight, wanted[name])


def test_each_init_has_rates_of_its_own():
    assert tuple(RATES) == INITS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "pca"}, r"init is 'pca', expected one of kaiming, centered, gradient"),
        ({"init": "centered", "rank": 0, "soft_tokens": 3}, r"rank is 0 with init 'centered'.*leave the init out"),
        ({"init": "gradient", "rank": 0, "soft_tokens": 3}, r"rank is 0 with init 'gradient'.*leave the init out"),
        ({"init": "centered", "modalities": ("image",)}, r"init is 'centered' and the modalities are image: only tok"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaLinkConfig(**settings)


def test_config_takes_what_can_start_so():
    for init in INITS:
        assert AdaLinkConfig(init=init, modalities=("text", "image"), soft_tokens=3).init == init
    assert AdaLinkConfig(init="gradient", modalities=("image",)).init == "gradient"
