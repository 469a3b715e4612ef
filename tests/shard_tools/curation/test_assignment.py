"""Which split a group goes to: ratios that fit, the same again, and old groups that stay where they are."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from shard_tools.curation.assignment import Component, assign, round_counts
from shard_tools.dataset.layout import SPLITS

RATIOS = (0.8, 0.1, 0.1)


def by_genre(components: list[Component], splits: list[str]) -> dict[str, Counter]:
    counts = defaultdict(Counter)
    for component, name in zip(components, splits, strict=True):
        for genre, count in component.genres.items():
            counts[genre][name] += count
    return counts


def random_components(seed: int, sizes: dict[str, int], guests: float = 0.0) -> list[Component]:
    """Units of one group, and some of 2 to 6; a share of them is in a second genre too."""
    rng = np.random.default_rng(seed)
    components = []
    for genre, size in sizes.items():
        while size > 0:
            many = int(min(size, rng.integers(2, 7) if rng.random() < 0.1 else 1))
            genres = {genre: many}
            if rng.random() < guests:
                genres[str(rng.choice(list(sizes)))] = many
            components.append(Component(tuple(f"{genre} {size - i}" for i in range(many)), genres))
            size -= many
    return components


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("guests", [0.0, 0.3])
def test_ratios_of_every_genre_are_within_a_percentage_point(seed, guests):
    components = random_components(seed, {f"of {size}": size for size in (50, 60, 77, 100, 333, 1000, 5000)}, guests)
    for counts in by_genre(components, assign(components, RATIOS, seed, 10, {}).splits).values():
        for name, share in zip(SPLITS, RATIOS, strict=True):
            assert abs(counts[name] / counts.total() - share) <= 0.01


def test_round_counts_are_off_by_more_than_a_point_only_where_no_others_fit():
    def off(counts: list[int]) -> float:
        return max(abs(count / sum(counts) - share) for count, share in zip(counts, RATIOS, strict=True))

    wide = [total for total in range(50, 5000) if off(round_counts(total, RATIOS, (0, 0, 0))) > 0.01]
    assert wide == [53, 54, 56, 57]
    assert min(off([train, val, total - train - val]) for total in wide
               for train in range(total) for val in range(total - train)) > 0.01


def test_the_order_of_the_components_does_not_matter_and_the_seed_does():
    components = random_components(0, {"a": 300, "b": 200}, 0.2)
    one = assign(components, RATIOS, 0, 10, {}).splits
    assert assign(components[::-1], RATIOS, 0, 10, {}).splits[::-1] == one
    other = assign(components, RATIOS, 1, 10, {}).splits
    assert 0.2 < sum(a != b for a, b in zip(one, other, strict=True)) / len(one) < 0.5


def test_with_its_memory_no_old_group_moves_and_without_it_few_do():
    components = random_components(0, {"a": 3000, "b": 700, "c": 60}, 0.1)
    first = assign(components, RATIOS, 0, 10, {}).splits
    new = [Component((f"new {i}",), {("a", "b", "c")[i % 3]: 1}) for i in range(38)]
    known = {group: name for component, name in zip(components, first, strict=True) for group in component.groups}
    later = assign(new + components, RATIOS, 0, 10, known)
    assert later.splits[len(new):] == first and not later.reassigned
    for counts in by_genre(new + components, later.splits).values():
        assert abs(counts["train"] / counts.total() - 0.8) <= 0.01
    forgetful = assign(new + components, RATIOS, 0, 10, {}).splits[len(new):]
    assert sum(one != other for one, other in zip(first, forgetful, strict=True)) <= 20


def test_small_genres_make_up_for_each_others_rounding():
    components = [Component((f"{genre} {i}",), {genre: 1}) for genre in "abcdefghij" for i in range(6)]
    counts = sum(by_genre(components, assign(components, RATIOS, 0, 1, {}).splits).values(), Counter())
    assert counts == {"train": 48, "val": 6, "test": 6}
