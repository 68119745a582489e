import numpy as np
import pytest

from pipelines.world import judges, people, scene


def scenes_of(brightness, saturation, warmth, colour=0):
    n = len(brightness)
    ones = np.ones(n, int)
    return scene.Scenes(
        shape=0 * ones,
        colour=colour * ones,
        size=ones,
        place=4 * ones,
        brightness=np.array(brightness),
        saturation=np.array(saturation),
        warmth=np.array(warmth),
        x=16.0 * ones,
        y=16.0 * ones,
        radius=8.5 * ones,
    )


def test_the_minority_opposes_the_majority_on_exactly_two_open_attributes():
    names = ("brightness", "saturation", "warmth", "fidelity")
    opposed = [n for n in names if getattr(people.MAJORITY, n) * getattr(people.MINORITY, n) < 0]
    assert opposed == ["brightness", "saturation"]
    assert people.MAJORITY.warmth == people.MINORITY.warmth
    assert people.MAJORITY.fidelity == people.MINORITY.fidelity > 0


def test_a_utility_is_the_weighted_sum_of_fidelity_and_open_attributes():
    # Brightness in the middle of its range counts 0, saturation at the top 1, warmth as it is.
    pictures = scenes_of([0.65, 0.95], [1.0, 0.725], [0.5, 0.0])
    wanted = [scene.Wanted(0, 0), scene.Wanted(0, 1)]
    assert people.MAJORITY.utility(pictures, wanted) == pytest.approx([3.5 + 1.0 + 0.4 * 0.5, 3.5 * 0.5 - 1.2])
    assert people.MINORITY.utility(pictures, wanted) == pytest.approx([3.5 - 1.0 + 0.4 * 0.5, 3.5 * 0.5 + 1.2])


def test_the_mean_taste_is_the_population_mean_of_utilities():
    rng = np.random.default_rng(0)
    wanted = [scene.Wanted(0, 0)] * 50
    pictures = scene.sample_scenes(wanted, rng, error_rate=0.3)
    mean = 0.75 * people.MAJORITY.utility(pictures, wanted) + 0.25 * people.MINORITY.utility(pictures, wanted)
    assert people.mean_taste(0.25).utility(pictures, wanted) == pytest.approx(mean)
    assert people.mean_taste(0.25).brightness == pytest.approx(-0.6)


def test_there_are_four_renderers_whose_errors_are_as_configured():
    assert len({r.name for r in people.RENDERERS}) >= 4
    assert len({r.error_rate for r in people.RENDERERS}) >= 4
    rng = np.random.default_rng(1)
    wanted = [scene.Wanted(1, 2, 0, 3)] * 4_000
    for index, renderer in enumerate(people.RENDERERS):
        drawn = people.draw(wanted, np.full(len(wanted), index), rng)
        wrong = 1 - scene.fidelity(drawn, wanted).mean()
        # The standard error over 16,000 attributes is below 0.004.
        assert wrong == pytest.approx(renderer.error_rate, abs=0.012)


def test_renderers_have_styles_that_can_be_told_apart():
    rng = np.random.default_rng(1)
    wanted = [scene.Wanted(1, 2)] * 1_000
    by_name = {r.name: people.draw(wanted, np.full(1_000, i), rng) for i, r in enumerate(people.RENDERERS)}
    assert by_name["daylight-v1"].brightness.mean() > by_name["nocturne-xl"].brightness.mean() + 0.1
    assert by_name["neon-turbo"].saturation.mean() > by_name["pastel-mini"].saturation.mean() + 0.1


def test_the_minority_has_its_exact_share_of_the_annotators():
    for share, expected in ((0.25, 15), (0.0, 0), (0.1, 6)):
        tastes = people.Population(60, share, 0.05).tastes(np.random.default_rng(0))
        assert (len(tastes), int(tastes.sum())) == (60, expected)


def test_without_noise_a_vote_follows_utility_except_where_it_slips():
    rng = np.random.default_rng(0)
    gap = rng.choice([-1.0, 1.0], 5_000)
    population = people.Population(10, 0.25, slip_rate=0.08, temperature=1e-9)
    votes = people.vote(gap, gap, population, rng)
    follows = (votes.label_first == 1.0) == (gap > 0)
    assert (follows == ~votes.is_slip).all()
    assert (votes.is_against_mean == votes.is_slip).all()
    assert votes.is_slip.mean() == pytest.approx(0.08, abs=0.015)


def test_a_difference_within_the_tie_width_is_a_tie_and_never_a_slip():
    gap = np.array([0.11, -0.11, 0.13, -0.13])
    population = people.Population(10, 0.25, slip_rate=1.0, temperature=1e-9, tie_width=0.12)
    votes = people.vote(gap, gap, population, np.random.default_rng(0))
    assert votes.label_first.tolist() == [0.5, 0.5, 0.0, 1.0]
    assert votes.is_slip.tolist() == [False, False, True, True]
    assert votes.is_against_mean.tolist() == [False, False, True, True]


def test_a_vote_is_against_the_mean_when_it_contradicts_the_sign_of_the_mean_utility():
    own, mean = np.array([1.0, 1.0, -1.0, -1.0]), np.array([1.0, -1.0, 1.0, -1.0])
    population = people.Population(10, 0.25, slip_rate=0.0, temperature=1e-9)
    votes = people.vote(own, mean, population, np.random.default_rng(0))
    assert votes.is_against_mean.tolist() == [False, True, True, False]


def test_the_noise_of_a_vote_is_logistic():
    population = people.Population(10, 0.25, slip_rate=0.0, temperature=0.7, tie_width=0.0)
    gap = np.full(20_000, 0.7)
    share = people.vote(gap, gap, population, np.random.default_rng(0)).label_first.mean()
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)


def test_the_highest_utility_has_rank_one_without_noise():
    assert people.rank(np.array([0.1, 3.0, 2.0]), 0.0, np.random.default_rng(0)).tolist() == [3, 1, 2]


def test_two_pictures_of_a_ranking_are_ordered_with_logistic_noise():
    rng = np.random.default_rng(0)
    ranks = np.array([people.rank(np.array([0.7, 0.0, 5.0]), 0.7, rng) for _ in range(5_000)])
    assert (np.sort(ranks, axis=1) == [1, 2, 3]).all()
    assert (ranks[:, 0] < ranks[:, 1]).mean() == pytest.approx(1 / (1 + np.exp(-1)), abs=0.02)


def test_judges_see_in_a_picture_what_the_tastes_would_say_of_its_scene():
    rng = np.random.default_rng(3)
    pool = scene.all_prompts()
    prompts = [pool[i] for i in rng.integers(0, len(pool), 100)]
    wanted = [scene.parse_prompt(p) for p in prompts]
    scenes = people.draw(wanted, rng.integers(0, 4, 100), rng)
    judged = judges.judge(scene.render(scenes), prompts)
    assert set(judged) == {"taste:majority", "taste:minority", "fidelity"}
    assert np.corrcoef(judged["taste:majority"], people.MAJORITY.utility(scenes, wanted))[0, 1] > 0.98
    assert (judged["fidelity"] == scene.fidelity(scenes, wanted)).mean() >= 0.97
