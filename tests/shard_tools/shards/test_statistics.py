"""Audio blocks and statistics: joins are seen in the data, absent blocks are left out."""

import numpy as np
import pytest

from shard_tools.shards.statistics import Moments, blocks_of_sizes, detect_blocks


def vectors(count: int, sizes: tuple[int, ...], absent: float, seed: int = 0) -> np.ndarray:
    """Vectors of several sources, each source unknown to a share of them, but never all."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, sum(sizes))).astype(np.float32)
    ends = np.cumsum(sizes)
    for row in values:
        missing = random.random(len(sizes)) < absent
        if not missing.all():
            for end, size, gone in zip(ends, sizes, missing, strict=True):
                row[end - size:end] *= not gone
    return values


@pytest.mark.parametrize("sizes", [(580, 580), (580, 579, 1), (30, 30), (100, 200, 300), (8, 8), (40,)])
def test_joins_are_found_where_sources_are_missing(sizes):
    found = detect_blocks(vectors(400, sizes, 0.3))
    if sizes == (580, 579, 1):  # a single column is no block: it could as well be a feature that is often 0
        assert found == ((0, 580), (580, 1160))
    else:
        assert [end - start for start, end in found] == list(sizes)


def test_nothing_missing_is_one_block():
    assert detect_blocks(vectors(400, (580, 580), 0)) == ((0, 1160),)
    assert detect_blocks(np.zeros((5, 60), np.float32)) == ((0, 60),)
    assert detect_blocks(np.ones((1, 1), np.float32)) == ((0, 1),)


def test_features_that_are_often_or_always_zero_do_not_move_the_join():
    values = vectors(1000, (580, 580), 0.3)
    random = np.random.default_rng(1)
    values[random.random(1000) < 0.6, 579] = 0  # a last feature like "silence rate"
    values[random.random(1000) < 0.6, 580] = 0
    values[:, [0, 5, 300, 577, 900, 1159]] = 0
    assert detect_blocks(values) == ((0, 580), (580, 1160))


def test_sparse_features_are_no_joins():
    values = np.maximum(np.random.default_rng(0).normal(-1.5, 1, (500, 600)), 0).astype(np.float32)
    assert detect_blocks(values) == ((0, 600),)


def test_rare_accidents_are_no_joins():
    values = vectors(1000, (580, 580), 0.3)
    values[:5, 100:200] = 0  # half a percent
    assert detect_blocks(values) == ((0, 580), (580, 1160))


def test_sizes_given_must_add_up():
    assert blocks_of_sizes((580, 580), 1160) == ((0, 580), (580, 1160))
    for sizes in ((580,), (580, 581), (1160, 0)):
        with pytest.raises(ValueError, match="add up to"):
            blocks_of_sizes(sizes, 1160)


def test_moments_in_lots_are_those_of_the_whole_at_all_scales():
    values = vectors(500, (20, 20), 0.3) * (10.0 ** np.linspace(-24, 13, 40)).astype(np.float32)
    blocks = ((0, 20), (20, 40))
    moments = Moments.empty(40)
    for lot in np.array_split(values, 7):
        moments = moments.merge(Moments.of(lot, blocks))
    mean, std = moments.mean_and_std()
    for start, end in blocks:
        present = values[(values[:, start:end] != 0).any(1), start:end].astype(np.float64)
        np.testing.assert_allclose(mean[start:end], present.mean(0), rtol=1e-9)
        np.testing.assert_allclose(std[start:end], present.std(0), rtol=1e-12)


def test_constant_and_never_present_columns_have_no_noise():
    values = np.zeros((1000, 4), np.float32)
    values[:, 0], values[:, 1] = 0.1, np.arange(1000)
    mean, std = Moments.of(values, ((0, 2), (2, 4))).mean_and_std()
    assert mean[0] == np.float32(0.1) and std[0] == 0
    assert mean[2:].tolist() == [0, 0] and std[2:].tolist() == [0, 0]
