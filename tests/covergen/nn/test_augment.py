"""Augmentation: the same draws change every image alike, by whole pixels, and gradients go through."""

from __future__ import annotations

import pytest
import torch

from covergen.nn.augment import KINDS, augment, check_kinds, draw_augmentation


def pictures(count: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drawn(count: int = 4, seed: int = 0) -> torch.Tensor:
    return draw_augmentation(count, torch.Generator().manual_seed(seed))["augmentation"]


def only(column: int, *values: float) -> torch.Tensor:
    """Draws of one image each, all 0 but one column."""
    draws = torch.zeros(len(values), 7)
    draws[:, column] = torch.tensor(values)
    return draws


def test_draws_are_uniform_and_a_function_of_the_generator() -> None:
    draws = drawn(5000)
    assert draws.shape == (5000, 7) and draws.min() >= -1 and draws.max() <= 1
    torch.testing.assert_close(draws.std(0), torch.full((7,), 3**-0.5), rtol=0.05, atol=0)
    assert torch.equal(drawn(seed=1), drawn(seed=1)) and not torch.equal(drawn(seed=1), drawn(seed=2))


def test_the_same_draws_change_real_and_generated_images_alike() -> None:
    real, fake, draws = pictures(seed=1), pictures(seed=2), drawn()
    both = augment(torch.cat([real, fake]), KINDS, draws.repeat(2, 1))
    assert torch.equal(both, torch.cat([augment(real, KINDS, draws), augment(fake, KINDS, draws)]))
    assert (augment(real, KINDS, draws) != augment(real, KINDS, drawn(seed=1))).any()
    moved = ("translation", "cutout")  # these say nothing of the content
    torch.testing.assert_close(augment(real - fake, moved, draws), augment(real, moved, draws)
                               - augment(fake, moved, draws))


def test_translation_moves_by_whole_pixels_and_leaves_zeros() -> None:
    images, draws = pictures(50), drawn(50)
    found = augment(images, ("translation",), draws)
    shifts = (draws[:, 3:5] * 4).round().int().tolist()  # an eighth of 32
    assert {abs(shift) for pair in shifts for shift in pair} == {0, 1, 2, 3, 4}
    for image, moved, (down, right) in zip(images, found, shifts, strict=True):
        wide = torch.zeros(3, 48, 48)
        wide[:, 8 + down:40 + down, 8 + right:40 + right] = image
        assert torch.equal(moved, wide[:, 8:40, 8:40])


@pytest.mark.parametrize("side", [32, 64])
def test_cutout_clears_a_square_of_a_quarter_of_the_side(side: int) -> None:
    images = torch.ones(3, 3, side, side)
    draws = only(5, 0.0, 0.5, 1.0)  # centre, lower, at the lower edge
    augmented = augment(images, ("cutout",), draws)
    for image, rows in zip(augmented, (side // 4, side // 4, side // 8), strict=True):
        hole = (image == 0).all(0)
        assert hole.sum() == rows * side // 4 and hole.any(1).sum() == rows and (image[:, ~hole] == 1).all()
    assert (augmented[1] == 0).any(0)[side // 2 + 1:].any() and not (augmented[1] == 0).any(0)[:side // 2].any()


def test_color_changes_brightness_saturation_and_contrast() -> None:
    images = pictures(2)
    torch.testing.assert_close(augment(images, ("color",), torch.zeros(2, 7)), images)
    lighter = augment(images, ("color",), only(0, 1.0, -0.4))
    torch.testing.assert_close(lighter - images, torch.tensor([0.5, -0.2]).view(2, 1, 1, 1).expand_as(images))
    grey, double = augment(images, ("color",), only(1, -1.0, 1.0))
    assert grey.std(0).max() < 1e-6
    torch.testing.assert_close(double - double.mean(0), 2 * (images[1] - images[1].mean(0)))
    contrasted = augment(images, ("color",), only(2, 1.0, -1.0))
    torch.testing.assert_close(contrasted.std((1, 2, 3)), images.std((1, 2, 3)) * torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(contrasted.mean((1, 2, 3)), images.mean((1, 2, 3)))


def test_gradients_reach_every_pixel_that_is_not_cut_out() -> None:
    images, draws = pictures().requires_grad_(True), drawn()
    draws[:, 3:5] = 0
    augment(images, ("translation", "cutout"), draws).sum().backward()
    mask = augment(torch.ones_like(images), ("cutout",), draws)
    assert torch.equal(images.grad, mask) and 0 < mask.mean() < 1
    images.grad = None
    (augment(images, ("color",), draws) ** 2).sum().backward()
    assert (images.grad != 0).float().mean() > 0.99


def test_none_is_no_augmentation_and_other_words_are_refused() -> None:
    check_kinds(("none",))
    check_kinds(KINDS)
    images = pictures()
    assert torch.equal(augment(images, ("none",), drawn()), images)
    for kinds in (("colour",), ("none", "cutout")):
        with pytest.raises(ValueError, match="is not a choice, expected some of color, translation, cutout, or none"):
            check_kinds(kinds)
