"""Captioned pictures, the small CLIP, species, and concepts of which it is known which are wrong."""

import pytest
import torch
from battery import seeded

from lowrank_ref.lab.beds import SpeciesWorld, species_world
from lowrank_ref.lab.beds.species import (
    FIRST,
    WORDS,
    CaptionedShapes,
    PictureCaptionEncoder,
    clip_loss,
    concept_words,
    join_words,
    name_words,
    render,
    rival_species,
    template_words,
    train_encoder,
    with_name,
)

SPECIES = torch.tensor([[s, (s + i) % 5, i] for s in range(4) for i in range(3)])


def colours(bags):
    return bags[..., FIRST[1] : FIRST[2]]


def textures(bags):
    return bags[..., FIRST[2] : FIRST[3]]


def test_pictures_repeat_lie_in_range_and_show_their_attributes():
    rows = torch.zeros(40, 6, dtype=torch.long)
    rows[:, 1] = 2
    x = render(rows, generator=seeded())
    assert x.shape == (40, 3, 16, 16) and float(x.min()) >= 0 and float(x.max()) <= 1
    assert torch.equal(x, render(rows, generator=seeded()))
    assert bool((x[:, 2].amax(dim=(1, 2)) > x[:, 0].amax(dim=(1, 2)) + 0.2).all())  # blue
    for column in (3, 4):  # a large shape, a light background
        other = rows.clone()
        other[:, column] = 1
        assert float(render(other, generator=seeded())[:, 2].mean()) > float(x[:, 2].mean()) + 0.01
    other = rows.clone()
    other[:, 5] = 1
    left, right = (p[:, 2, :, :8].mean() - p[:, 2, :, 8:].mean() for p in (x, render(other, generator=seeded())))
    assert left > 0 > right
    for shape in range(1, 4):
        other = rows.clone()
        other[:, 0] = shape
        assert float((render(other, generator=seeded()) - x).abs().mean()) > 0.005


def test_captions_name_one_to_three_words_of_the_picture():
    data = CaptionedShapes.draw(300, generator=seeded())
    bags = data.captions(torch.arange(300), generator=seeded(1))
    assert set(bags.sum(1).tolist()) == {1.0, 2.0, 3.0}
    true = torch.zeros(300, len(WORDS)).scatter_(1, data.attributes + torch.tensor(FIRST), 1.0)
    assert bool((bags <= true).all()) and bool((bags.sum(0) > 0).all())


def test_the_loss_is_that_of_a_loop():
    v, t = torch.randn(2, 5, 4, generator=seeded(), dtype=torch.float64)
    logits = 3 * v @ t.T
    wanted = sum(-logits[i].log_softmax(0)[i] - logits[:, i].log_softmax(0)[i] for i in range(5)) / 10
    torch.testing.assert_close(clip_loss(v, t, torch.tensor(3.0).double()), wanted)


def test_training_brings_captions_to_their_pictures_and_freezes():
    g = seeded()
    data = CaptionedShapes.draw(400, generator=g)
    before = PictureCaptionEncoder(generator=seeded(3))
    model = train_encoder(PictureCaptionEncoder(generator=seeded(3)), data, steps=40, batch=64, generator=g)
    bags, rows = data.captions(torch.arange(64), generator=seeded(4)), data.x[:64]
    with torch.no_grad():
        losses = [
            clip_loss(m.encode_image(rows), m.encode_text(bags), torch.tensor(14.0)).item() for m in (before, model)
        ]
    assert losses[1] < losses[0] - 0.2
    assert not any(p.requires_grad for p in model.parameters())


def test_rivals_share_the_name_and_go_round():
    rivals = rival_species(SPECIES)
    assert bool((SPECIES[rivals, 0] == SPECIES[:, 0]).all()) and bool((rivals != torch.arange(12)).all())
    assert sorted(rivals.tolist()) == list(range(12))


def test_right_concepts_hold_only_words_of_the_species():
    bags = concept_words(SPECIES, 200, generator=seeded())
    said = torch.zeros(12, len(WORDS))
    said.scatter_(1, (SPECIES + torch.tensor(FIRST[:3]))[:, 1:], 1.0)
    assert bool((bags[..., : FIRST[3]] <= said[:, None, : FIRST[3]]).all())
    assert bool((bags[..., FIRST[1] : FIRST[3]].sum(-1) >= 1).all())
    extra = bags[..., FIRST[3] :].sum(-1)
    assert set(extra.unique().tolist()) == {0.0, 1.0} and float(extra.mean()) == pytest.approx(0.3, abs=0.03)


