"""Statistics say what is known by hand, and the score of attributes is 1 for the true posterior only."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from covergen.evaluation import statistics

ATTRIBUTES, GENRES, DRAWS = 6, 8, 20


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_the_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = 3 + 2 * normal(0, 400)
    found = statistics.bootstrap_mean(values, seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == statistics.bootstrap_mean(np.append(values, np.nan), seed=1)
    narrow = statistics.bootstrap_mean(values, seed=1, level=0.5)
    assert found.low < narrow.low < found.value < narrow.high < found.high
    assert all(math.isnan(part) for part in statistics.bootstrap_mean(np.full(3, np.nan), seed=0)[:3])


def test_the_bootstrap_of_a_statistic_draws_songs_not_numbers() -> None:
    pairs = normal(2, 300, 2) @ np.array([[1, 0.8], [0, 0.6]])  # correlated by 0.8
    found = statistics.bootstrap_of(lambda rows: np.corrcoef(pairs[rows].T)[0, 1], 300, seed=3, resamples=400)
    assert 0.7 < found.low < found.value < found.high < 0.87


def test_margins_compare_with_other_albums_and_within_the_genre() -> None:
    scores, genres, groups = normal(4, 9, 9), np.array(list("aaaabbbbc")), np.array([0, 0, 1, 2, 3, 4, 5, 5, 6])
    for some in (None, genres):
        expected = []
        for i in range(9):
            others = [scores[i, j] for j in range(9) if groups[j] != groups[i] and (some is None or some[j] == some[i])]
            expected.append(scores[i, i] - np.mean(others) if others else np.nan)
        np.testing.assert_allclose(statistics.margins(scores, some, groups), expected)
    assert np.isnan(statistics.margins(scores, genres, groups)).tolist() == [False] * 8 + [True]


def test_permutation_p_is_what_all_permutations_say() -> None:
    scores = normal(5, 5, 5) + 0.8 * np.eye(5)
    sums = np.array([sum(scores[i, j] for i, j in enumerate(dealt)) for dealt in itertools.permutations(range(5))])
    exact = (sums >= np.trace(scores) - 1e-9).mean()
    assert 0.01 < exact < 0.5
    assert statistics.permutation_p(scores, None, np.arange(5), seed=0) == pytest.approx(exact, abs=0.02)
    assert 0.5 / 10 < statistics.permutation_p(scores, None, np.arange(5), seed=0, permutations=9) <= 1


def test_permutation_p_is_uniform_without_an_effect_and_smallest_for_a_clear_one() -> None:
    genres = np.arange(30) % 3
    for some in (None, genres):
        found = np.array([statistics.permutation_p(normal(seed, 30, 30), some, np.arange(30), seed=0, permutations=99)
                          for seed in range(300)])
        assert abs((found <= 0.1).mean() - 0.1) < 0.05 and abs((found <= 0.5).mean() - 0.5) < 0.09
        clear = normal(6, 30, 30) + 4 * np.eye(30)
        assert statistics.permutation_p(clear, some, np.arange(30), seed=0, permutations=99) == 0.01


def test_following_only_the_genre_is_an_effect_over_all_but_none_within() -> None:
    genres = np.repeat(np.arange(4), 20)
    scores = normal(7, 80, 80) + 2 * (genres[:, None] == genres)
    assert statistics.permutation_p(scores, None, np.arange(80), seed=0, permutations=999) == 0.001
    assert statistics.permutation_p(scores, genres, np.arange(80), seed=0, permutations=999) > 0.05


@pytest.mark.parametrize("scores", [np.tile(normal(8, 40), (40, 1)), normal(8, 40)[:, None] + normal(9, 40) / 3,
                                    np.full((40, 40), np.nan)], ids=["all covers alike", "no pairing", "not finite"])
def test_what_cannot_depend_on_the_pairing_has_p_one(scores: np.ndarray) -> None:
    for some in (None, np.arange(40) % 5):
        assert statistics.permutation_p(scores, some, np.arange(40), seed=0, permutations=999) == 1


def test_songs_of_one_album_prove_no_more_than_the_album() -> None:
    albums, chance = np.arange(60) // 5, []
    for seed in range(100):
        scores = normal(seed, 12, 12)[albums][:, albums] + 0.1 * normal(seed + 1000, 60, 60)
        chance.append(statistics.permutation_p(scores, None, albums, seed=0, permutations=99) <= 0.1)
    assert np.mean(chance) < 0.15  # dealt song by song it is 0.26


def test_sign_flip_p_is_uniform_without_an_effect_and_smallest_for_a_clear_one() -> None:
    found = np.array([statistics.sign_flip_p(normal(seed, 30), seed=0, permutations=99) for seed in range(300)])
    assert abs((found <= 0.1).mean() - 0.1) < 0.05 and abs((found <= 0.5).mean() - 0.5) < 0.09
    some = np.append(1 + 0.5 * normal(10, 50), np.nan)
    assert statistics.sign_flip_p(some, seed=0) == 1e-4 and statistics.sign_flip_p(-some, seed=0) == 1
    assert statistics.sign_flip_p(np.zeros(9), seed=0) == 1
    exact = np.mean([np.dot(signs, [1, 2, 3, -0.5]) >= 5.5 for signs in itertools.product((-1, 1), repeat=4)])
    assert statistics.sign_flip_p(np.array([1, 2, 3, -0.5]), seed=0) == pytest.approx(exact, abs=0.01)


def test_ranks_count_better_covers_and_half_of_ties_but_not_the_own_album() -> None:
    scores = np.array([[5.0, 9, 5, 1], [0, 1, 2, 3], [4, 4, 4, 4], [1, 2, 3, np.nan]])
    assert statistics.retrieval(scores, np.arange(4)).tolist() == [2.5, 3, 2.5, 4]
    assert statistics.retrieval(scores, np.array([0, 0, 1, 2])).tolist() == [1.5, 3, 2.5, 4]
    ranks = statistics.retrieval(normal(11, 500, 500), np.arange(500))
    assert (ranks <= 50).mean() == pytest.approx(0.1, abs=0.04)


def test_intraclass_is_the_share_of_the_audio() -> None:
    audio, noise = normal(12, 200, 1, 40), normal(13, 200, 6, 40)
    assert statistics.intraclass(noise) == pytest.approx(0, abs=0.02)
    assert statistics.intraclass(audio.repeat(6, 1)) == pytest.approx(1)
    assert statistics.intraclass(2 * audio + noise + 5) == pytest.approx(0.8, abs=0.02)
    # The example of Shrout and Fleiss, table 2: six targets, four judges, ICC(1, 1) = 0.17.
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    assert statistics.intraclass(ratings[..., None]) == pytest.approx(0.17, abs=0.005)


def world(seed: int, songs: int, noises: int, noise: float) -> tuple[np.ndarray, ...]:
    """Genres [N], what audio tells [N, A], the truth [N, A], and estimates [N, K, A] drawn from the true posterior."""
    draws = np.random.default_rng(seed)
    genres = draws.integers(GENRES, size=songs)
    told = 0.7 * draws.normal(size=(GENRES, ATTRIBUTES))[genres] + 0.7 * draws.normal(size=(songs, ATTRIBUTES))
    return (genres, told, told + noise * draws.normal(size=told.shape),
            told[:, None] + noise * draws.normal(size=(songs, noises, ATTRIBUTES)))


@pytest.mark.parametrize("noise", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("noises", [4, 8])
@pytest.mark.parametrize("songs", [400, 2000])
def test_the_true_posterior_scores_one_and_what_ignores_the_audio_zero(songs: int, noises: int, noise: float) -> None:
    scores: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        genres, told, truth, estimates = world(seed, songs, noises, noise)
        mean = np.stack([told[genres == genre].mean(0) for genre in range(GENRES)])[genres][:, None]
        fresh = noise * normal(seed + 1000, *estimates.shape)
        for where, some in (("in total", None), ("within", genres)):
            samplers = {"posterior": estimates, "exaggerated": 2 * estimates, "noise": fresh,
                        "shuffled": estimates[np.random.default_rng(seed).permutation(songs)]}
            if some is not None:
                samplers |= {"genre only": mean.repeat(noises, 1), "genre and noise": mean + fresh}
            for name, sampler in samplers.items():
                scores.setdefault(f"{name} {where}", []).append(
                    statistics.attribute_score(sampler, truth, told, some))
    for name, found in scores.items():
        if name.startswith(("posterior", "exaggerated")):
            assert np.mean(found) == pytest.approx(1, abs=3 * np.std(found) / DRAWS**0.5 + 0.002), name
            assert np.abs(np.array(found) - 1).max() < (0.2 if songs < 2000 else 0.1), name
        else:
            assert np.mean(found) < 0.05, name
    assert scores["genre only within"] == [0] * DRAWS


def test_plain_figures_punish_noise_and_show_exaggeration() -> None:
    _, told, truth, estimates = world(0, 2000, 4, 1.0)
    r2, slope = statistics.r2_and_slope(estimates, truth)
    double_r2, double_slope = statistics.r2_and_slope(2 * estimates, truth)
    explained = told.var(0) / (told.var(0) + 1)
    np.testing.assert_allclose(r2, 1 - 1.25 / (told.var(0) + 1), atol=0.06)
    np.testing.assert_allclose(slope, explained, atol=0.06)
    np.testing.assert_allclose(double_slope, 2 * slope)
    assert statistics.attribute_score(estimates, truth, told, None) > 0.95
    assert r2.mean() < 0.5 and (double_r2 < r2).all()


def test_figures_are_the_share_that_audio_explains_however_small_the_genres() -> None:
    _, told, truth, estimates = world(1, 3000, 4, 0.7)
    for some in (None, np.arange(3000) // 2, np.minimum(np.arange(3000), 2000)):  # all; pairs; most alone in theirs
        share = told.var(0).mean() / (told.var(0).mean() + 0.49)
        found = statistics.attribute_figures(estimates, truth, some)
        assert found.shape == (ATTRIBUTES,) and found.mean() == pytest.approx(share, abs=0.05)
    known = statistics.attribute_figures(told[:, None], truth, None)
    np.testing.assert_allclose(known, [np.corrcoef(told[:, a], truth[:, a])[0, 1] ** 2 for a in range(ATTRIBUTES)])


def test_noise_does_not_explode_where_nothing_is_left_after_the_correction() -> None:
    for seed in range(DRAWS):
        genres, _, truth, estimates = world(seed, 400, 4, 1.0)
        for some in (None, genres):
            found = statistics.attribute_figures(normal(seed + 1000, *estimates.shape), truth, some)
            assert found.min() >= 0 and found.max() < 0.2


def test_what_is_reversed_or_constant_counts_as_zero_and_nothing_known_has_no_score() -> None:
    genres, told, truth, estimates = world(2, 400, 4, 0.5)
    assert (statistics.attribute_figures(-estimates, truth, None) == 0).all()
    constant = np.full_like(estimates, 0.1)
    assert (statistics.attribute_figures(constant, truth, genres) == 0).all()
    assert (statistics.attribute_figures(estimates, constant[:, 0], genres) == 0).all()
    assert (statistics.attribute_figures(estimates, truth, np.arange(400)) == 0).all()  # each song alone in its genre
    assert math.isnan(statistics.attribute_score(estimates, truth, constant[:, 0], None))
    assert statistics.attribute_score(told[:, None], truth, told, genres) == 1
