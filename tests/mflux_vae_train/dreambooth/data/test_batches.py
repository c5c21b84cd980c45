from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.distributed.process_group import ProcessGroup
from mflux_vae_train.dreambooth.data import batches as micro_batching
from mflux_vae_train.dreambooth.data.batches import EncodedDataset, Plan, Sample
from tests.mflux_vae_train.dreambooth.data.small_dataset import CLASS_PROMPT, EMPTY, PROMPT, small_dataset


@pytest.fixture
def cache():
    """Latents encode the image index: instance 0..4, class 100..102; prompts 0, 1, 2."""
    return small_dataset(
        mx.arange(5).reshape(5, 1), 100 + mx.arange(3).reshape(3, 1), {"embedding": mx.arange(3).reshape(3, 1)}
    )


def run_of(cache, plan, *, seed=0, caption_dropout=0.0):
    """Every micro-batch of a run."""
    return [
        micro_batching.micro_batches(cache, plan, update=update, seed=seed, caption_dropout=caption_dropout)
        for update in range(plan.updates)
    ]


def flat(batch):
    """The arrays of a micro-batch by their paths."""
    return dict(tree_flatten(batch.arrays))


def joined(batches, name):
    """Concatenate an array over the micro-batches of an update: instance samples, then prior samples."""
    halves = [np.split(np.array(flat(batch)[name]), 2) for batch in batches]
    return np.concatenate([half[0] for half in halves] + [half[1] for half in halves])


def test_every_epoch_visits_all_indices_in_a_new_order():
    epochs = [[micro_batching.shuffled_index(3, 0, 5, epoch * 5 + place) for place in range(5)] for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert epochs != [
        [micro_batching.shuffled_index(4, 0, 5, epoch * 5 + place) for place in range(5)] for epoch in range(20)
    ]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (4, 1), (3, 2), (7, 1)])
def test_all_images_are_seen_equally_often_and_the_last_update_is_not_dropped(cache, batch_size, accumulation):
    plan = Plan(samples=3 * 5, batch_size=batch_size, accumulation=accumulation)
    run = run_of(cache, plan)
    assert len(run) == plan.updates
    assert all(len(batches) == accumulation for batches in run[:-1])
    weights = [batch.weight for batches in run for batch in batches]
    assert sum(weights) == 15 and max(weights) <= batch_size and min(weights) > 0
    seen = np.concatenate([np.array(b.arrays["latents"])[: int(b.weight), 0] for batches in run for b in batches])
    assert np.bincount(seen).tolist() == [3, 3, 3, 3, 3]


def test_four_micro_batches_of_one_equal_one_of_four(cache):
    ones = run_of(cache, Plan(samples=14, batch_size=1, accumulation=4), caption_dropout=0.3)
    fours = run_of(cache, Plan(samples=14, batch_size=4, accumulation=1), caption_dropout=0.3)
    assert len(ones) == len(fours) == 4
    for one, four in zip(ones, fours, strict=True):
        for name in flat(four[0]):
            np.testing.assert_array_equal(joined(one, name), joined(four, name))


def test_batches_depend_only_on_the_update_number(cache):
    plan = Plan(samples=40, batch_size=2, accumulation=2)
    whole = run_of(cache, plan, caption_dropout=0.5)
    alone = micro_batching.micro_batches(cache, plan, update=7, seed=0, caption_dropout=0.5)
    for one, other in zip(whole[7], alone, strict=True):
        for name, array in flat(one).items():
            np.testing.assert_array_equal(array, flat(other)[name])


def test_prior_samples_follow_instance_samples_with_separate_prompts_and_noise(cache):
    (batch,) = micro_batching.micro_batches(
        cache, Plan(samples=12, batch_size=4, accumulation=1), update=0, seed=0, caption_dropout=0.0
    )
    latents, prompts = (
        np.array(batch.arrays["latents"])[:, 0],
        np.array(batch.arrays["conditioning"]["embedding"])[:, 0],
    )
    assert (latents[:4] < 5).all() and (latents[4:] >= 100).all()
    assert prompts.tolist() == [PROMPT] * 4 + [CLASS_PROMPT] * 4
    for name in ("key", "dropout_key"):
        keys = np.array(batch.arrays[name])
        assert keys.shape == (8, 2) and len(np.unique(keys, axis=0)) == 8


