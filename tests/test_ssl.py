"""Losses against float64 loops written from their formulas, and Sinkhorn-Knopp over two processes against one."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mad.training import ranks
from mad.training.schedule import cosine, linear, warmup_cosine
from mad.training.ssl import (
    by_position,
    centred_softmax,
    dino_cross_entropy,
    ema_update,
    entropy,
    global_pair_terms,
    kde,
    koleo,
    multicrop_terms,
    pair_terms,
    patch_cross_entropy,
    sinkhorn_knopp,
    update_centre,
)


def sinkhorn_reference(scores, temperature, iterations):
    q = np.exp(np.asarray(scores, np.float64) / temperature)
    n, k = q.shape
    for _ in range(iterations):
        for column in range(k):
            q[:, column] /= q[:, column].sum() * k
        for row in range(n):
            q[row] /= q[row].sum() * n
    return q * n


@pytest.mark.parametrize(("n", "k", "temperature"), [(6, 4, 0.07), (5, 9, 0.04), (16, 3, 0.5)])
def test_sinkhorn_knopp_equals_a_float64_loop(n, k, temperature):
    scores = torch.from_numpy(np.random.default_rng(n).uniform(-1, 1, (n, k))).float()
    q = sinkhorn_knopp(scores, temperature)
    np.testing.assert_allclose(
        q.numpy(), sinkhorn_reference(scores.double().numpy(), temperature, 3), rtol=2e-4, atol=1e-7
    )
    np.testing.assert_allclose(q.sum(dim=1).numpy(), 1, rtol=1e-5)


def test_sinkhorn_knopp_uses_all_prototypes_equally_when_it_converges():
    q = sinkhorn_knopp(torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (40, 8))), 0.1, 100)
    np.testing.assert_allclose(q.sum(dim=0).numpy(), 40 / 8, rtol=1e-3)


LOW = {
    "a column far below": [[0.95, -0.15], [0.90, -0.10], [0.93, -0.30], [0.85, -0.20]],
    "a row far below": [[0.9, 0.8], [-0.3, -0.2]],
    "spread over -1 to 1": np.random.default_rng(0).uniform(-1, 1, (12, 5)).tolist(),
}


@pytest.mark.parametrize("scores", LOW.values(), ids=LOW)
def test_sinkhorn_knopp_is_exact_at_low_temperature(scores):
    """Scores lie so far apart that exp(scores / temperature) relative to the largest one is 0 in fp32, not in float64."""
    q = sinkhorn_knopp(torch.tensor(scores), 0.01).numpy()
    np.testing.assert_allclose(q, sinkhorn_reference(scores, 0.01, 3), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_knopp_equalises_a_prototype_that_no_sample_is_near():
    scores = torch.zeros(4, 3)
    scores[:, 2] = -1e4
    torch.testing.assert_close(sinkhorn_knopp(scores, 0.04), torch.full((4, 3), 1 / 3))


def _one_of_two(rank, path, scores, embeddings):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    cut = 5  # uneven shares
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    q = sinkhorn_knopp(scores[mine], 0.05, distributed=True)
    sharp = sinkhorn_knopp(scores[mine], 0.01, distributed=True)
    own = embeddings[mine].clone().requires_grad_(True)
    by_position(koleo, ranks.gather(own)).backward()
    dense = embeddings[mine].clone().requires_grad_(True)
    by_position(lambda x: kde(x, 5.0), ranks.gather(dense)).backward()
    centre = torch.ones(7)
    update_centre(centre, scores[mine], 0.9)
    alone = slice(0, 12) if rank == 0 else slice(12, None)  # all masked patches are of one process
    patches = sinkhorn_knopp(scores[alone], 0.05, distributed=True)
    one_sided = torch.ones(7)
    update_centre(one_sided, scores[alone], 0.9)
    nothing = torch.ones(7)
    update_centre(nothing, scores[:0], 0.9)
    results = (q, own.grad / 2, sharp)  # DistributedDataParallel averages over processes
    torch.save((*results, dense.grad / 2, centre, patches, one_sided, nothing), f"{path}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_targets_centres_and_gradients_of_one(tmp_path):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(12, 7, generator=generator) * 2 - 1
    embeddings = torch.randn(12, 2, 6, generator=generator)
    mp.spawn(_one_of_two, args=(str(tmp_path), scores, embeddings), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(
        torch.cat([part[0] for part in parts]), sinkhorn_knopp(scores, 0.05), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        torch.cat([part[2] for part in parts]), sinkhorn_knopp(scores, 0.01), rtol=1e-4, atol=1e-7
    )
    single = embeddings.clone().requires_grad_(True)
    by_position(koleo, single).backward()
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), single.grad, rtol=1e-4, atol=1e-6)
    single = embeddings.clone().requires_grad_(True)
    by_position(lambda x: kde(x, 5.0), single).backward()
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), single.grad, rtol=1e-4, atol=1e-6)
    centre = 0.9 * torch.ones(7) + 0.1 * scores.mean(dim=0)
    for part in parts:
        torch.testing.assert_close(part[4], centre)
        torch.testing.assert_close(part[6], centre)
        assert torch.equal(part[7], torch.ones(7))  # nothing was masked anywhere
    torch.testing.assert_close(parts[0][5], sinkhorn_knopp(scores, 0.05), rtol=1e-4, atol=1e-7)
    assert parts[1][5].shape == (0, 7)


@pytest.mark.parametrize("terms", [pair_terms(4), multicrop_terms(2, 3), global_pair_terms(4)])
def test_cross_entropy_equals_a_float64_loop(terms):
    rng = np.random.default_rng(2)
    views, k = terms.shape[0], 6
    student = rng.uniform(-1, 1, (3, views, k))
    targets = rng.dirichlet(np.ones(k), (3, 2))
    expected = []
    for b in range(3):
        values = []
        for s in range(views):
            for t in range(2):
                if terms[s, t]:
                    logits = [student[b, s, j] / 0.1 for j in range(k)]
                    log_z = math.log(sum(math.exp(value) for value in logits))
                    values.append(-sum(targets[b, t, j] * (logits[j] - log_z) for j in range(k)))
        expected.append(sum(values) / len(values))
    got = dino_cross_entropy(torch.tensor(student).float(), torch.tensor(targets).float(), terms, 0.1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_number_of_terms_is_that_of_the_papers():
    assert int(pair_terms(4).sum()) == 8  # MAD: 4 children against 2 views
    assert int(multicrop_terms(2, 8).sum()) == 18  # DINO: 2 + 8 x 2
    assert not multicrop_terms(2, 8)[:2].diagonal().any()
    assert int(global_pair_terms(4).sum()) == 10  # 8, and each view of the parent against the other
    assert not global_pair_terms(4)[4:].diagonal().any()


def test_patch_cross_entropy_equals_a_float64_loop():
    rng = np.random.default_rng(5)
    masks = rng.random((4, 6)) < 0.5
    masks[2] = False  # an image without a mask
    count, k = int(masks.sum()), 5
    student, targets = rng.uniform(-1, 1, (count, k)), rng.dirichlet(np.ones(k), count)
    expected, row = [], 0
    for image in range(4):
        values = []
        for _ in range(int(masks[image].sum())):
            logits = [student[row, j] / 0.1 for j in range(k)]
            log_z = math.log(sum(math.exp(value) for value in logits))
            values.append(-sum(targets[row, j] * (logits[j] - log_z) for j in range(k)))
            row += 1
        expected.append(sum(values) / len(values) if values else 0.0)
    scores = torch.tensor(student).float().requires_grad_(True)
    got = patch_cross_entropy(scores, torch.tensor(targets).float(), torch.from_numpy(masks), 0.1)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-5)
    assert len(set(masks.sum(axis=1))) > 2  # images of different weight per patch
    got.sum().backward()
    assert (scores.grad.abs().sum(dim=1) > 0).all()
    empty = patch_cross_entropy(torch.zeros(0, k), torch.zeros(0, k), torch.zeros(3, 6, dtype=torch.bool), 0.1)
    assert empty.tolist() == [0, 0, 0]


def test_centred_targets_equal_a_float64_loop():
    rng = np.random.default_rng(6)
    scores, centre = rng.uniform(-1, 1, (5, 4)), rng.uniform(-1, 1, 4)
    expected = []
    for row in scores:
        powers = [math.exp((row[j] - centre[j]) / 0.07) for j in range(4)]
        expected.append([power / sum(powers) for power in powers])
    got = centred_softmax(torch.tensor(scores).float(), torch.tensor(centre).float(), 0.07)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-7)
    moved, mean = torch.tensor(centre).float(), scores.mean(axis=0)
    for step in (1, 2):
        update_centre(moved, torch.tensor(scores).float(), 0.9)
        np.testing.assert_allclose(moved.numpy(), 0.9**step * centre + (1 - 0.9**step) * mean, rtol=1e-5)
    before = moved.clone()
    update_centre(moved, torch.zeros(0, 4), 0.9)
    assert torch.equal(moved, before)


def test_centring_takes_away_what_all_scores_share():
    scores = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.1, 0.0]])
    assert scores.argmax(dim=1).tolist() == [0, 0]
    assert centred_softmax(scores, scores.mean(dim=0), 0.04).argmax(dim=1).tolist() == [2, 1]


def test_uniform_targets_and_scores_give_ln_k():
    value = dino_cross_entropy(torch.zeros(2, 4, 11), torch.full((2, 2, 11), 1 / 11), pair_terms(4), 0.1)
    assert value.tolist() == pytest.approx([math.log(11)] * 2)


@pytest.mark.parametrize("epsilon", [1e-8, 0.01])
def test_koleo_equals_a_float64_loop(epsilon):
    x = np.random.default_rng(3).normal(size=(7, 5))
    unit = [row / np.sqrt(sum(row**2)) for row in x]
    expected = -np.mean(
        [
            math.log(min(math.sqrt(sum((unit[i] - unit[j]) ** 2)) for j in range(7) if j != i) + epsilon)
            for i in range(7)
        ]
    )
    assert float(koleo(torch.from_numpy(x).float(), epsilon)) == pytest.approx(expected, rel=1e-4)


def test_koleo_does_not_depend_on_the_axes():
    rng = np.random.default_rng(4)
    x = rng.normal(size=64) + 1e-2 * rng.normal(size=(6, 64))  # close together, where epsilon weighs
    rotation = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    values = [float(koleo(torch.from_numpy(points).float(), 0.01)) for points in (x, -x, x @ rotation)]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-4)


def test_koleo_of_coinciding_embeddings_is_bounded_and_pushes_nowhere():
    x = torch.ones(3, 16, requires_grad=True)
    value = koleo(x, 0.01)
    value.backward()
    assert float(value.detach()) == pytest.approx(-math.log(0.01), rel=1e-5)
    assert torch.equal(x.grad, torch.zeros(3, 16))


def test_koleo_repels_neighbours_and_ignores_siblings():
    x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    koleo(x).backward()
    moved = (x - 0.01 * x.grad).detach()
    assert float((moved[0] - moved[1]).norm()) > 0.2
    siblings = torch.tensor([[[1.0, 0.0], [1.0, 1e-6]], [[0.0, 1.0], [1e-6, 1.0]]])  # siblings coincide, parents do not
    assert float(by_position(koleo, siblings)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-4)
    assert float(koleo(siblings[:1, 0])) == 0


def test_kde_equals_a_float64_loop():
    x, kappa = np.random.default_rng(7).normal(size=(6, 5)), 5.0
    unit = [row / np.sqrt(sum(row**2)) for row in x]
    densities = [sum(math.exp(kappa * float(unit[i] @ unit[j])) for j in range(6) if j != i) for i in range(6)]
    expected = sum(math.log(density) for density in densities) / 6
    assert float(kde(torch.from_numpy(x).float(), kappa)) == pytest.approx(expected, rel=1e-5)
    assert float(kde(torch.from_numpy(x[:1]), kappa)) == 0


def test_kde_repels():
    """A step against its gradient moves every pair of a cluster apart; its least value is that of spread points."""
    x = (
        torch.tensor([1.0, 0, 0]) + 0.1 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    ).requires_grad_(True)
    before = torch.pdist(torch.nn.functional.normalize(x, dim=1)).detach()
    kde(x, 5.0).backward()
    after = torch.pdist(torch.nn.functional.normalize(x - 0.3 * x.grad, dim=1)).detach()
    assert float(after.mean()) > 1.1 * float(before.mean()) and float(after.min()) > float(before.min())
    spread = torch.cat([torch.eye(3), -torch.eye(3)])
    assert float(kde(spread, 5.0)) < float(kde(x.detach(), 5.0))


def test_ema_moves_the_teacher_by_its_share():
    teacher, student = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2, requires_grad=True)]
    ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher, [torch.full((3,), 0.1), torch.full((2, 2), 0.9)])


def test_entropy_of_one_hot_and_uniform():
    assert entropy(torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist() == pytest.approx([0, math.log(2)])


def test_schedules_start_and_end_where_they_say():
    assert [cosine(step, 11, 1.0, 0.2) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    lrs = [warmup_cosine(step, 20, 4, 1.0, 0.0) for step in range(20)]
    assert lrs[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert lrs[-1] == pytest.approx(0, abs=1e-12)
    assert lrs[4:] == sorted(lrs[4:], reverse=True)
    assert [linear(step, 4, 0.04, 0.08) for step in (0, 2, 4, 9)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert linear(0, 0, 0.04, 0.07) == 0.07


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_knopp_leaves_its_scores_and_rounds_as_ever(dtype):
    scores = (torch.rand(40, 30, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(dtype)
    before, log_q = scores.clone(), scores.float() / 0.04
    for _ in range(3):
        peak = log_q.amax(dim=0, keepdim=True)
        log_q = log_q - (peak + torch.log(torch.exp(log_q - peak).sum(dim=0, keepdim=True)))
        log_q = log_q.log_softmax(dim=1)
    assert torch.equal(sinkhorn_knopp(scores, 0.04), log_q.exp()) and torch.equal(scores, before)
