"""Pictures with captions, a small CLIP that learns them, and species that it has to recognise by description.

A species is a shape, a colour and a texture; its name says the shape only, which three species share. What a language
model would write about them is written by a rule, so that it is known which concepts are wrong:

    world = species_world(seed)                              # trains the encoders in a few seconds
    pool = concept_words(world.species, 50, wrong=0.4, kind="stray", generator=g)
    T = world.texts(with_name(pool, world.species))          # (12, 50, 32), unit length
    V = world.pictures(2000, generator=g)                    # features (2000, 32) and labels

In the place of CLIP stands a dual encoder of 0.06 million weights, trained with CLIP's loss (2103.00020) on 6,000
pictures of 16x16 pixels with captions of one to three words.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_number

__all__ = [
    "ATTRIBUTES",
    "WORDS",
    "CaptionedShapes",
    "PictureCaptionEncoder",
    "SpeciesWorld",
    "clip_loss",
    "concept_words",
    "join_words",
    "name_words",
    "render",
    "rival_species",
    "species_world",
    "template_words",
    "train_encoder",
    "with_name",
]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("disc", "square", "triangle", "cross"),
    "colour": ("red", "green", "blue", "yellow", "pink"),
    "texture": ("plain", "striped", "dotted"),
    "size": ("small", "large"),
    "background": ("dark", "light"),
    "side": ("left", "right"),
}
WORDS: tuple[str, ...] = tuple(word for words in ATTRIBUTES.values() for word in words)
COUNTS = tuple(len(words) for words in ATTRIBUTES.values())
FIRST = tuple(sum(COUNTS[:i]) for i in range(len(COUNTS)))
COLOURS = ((0.9, 0.15, 0.1), (0.1, 0.7, 0.2), (0.15, 0.3, 0.95), (0.95, 0.85, 0.1), (0.95, 0.45, 0.75))
KINDS = ("stray", "rival")


def render(
    attributes: Int64[Tensor, "n 6"], *, side: int = 16, generator: torch.Generator | None = None
) -> Float[Tensor, "n 3 side side"]:
    """Draw pictures in [0, 1] with these attributes, in the order of `ATTRIBUTES`; place, size and light vary a little.

    Args:
        attributes: a number for each attribute, such as colour 2, blue.
        side: of the picture in pixels.
        generator: draws what varies.

    Raises:
        TypeError, ValueError: side is no integer >= 1.
    """
    check_integer("side", side, low=1)
    n = len(attributes)
    u = torch.rand(n, 4, generator=generator)
    noise = torch.randn(n, 3, side, side, generator=generator)
    shape, colour, texture, size, ground, place = (a.view(-1, 1, 1) for a in attributes.unbind(1))
    grid = (torch.arange(side) + 0.5) / side
    x = grid[None, None, :] - (0.36 + 0.28 * place + 0.06 * (u[:, 0, None, None] - 0.5))
    y = grid[None, :, None] - (0.5 + 0.1 * (u[:, 1, None, None] - 0.5))
    r = 0.25 + 0.1 * size + 0.03 * u[:, 2, None, None]
    outlines = (
        (x**2 + y**2).sqrt() - r,
        torch.maximum(x.abs(), y.abs()) - 0.88 * r,
        torch.maximum(y - 0.75 * r, 0.87 * x.abs() - 0.5 * y - 0.6 * r),
        torch.minimum(torch.maximum(x.abs() - r, y.abs() - 0.36 * r), torch.maximum(y.abs() - r, x.abs() - 0.36 * r)),
    )
    distance = torch.stack([(shape == i) * outline for i, outline in enumerate(outlines)]).sum(dim=0)
    inside = torch.sigmoid(-3 * side * distance)
    phase = 2 * math.pi * u[:, 3, None, None]
    stripes = torch.sin(2 * math.pi * 4 * y + phase) > 0
    dots = (torch.sin(2 * math.pi * 4 * x + phase) > 0) & (torch.sin(2 * math.pi * 4 * y + phase) > 0)
    dark = ((texture == 1) & stripes) | ((texture == 2) & dots)
    paint = torch.tensor(COLOURS)[colour.flatten()][:, :, None, None] * torch.where(dark, 0.25, 1.0)[:, None]
    behind = (0.1 + 0.55 * ground)[:, None]
    picture = behind + inside[:, None] * (paint - behind)
    return (picture + 0.06 * noise).clamp(0, 1)


class PictureCaptionEncoder(nn.Module):
    """A convolutional tower for pictures and a bag-of-words tower for texts, both into unit vectors of `dim` numbers.

    Args:
        dim: length of the features.
        words: size of the vocabulary.
        generator: draws the weights, uniformly within 1/sqrt(inputs).
    """

    def __init__(self, dim: int = 32, words: int = len(WORDS), *, generator: torch.Generator | None = None):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 5, stride=2, padding=2)
        self.image = nn.ModuleList([nn.Linear(24 * 16, 128), nn.Linear(128, dim)])
        self.words = nn.Linear(words, 48, bias=False)
        self.text = nn.ModuleList([nn.Linear(48, 64), nn.Linear(64, dim)])
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        with torch.no_grad():
            for layer in (self.conv, *self.image, self.words, *self.text):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                for p in layer.parameters():
                    p.uniform_(-bound, bound, generator=generator)

    def encode_image(self, x: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n dim"]:
        """Return unit features of pictures of 16x16 pixels."""
        h = F.max_pool2d(F.relu(self.conv(x - 0.5)), 2).flatten(1)
        return F.normalize(self.image[1](F.relu(self.image[0](h))), dim=1)

    def encode_text(self, bags: Float[Tensor, "*batch words"]) -> Float[Tensor, "*batch dim"]:
        """Return unit features of texts, each a count of every word."""
        h = 4 * self.words(bags / bags.sum(dim=-1, keepdim=True))
        return F.normalize(self.text[1](F.relu(self.text[0](h))), dim=-1)


def clip_loss(v: Float[Tensor, "n dim"], t: Float[Tensor, "n dim"], scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return CLIP's loss: the mean cross-entropy of finding each picture's text, and each text's picture."""
    logits = scale * v @ t.T
    own = torch.arange(len(v), device=v.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@dataclass(frozen=True)
class CaptionedShapes:
    """Pictures, and their attributes, of which a caption names one to three."""

    x: Float[Tensor, "n 3 side side"]
    attributes: Int64[Tensor, "n 6"]

    @classmethod
    def draw(cls, count: int, *, generator: torch.Generator | None = None) -> "CaptionedShapes":
        """Draw pictures with random attributes."""
        attributes = torch.stack([torch.randint(c, (count,), generator=generator) for c in COUNTS], dim=1)
        return cls(render(attributes, generator=generator), attributes)

    def captions(self, rows: Int64[Tensor, " k"], *, generator: torch.Generator | None = None) -> Tensor:
        """Return new captions of these pictures as bags (k, words): one to three of their words, drawn anew."""
        order = torch.rand(len(rows), 6, generator=generator).argsort(dim=1)
        length = torch.randint(1, 4, (len(rows), 1), generator=generator)
        said = order.argsort(dim=1) < length
        places = self.attributes[rows] + torch.tensor(FIRST)
        return torch.zeros(len(rows), len(WORDS)).scatter_(1, places, said.float())


def train_encoder(
    model: PictureCaptionEncoder,
    data: CaptionedShapes,
    *,
    steps: int = 400,
    batch: int = 200,
    lr: float = 3e-3,
    generator: torch.Generator | None = None,
) -> PictureCaptionEncoder:
    """Train with Adam and CLIP's loss; the rate falls along a half cosine to 0, the scale stays <= 100."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(data.x), (batch,), generator=generator)
        v, t = model.encode_image(data.x[rows]), model.encode_text(data.captions(rows, generator=generator))
        optimizer.zero_grad()
        clip_loss(v, t, model.log_scale.exp().clamp_max(100.0)).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def rival_species(species: Int64[Tensor, "k 3"]) -> Int64[Tensor, " k"]:
    """Return for each species the next one of the same name, in a circle: whom its description may be mistaken for."""
    k = len(species)
    after = (torch.arange(k)[:, None] + torch.arange(1, k + 1)) % k
    same = species[after][:, :, 0] == species[:, None, 0]
    return after.gather(1, same.float().argmax(dim=1, keepdim=True)).squeeze(1)


def name_words(species: Int64[Tensor, "k 3"]) -> Float[Tensor, "k words"]:
    """Return the bag of each species' name: its shape."""
    return F.one_hot(species[:, 0], len(WORDS)).float()


def with_name(concepts: Float[Tensor, "k *m words"], species: Int64[Tensor, "k 3"]) -> Float[Tensor, "k *m words"]:
    """Add each species' name once to its concepts: "a disc with red or dotted"."""
    return concepts + name_words(species).view(len(species), *[1] * (concepts.ndim - 2), len(WORDS))


def template_words(species: Int64[Tensor, "k 3"]) -> Float[Tensor, "k m words"]:
    """Return prompts about the name that say nothing of the species: the name, and the name with each other word.

    They are CLIP's templates, "a photo of the large disc": sizes, backgrounds and sides, none or one of each.
    """
    options = torch.cartesian_prod(*[torch.arange(c + 1) for c in COUNTS[3:]])  # 0 says nothing
    bags = torch.zeros(len(options), len(WORDS))
    for column, first in zip(options.T, FIRST[3:]):
        rows = column.nonzero().flatten()
        bags[rows, first + column[rows] - 1] = 1
    return with_name(bags.expand(len(species), -1, -1), species)


def concept_words(
    species: Int64[Tensor, "k 3"],
    count: int,
    *,
    wrong: float = 0.0,
    kind: str = "stray",
    contrast: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "k count words"]:
    """Write concepts about each species by a rule: bags of its colour, its texture, or both.

    Three in ten also hold an irrelevant word of size, background or side. A share is wrong, drawn one by one:
    "stray" concepts hold a wrong colour, and half of them a wrong texture too; "rival" concepts are right, for
    `rival_species`.

    Args:
        species: rows of shape, colour and texture.
        count: concepts a species, >= 1.
        wrong: probability in [0, 1] that a concept is wrong.
        kind: "stray" or "rival".
        contrast: name only attributes in which the species differs from its rival.
        generator: draws everything.

    Raises:
        TypeError, ValueError: count, wrong or kind out of range.
    """
    check_integer("count", count, low=1)
    check_number("wrong", wrong, low=0, high=1)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {KINDS}")
    k = len(species)
    draw = torch.rand(k, count, 5, generator=generator)
    shifts = torch.stack([torch.randint(1, c, (k, count), generator=generator) for c in (5, 3)], dim=2)
    extra = torch.randint(sum(COUNTS[3:]), (k, count), generator=generator) + FIRST[3]
    bad = draw[..., 0] < wrong
    colour, texture = (species[:, i, None].expand(k, count) for i in (1, 2))
    says = (3 * draw[..., 1]).floor()  # 0 the colour, 1 the texture, 2 both
    says_colour, says_texture = says != 1, says != 0
    rivals = species[rival_species(species)]
    if contrast:
        differs = (species != rivals)[:, None, 1:]
        says_colour = torch.where(differs.all(-1), says_colour, differs[..., 0])
        says_texture = torch.where(differs.all(-1), says_texture, differs[..., 1])
    if kind == "stray":
        both = bad & (draw[..., 2] < 0.5)
        colour = torch.where(bad, (colour + shifts[..., 0]) % 5, colour)
        texture = torch.where(both, (texture + shifts[..., 1]) % 3, texture)
        says_colour, says_texture = says_colour | bad, says_texture & ~bad | both
    else:
        colour = torch.where(bad, rivals[:, 1, None], colour)
        texture = torch.where(bad, rivals[:, 2, None], texture)
    bags = torch.zeros(k, count, len(WORDS))
    bags.scatter_add_(2, (FIRST[1] + colour)[..., None], says_colour[..., None].float())
    bags.scatter_add_(2, (FIRST[2] + texture)[..., None], says_texture[..., None].float())
    bags.scatter_add_(2, extra[..., None], (draw[..., 3, None] < 0.3).float())
    return bags


def join_words(concepts: Float[Tensor, "k m words"], phrases: Int64[Tensor, "k c size"]) -> Float[Tensor, "k c words"]:
    """Return the bags of concepts joined by "or": their words together."""
    k, c, size = phrases.shape
    return concepts[torch.arange(k)[:, None], phrases.reshape(k, c * size)].view(k, c, size, -1).sum(dim=2)


@dataclass(frozen=True)
class SpeciesWorld:
    """A trained dual encoder, twelve species to recognise, and twelve others on which to choose."""

    encoder: PictureCaptionEncoder
    species: Int64[Tensor, "12 3"]
    others: Int64[Tensor, "12 3"]

    @property
    def scale(self) -> float:
        """The learned logit scale."""
        return min(float(self.encoder.log_scale.exp()), 100.0)

    def texts(self, bags: Float[Tensor, "*batch words"]) -> Float[Tensor, "*batch dim"]:
        """Return unit features of texts."""
        return self.encoder.encode_text(bags)

    def pictures(
        self, count: int, *, species: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "count dim"], Int64[Tensor, " count"]]:
        """Draw pictures of the species, or of others; return their features and labels."""
        species = self.species if species is None else species
        labels = torch.randint(len(species), (count,), generator=generator)
        rest = torch.stack([torch.randint(c, (count,), generator=generator) for c in COUNTS[3:]], dim=1)
        x = render(torch.cat([species[labels], rest], dim=1), generator=generator)
        return self.encoder.encode_image(x), labels


def species_world(seed: int, *, pictures: int = 6000, steps: int = 400) -> SpeciesWorld:
    """Train an encoder and choose species: of each shape three to recognise and three others, all different.

    Raises:
        TypeError, ValueError: seed, pictures or steps is no integer in its range.
    """
    for name, value, low in (("seed", seed, 0), ("pictures", pictures, 1), ("steps", steps, 0)):
        check_integer(name, value, low=low)
    g = torch.Generator().manual_seed(1000 + seed)
    data = CaptionedShapes.draw(pictures, generator=g)
    encoder = train_encoder(PictureCaptionEncoder(generator=g), data, steps=steps, generator=g)
    looks = torch.stack([torch.randperm(15, generator=g)[:6] for _ in range(4)])  # (shapes, 6) pairs
    shape = torch.arange(4)[:, None].expand(4, 3)
    first, second = (
        torch.stack([shape, part // 3, part % 3], dim=2).reshape(12, 3) for part in (looks[:, :3], looks[:, 3:])
    )
    return SpeciesWorld(encoder, first, second)