def test_stray_concepts_have_a_wrong_colour_and_rival_ones_are_right_for_the_rival():
    stray = concept_words(SPECIES, 300, wrong=1.0, generator=seeded())
    assert bool((colours(stray).sum(-1) == 1).all())
    own = colours(stray).gather(2, SPECIES[:, 1, None, None].expand(12, 300, 1))
    assert not own.any()
    both = textures(stray).sum(-1)
    assert float(both.mean()) == pytest.approx(0.5, abs=0.03)
    assert not textures(stray).gather(2, SPECIES[:, 2, None, None].expand(12, 300, 1)).any()
    rival = concept_words(SPECIES, 300, wrong=1.0, kind="rival", generator=seeded())
    right = concept_words(SPECIES[rival_species(SPECIES)], 300, generator=seeded())
    assert torch.equal(rival, right)
    some = concept_words(SPECIES, 2000, wrong=0.4, generator=seeded())
    right = colours(some).gather(2, SPECIES[:, 1, None, None].expand(12, 2000, 1))[..., 0]
    share = (colours(some).sum(-1) > 0) & (right == 0)
    assert float(share.float().mean()) == pytest.approx(0.4, abs=0.02)


def test_contrasted_concepts_name_what_differs():
    species = torch.tensor([[0, 1, 1], [0, 1, 2], [1, 2, 0], [1, 3, 0], [2, 0, 0], [2, 1, 1]])
    bags = concept_words(species, 100, contrast=True, generator=seeded())
    assert not colours(bags)[:2].any() and bool((textures(bags)[:2].sum(-1) == 1).all())
    assert not textures(bags)[2:4].any() and bool((colours(bags)[2:4].sum(-1) == 1).all())
    assert float(colours(bags)[4:].mean()) > 0 and float(textures(bags)[4:].mean()) > 0


def test_prompts_names_and_phrases():
    names = name_words(SPECIES)
    assert torch.equal(names.argmax(1), SPECIES[:, 0]) and bool((names.sum(1) == 1).all())
    templates = template_words(SPECIES)
    assert templates.shape == (12, 27, len(WORDS)) and torch.equal(templates[:, 0], names)
    assert not templates[..., FIRST[1] : FIRST[3]].any() and len(templates[0].unique(dim=0)) == 27
    pool = concept_words(SPECIES, 6, generator=seeded())
    phrases = torch.randint(6, (12, 4, 3), generator=seeded())
    joined = with_name(join_words(pool, phrases), SPECIES)
    assert torch.equal(joined[2, 1], names[2] + sum(pool[2, j] for j in phrases[2, 1]))


def test_a_world_repeats_and_its_species_are_all_different():
    world = species_world(3, pictures=200, steps=2)
    again = species_world(3, pictures=200, steps=2)
    assert isinstance(world, SpeciesWorld) and torch.equal(world.species, again.species)
    every = torch.cat([world.species, world.others])
    assert len(every.unique(dim=0)) == 24
    assert all(int((part[:, 0] == s).sum()) == 3 for part in (world.species, world.others) for s in range(4))
    V, y = world.pictures(50, generator=seeded())
    W, _ = again.pictures(50, generator=seeded())
    assert torch.equal(V, W) and V.shape == (50, 32) and set(y.tolist()) <= set(range(12))
    assert not torch.equal(world.pictures(50, species=world.others, generator=seeded())[0], V)
    T = world.texts(name_words(world.species))
    torch.testing.assert_close(T.norm(dim=1), torch.ones(12))
    assert 0 < world.scale <= 100


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: render(torch.zeros(1, 6, dtype=torch.long), side=0), "side"),
        (lambda: concept_words(SPECIES, 0), "count"),
        (lambda: concept_words(SPECIES, 5, wrong=1.5), "wrong"),
        (lambda: concept_words(SPECIES, 5, kind="lies"), "kind"),
        (lambda: species_world(-1), "seed"),
        (lambda: species_world(0, pictures=0), "pictures"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call()