def test_instance_noise_is_independent_of_the_prior(cache):
    plan = Plan(samples=12, batch_size=2, accumulation=2)
    without = run_of(replace(cache, class_latents=None), plan)
    for one, other in zip(run_of(cache, plan), without, strict=True):
        for batch, bare in zip(one, other, strict=True):
            np.testing.assert_array_equal(batch.arrays["key"][:2], bare.arrays["key"])
            np.testing.assert_array_equal(batch.arrays["latents"][:2], bare.arrays["latents"])


def test_noise_never_repeats(cache):
    plan = Plan(samples=64, batch_size=4, accumulation=2)
    keys = np.concatenate([np.array(b.arrays["key"]) for batches in run_of(cache, plan) for b in batches])
    assert len(np.unique(keys, axis=0)) == 128


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_captions_are_dropped_at_the_given_rate(cache, share):
    plan = Plan(samples=2000, batch_size=50, accumulation=1)
    batches = [batch for batches in run_of(cache, plan, caption_dropout=share) for batch in batches]
    rows = np.concatenate([np.array(batch.arrays["conditioning"]["embedding"])[:, 0] for batch in batches])
    assert abs((rows == EMPTY).mean() - share) < 0.03
    if share == 0:
        assert (rows != EMPTY).all()


# shapes, crops, masks


@pytest.fixture
def mixed():
    """Samples of two shapes and two concepts with 2 x 2 crops each; latents encode concept, image and crop."""
    latents, masks, samples = [], [], []
    for number in range(7):
        concept, shape = number % 2, (2, 4, 1) if number % 3 else (4, 2, 1)
        indices = [[len(latents) + 2 * crop + mirrored for mirrored in range(2)] for crop in range(2)]
        latents += [mx.full(shape, 100 * concept + 10 * number + view) for view in range(4)]
        masks += [mx.full(shape, view / 4) for view in range(4)]
        samples.append(Sample(latents=indices, prompt=concept, class_prompt=2 + concept, concept=concept))
    class_latents = {
        (concept, shape): [mx.full(shape, -100.0 * (concept + 1) - picture) for picture in range(3)]
        for concept in range(2)
        for shape in ((2, 4, 1), (4, 2, 1))
    }
    conditioning = {"embedding": mx.arange(5).reshape(5, 1)}
    return EncodedDataset(
        samples=samples,
        latents=latents,
        masks=masks,
        class_latents=class_latents,
        conditioning=conditioning,
        empty_prompt=4,
    )


def by_key(batches):
    """Latents, mask and prompt of each sample of an update by its noise key."""
    return {
        tuple(np.array(batch.arrays["key"])[row].tolist()): tuple(
            np.array(flat(batch)[name])[row].tolist() for name in ("latents", "mask", "conditioning.embedding")
        )
        for batch in batches
        for row in range(batch.arrays["latents"].shape[0])
    }


def test_micro_batches_have_one_shape_and_updates_are_complete(mixed):
    plan = Plan(samples=40, batch_size=4, accumulation=2)
    run = run_of(mixed, plan)
    assert len({batch.arrays["latents"].shape[1:] for batches in run for batch in batches}) == 2
    for update, batches in enumerate(run):
        assert sum(batch.weight for batch in batches) == len(plan.positions(update)) == 8
        assert all(batch.weight <= 4 for batch in batches)


