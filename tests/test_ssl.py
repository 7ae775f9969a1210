"""Losses against float64 loops written from their formulas, and Sinkhorn-Knopp over two processes against one."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mad.training import ranks
from mad.training.schedule import cosine, linear, warmup_cosine
from mad.training.ssl import (
    dino_cross_entropy,
    ema_update,
    entropy,
    koleo,
    koleo_by_position,
    multicrop_terms,
    pair_terms,
    sinkhorn_knopp,
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
    koleo_by_position(ranks.gather(own)).backward()
    torch.save((q, own.grad / 2, sharp), f"{path}/{rank}.pt")  # DistributedDataParallel averages over processes
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_targets_and_koleo_gradients_of_one(tmp_path):
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
    koleo_by_position(single).backward()
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), single.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("terms", [pair_terms(4), multicrop_terms(2, 3)])
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
    assert float(koleo_by_position(siblings)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-4)
    assert float(koleo(siblings[:1, 0])) == 0


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
