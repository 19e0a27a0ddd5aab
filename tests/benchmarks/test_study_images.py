"""The study's image model has the names and shapes of Transformers', and its characters are drawn anew each time."""

import torch
from transformers import ViTConfig, ViTModel

import study_images


def test_the_models_weights_are_those_of_transformers():
    config = ViTConfig(
        hidden_size=study_images.WIDTH,
        num_hidden_layers=study_images.LAYERS,
        num_attention_heads=study_images.HEADS,
        intermediate_size=4 * study_images.WIDTH,
        image_size=study_images.SIDE,
        patch_size=study_images.PATCH,
        num_channels=1,
    )
    with torch.device("meta"):
        model = ViTModel(config, add_pooling_layer=False)
    assert study_images.shapes() == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def test_characters_are_drawn_anew_and_again_by_seed():
    assert len(set(study_images.CHARACTERS)) == len(study_images.CHARACTERS) == 112
    assert not set(study_images.CHARACTERS) & set("0123456789")
    glyph = torch.zeros(1, study_images.DRAWN, study_images.DRAWN)
    glyph[:, 8:56, 26:38] = 1.0  # an upright bar
    drawn = study_images.altered(glyph.expand(64, -1, -1), torch.Generator().manual_seed(0))
    again = study_images.altered(glyph.expand(64, -1, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (64, study_images.SIDE, study_images.SIDE) and torch.equal(drawn, again)
    assert drawn.min() >= 0 and drawn.max() <= 1 and len(drawn.flatten(1).unique(dim=0)) == 64
    across, down = (drawn.sum(axis).gt(drawn.sum(axis).amax(1, True) / 2).sum(1).float() for axis in (1, 2))
    assert (across < down).all()  # it stays a bar, and upright


def test_a_character_learned_by_the_study_is_told_from_another(monkeypatch):
    """Two bars that lie across each other, a small model and few steps."""
    for name, value in {"WIDTH": 24, "LAYERS": 1, "CHARACTERS": "-|", "REPORTED": 40}.items():
        monkeypatch.setattr(study_images, name, value)
    glyphs = torch.zeros(2, study_images.DRAWN, study_images.DRAWN)
    glyphs[0, 26:38, 8:56] = 1.0
    glyphs[1, 8:56, 26:38] = 1.0
    lines = []
    monkeypatch.setattr("builtins.print", lambda text, **_: lines.append(text))
    weights = study_images.pretrained(glyphs, torch.tensor([0, 1]), "cpu", steps=80, batch=32, rate=5e-3)
    assert float(lines[-1].split(": ")[1].split("%")[0]) > 90, lines
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == study_images.shapes()