def test_batch_size_does_not_change_the_samples_of_mixed_shapes(mixed):
    runs = [
        run_of(mixed, Plan(samples=30, batch_size=size, accumulation=8 // size), caption_dropout=0.3)
        for size in (1, 2, 4, 8)
    ]
    for update in range(4):
        first, *others = (by_key(run[update]) for run in runs)
        assert all(other == first for other in others)


@pytest.mark.parametrize("most", [2, 3, 8])
def test_joined_micro_batches_have_the_same_samples(mixed, most):
    plan = Plan(samples=30, batch_size=1, accumulation=8)
    for single, joined in zip(*(run_of(mixed, replace(plan, joined=count)) for count in (1, most)), strict=True):
        assert by_key(joined) == by_key(single)
        assert len(joined) < len(single) and max(batch.weight for batch in joined) <= most


def test_processes_join_the_micro_batches_of_their_share(mixed):
    plan = Plan(samples=30, batch_size=1, accumulation=8, joined=8)
    (whole,) = run_of(mixed, replace(plan, samples=8))
    shares = []
    for rank in range(3):
        group = ProcessGroup()
        group.rank, group.size = rank, 3
        options = {"update": 0, "seed": 0, "caption_dropout": 0.0, "processes": group}
        shares += micro_batching.micro_batches(mixed, plan, **options)
    assert by_key(shares) == by_key(whole)
    assert sum(batch.weight for batch in shares) == 8


def test_prior_samples_match_concept_and_shape(mixed):
    for batches in run_of(mixed, Plan(samples=50, batch_size=4, accumulation=2)):
        for batch in batches:
            instance, prior = np.split(np.array(batch.arrays["latents"])[:, 0, 0, 0], 2)
            prompts, of_class = np.split(np.array(batch.arrays["conditioning"]["embedding"])[:, 0], 2)
            assert (prompts == instance // 100).all() and (of_class == 2 + prompts).all()
            assert (-prior // 100 == prompts + 1).all()
            assert (np.split(np.array(batch.arrays["mask"]), 2)[1] == 1).all(), "class images have no mask"


def test_masks_match_their_crops(mixed):
    for batches in run_of(mixed, Plan(samples=50, batch_size=4, accumulation=1)):
        for batch in batches:
            half = int(batch.weight)
            views = np.array(batch.arrays["latents"])[:half, 0, 0, 0] % 10
            assert (np.array(batch.arrays["mask"])[:half, 0, 0, 0] == views / 4).all()


def test_crops_are_drawn_uniformly_each_epoch(mixed):
    plan = Plan(samples=7 * 200, batch_size=7, accumulation=1)
    run = run_of(replace(mixed, class_latents=None), plan)
    views = [
        tuple(np.sort(np.concatenate([np.array(b.arrays["latents"])[:, 0, 0, 0] for b in batches]))) for batches in run
    ]
    assert len(set(views)) > 190
    counts = np.bincount(np.array(views).astype(int).ravel() % 10)
    assert counts.sum() == 1400 and (abs(counts - 350) < 60).all()


@pytest.mark.parametrize("indices", [[[0, 1]], [[0], [1]]])  # mirrored or not, or two places
def test_two_crops_are_drawn_at_random(cache, indices):
    two = replace(cache, samples=[Sample(latents=indices, prompt=PROMPT)], class_latents=None)
    drawn = [
        batch.arrays["latents"].item() for (batch,) in run_of(two, Plan(samples=200, batch_size=1, accumulation=1))
    ]
    assert set(drawn) == {0, 1} and 70 < sum(drawn) < 130


def test_output_preservation_reuses_instance_latents_and_noise(cache):
    plan = Plan(samples=12, batch_size=3, accumulation=1)
    for (batch,) in run_of(replace(cache, class_latents=None, preserves_output=True), plan):
        for name in ("latents", "key"):
            np.testing.assert_array_equal(*np.split(np.array(batch.arrays[name]), 2))
        dropout = np.array(batch.arrays["dropout_key"])
        assert len(np.unique(dropout, axis=0)) == 6
        prompts = np.array(batch.arrays["conditioning"]["embedding"])[:, 0]
        assert prompts.tolist() == [PROMPT] * 3 + [CLASS_PROMPT] * 3
