import contextlib
import inspect
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class

from repalign.encoders.cards import read_card, read_cards
from repalign.encoders.vit import ViTEncoder
from repalign.encoders.weights import FAMILIES
from repalign.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "encoder"
WITHOUT_CLASS_TOKEN = ("jepa", "siglip")


@pytest.mark.parametrize("name", read_cards())
def test_every_card_builds_in_full_size_and_keeps_its_spec(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none on meta
    card = read_card(name)
    with torch.device("meta"):
        encoder = ViTEncoder(name, 256, "random")
        tokens = encoder(torch.empty(2, 3, 256, 256))
    assert (encoder.spec.dim, encoder.spec.grid, encoder.spec.prefix) == (card.dim, (16, 16), 0)
    assert encoder.preprocess.size == 16 * card.patch
    assert tokens.data.shape == (2, 256, card.dim)
    assert bool(encoder.network.num_prefix_tokens) == (card.family not in WITHOUT_CLASS_TOKEN)


@pytest.mark.parametrize("card", read_cards().values(), ids=lambda card: card.name)
def test_every_card_says_where_its_weights_are_and_has_a_reader(card):
    assert card.family in FAMILIES
    assert card.hub or card.url or card.source
    assert card.licence


def test_an_unknown_card_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"encoder\.card: unknown encoder 'dinov2_bb'\. Did you mean 'dinov2_b'\?"):
        read_card("dinov2_bb")


@pytest.mark.parametrize("name", [*read_cards(), "lite0"])
def test_every_encoder_has_a_configuration_with_known_keys(name):
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# @package encoders.main\n")
    node = yaml.safe_load(text)
    accepted = inspect.signature(get_class(node.pop("_target_"))).parameters
    assert set(node) <= set(accepted)
    assert node.get("card", name) == name
