"""The evaluation's computations at size against scikit-learn's straightforward calls: seconds, ratios, equal numbers.

    python benchmarks/evaluation.py [--tiles 100000] [--dim 768] [--threads 2] [--repeats 3] [--probe-steps 12500]
    python benchmarks/evaluation.py --large [--tiles 1100000] [--dim 1536] [--folder FOLDER]      time and memory, `mad` alone

Embeddings are random: five classes, a hundred patients with an offset each, 64 directions of falling variance in which a
parent and its 16 children share a place, and noise in all dimensions. The last fifth of the patients is the test set, the one
before it validation. The sides take turns in one process, on the same float32 arrays and threads; medians are printed, of wall
time and, in brackets, of processor time, which other programs disturb less.

The calls are those of the protocols: k-NN with the whole bank and with five bootstrap samples of its patients; one K-Means run of
20 starts; the standardised probe at five strengths, chosen on validation tiles; indices of the clusters and of the classes.
Equal means: k-NN predicts a class with the most votes among scikit-learn's neighbours (ties are broken differently); inertia no
more than 1e-3 higher (starts are random); the probes' objective no more than 1e-6 above scikit-learn's, which has the same
tolerance (1e-6 on the gradient); Davies-Bouldin index, AMI, components, cosines and retrieval to 1e-4 (theirs are float32).
The paper's probe, 12,500 steps of Adam whatever the library, is timed against a plain torch loop and not counted in the total.

`--large` writes the embeddings to FOLDER (kept and used again; else a temporary one) and reads them memory-mapped. Its
memory is the largest anonymous memory of the process, pages of the file aside, which the system takes back when it needs them.
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, davies_bouldin_score, log_loss
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_draws
from mad.evaluation.label_free import retrieval_sums
from mad.evaluation.probe import choose_sound_probe, paper_probe
from mad.metrics.cosine import pair_sums
from mad.metrics.davies_bouldin import davies_bouldin
from mad.metrics.kmeans import kmeans
from mad.metrics.knn import knn_predict
from mad.metrics.mutual_information import adjusted_mutual_information
from mad.metrics.pca import fit_pca

CLASSES, PATIENTS, FAMILY, PLACES = 5, 100, 17, 64
CONFIG = EvaluationConfig()
SEED = 0


class Cohort:
    """Embeddings with classes, patients of one slide each and in order, and families: a parent, then its 16 children."""

    def __init__(self, features: NDArray[np.float32]):
        row = np.arange(len(features))
        family = row // FAMILY
        self.features = features
        self.codes = np.random.default_rng(SEED).integers(0, CLASSES, family[-1] + 1)[family]
        self.patient = family * PATIENTS // (family[-1] + 1)
        ends = np.searchsorted(self.patient, [0, PATIENTS * 3 // 5, PATIENTS * 4 // 5, PATIENTS])
        self.train, self.val, self.test = (slice(*ends[part : part + 2]) for part in range(3))
        self.parents, self.children = row[row % FAMILY == 0], row[row % FAMILY > 0]
        self.parent_of = family[self.children]


def fill(features: NDArray[np.float32]) -> None:
    """Write random embeddings [n, d] of a cohort, chunk by chunk."""
    cohort, generator, dim = Cohort(features), np.random.default_rng(SEED + 1), features.shape[1]

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, np.float32)

    centres, offsets = 0.08 * normal(CLASSES, dim), 0.15 * normal(PATIENTS, dim)
    directions = normal(PLACES, dim) * (0.35 * np.arange(1, PLACES + 1, dtype=np.float32) ** -0.5)[:, None]
    step = FAMILY * 512
    for start in range(0, len(features), step):
        rows = slice(start, min(start + step, len(features)))
        num = rows.stop - rows.start
        places = np.repeat(normal(512, PLACES), FAMILY, axis=0)[:num] + normal(num, PLACES)
        features[rows] = places @ directions + 0.5 * normal(num, dim)
        features[rows] += centres[cohort.codes[rows]] + offsets[cohort.patient[rows]]


class Ours:
    """Every computation by `mad`; the numbers that are compared."""

    def __init__(self, cohort: Cohort, device: str, queries: int | None):
        self.cohort, self.device, self.queries = cohort, device, cohort.features[cohort.test][:queries]

    def knn(self, copies: NDArray | None) -> NDArray[np.int64]:
        c = self.cohort
        return knn_predict(
            c.features[c.train], c.codes[c.train], self.queries, num_classes=CLASSES, copies=copies, device=self.device
        )

    def kmeans(self) -> Any:
        found = kmeans(self.cohort.features, CLASSES, starts=CONFIG.kmeans_starts, device=self.device)
        return found.labels, found.inertia

    def probe(self) -> Any:
        c = self.cohort
        probe, strength, _ = choose_sound_probe(
            c.features[c.train], c.codes[c.train], num_classes=CLASSES, strengths=CONFIG.sound_strengths, fallback=1e-3,
            val_features=c.features[c.val], val_labels=c.codes[c.val], device=self.device,
        )  # fmt: skip
        return probe.weight[0].T.numpy(), probe.bias[0, 0].numpy(), strength

    def dbi(self, clusters: NDArray) -> list[float]:
        of = (clusters, self.cohort.codes)
        return [davies_bouldin(self.cohort.features, labels, device=self.device) for labels in of]

    def ami(self, clusters: NDArray) -> list[float]:
        table = np.zeros((CLASSES, CLASSES), np.int64)
        np.add.at(table, (clusters, self.cohort.codes), 1)
        return adjusted_mutual_information(table[None]).tolist()

    def pca(self) -> Any:
        found = fit_pca(self.cohort.features, 2, device=self.device)
        return found.components, found.explained

    def cosines(self) -> list[float]:
        c = self.cohort
        slides, codes = ((part[c.parents], part[c.children]) for part in (c.patient, c.codes))
        sums = pair_sums(
            c.features[c.parents], c.features[c.children], c.parent_of, slides, PATIENTS, codes, CLASSES
        ).pooled(np.zeros(PATIENTS, np.int64), 1)  # fmt: skip
        total, count = sums.others()
        same = np.eye(CLASSES, dtype=bool)
        others = [total[0, mask].sum() / count[0, mask].sum() for mask in (same, ~same)]
        return [sums.aligned_sum.sum() / sums.aligned_count.sum(), *others]

    def retrieval(self) -> list[float]:
        c = self.cohort
        sums = retrieval_sums(
            c.features[c.parents], c.features[c.children], c.parent_of, c.patient[c.parents], c.patient[c.children], PATIENTS
        )  # fmt: skip
        return [float(part.sum(1)[0]) for part in sums.values()]


class Theirs:
    """The same by scikit-learn."""

    def __init__(self, cohort: Cohort):
        self.cohort = cohort

    def knn(self, copies: NDArray | None) -> Any:
        """Predictions [r, q] and the last bank's model."""
        c = self.cohort
        predicted = []
        for times in np.ones((1, len(c.codes[c.train])), int) if copies is None else copies:
            bank = np.repeat(c.features[c.train], times, axis=0) if copies is not None else c.features[c.train]
            model = KNeighborsClassifier(20, metric="cosine", algorithm="brute")
            predicted.append(model.fit(bank, np.repeat(c.codes[c.train], times)).predict(c.features[c.test]))
        return np.stack(predicted)

    def kmeans(self) -> Any:
        found = KMeans(CLASSES, n_init=CONFIG.kmeans_starts, random_state=SEED).fit(self.cohort.features)
        return found.labels_, found.inertia_

    def probe(self) -> Any:
        c = self.cohort
        scaler = StandardScaler().fit(c.features[c.train])
        rows, val = scaler.transform(c.features[c.train]), scaler.transform(c.features[c.val])
        found = []
        for strength in CONFIG.sound_strengths:
            model = LogisticRegression(C=1 / (len(rows) * strength), tol=1e-6, max_iter=1000).fit(
                rows, c.codes[c.train]
            )
            found.append((log_loss(c.codes[c.val], model.predict_proba(val)), model.coef_, model.intercept_, strength))
        return min(found, key=lambda one: one[0])[1:]

    def dbi(self, clusters: NDArray) -> list[float]:
        return [davies_bouldin_score(self.cohort.features, labels) for labels in (clusters, self.cohort.codes)]

    def ami(self, clusters: NDArray) -> list[float]:
        return [adjusted_mutual_info_score(self.cohort.codes, clusters)]

    def pca(self, solver: str = "full") -> Any:
        found = PCA(2, svd_solver=solver).fit(self.cohort.features)
        return found.components_, found.explained_variance_ratio_

    def cosines(self) -> list[float]:
        c = self.cohort
        children, total, count = c.features[c.children], np.zeros(3), np.zeros(3)
        classes = np.eye(CLASSES, dtype=np.float32)[c.codes[c.children]]
        for start in range(0, len(c.parents), 1024):
            parents = c.parents[start : start + 1024]
            cosine = cosine_similarity(c.features[parents], children)  # [1024, children]
            own = np.flatnonzero((c.parent_of >= start) & (c.parent_of < start + 1024))
            pos = cosine[c.parent_of[own] - start, own].sum(dtype=np.float64)
            of_class = cosine @ classes
            same = of_class[np.arange(len(parents)), c.codes[parents]].sum(dtype=np.float64)
            total += pos, same - pos, of_class.sum(dtype=np.float64) - same
            num_same = classes.sum(0)[c.codes[parents]].sum()
            count += len(own), num_same - len(own), len(parents) * len(children) - num_same
        return list(total / count)

    def retrieval(self) -> list[float]:
        c = self.cohort
        hits = np.zeros(2)
        for slide in range(PATIENTS):
            parents = np.flatnonzero(c.patient[c.parents] == slide)
            children = np.flatnonzero(c.patient[c.children] == slide)
            if len(parents) < 2:
                continue
            cosine = cosine_similarity(c.features[c.children[children]], c.features[c.parents[parents]])
            hits[0] += (parents[cosine.argmax(1)] == c.parent_of[children]).sum()
            cosine = cosine_similarity(c.features[c.parents[parents]], c.features[c.children[children]])
            hits[1] += (c.parent_of[children[cosine.argmax(1)]] == parents).sum()
        return hits.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, help="100,000, or 1,100,000 with --large")
    parser.add_argument("--dim", type=int, help="768, or 1536 with --large")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe-steps", type=int, default=CONFIG.probe_steps, help="of the paper's probe")
    parser.add_argument("--large", action="store_true", help="`mad` alone, on memory-mapped embeddings")
    parser.add_argument("--folder", type=Path, help="where --large keeps the embeddings")
    parser.add_argument("--queries", type=int, help="test tiles of k-NN under --large; not given: all of them")
    parser.add_argument("--only", default="", help="of --large: protocols whose name begins so, as k-NN")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (
        arguments.tiles or (1_100_000 if arguments.large else 100_000),
        arguments.dim or (1536 if arguments.large else 768),
    )
    with threadpool_limits(arguments.threads):
        (large if arguments.large else compare)(shape, arguments)


def copies_of(cohort: Cohort) -> NDArray[np.int64]:
    """The banks of the k-NN protocol [6, n]: whole, then by bootstrap samples of the training patients."""
    patients = cohort.patient[cohort.train]
    draws = patient_draws(int(patients[-1]) + 1, CONFIG.runs, SEED)
    return np.concatenate([np.ones((1, len(patients)), np.int64), draws[:, patients]])


def compare(shape: tuple[int, int], arguments: argparse.Namespace) -> None:
    """Both sides in turns."""
    features = np.empty(shape, np.float32)
    fill(features)
    cohort = Cohort(features)
    ours, theirs, copies = Ours(cohort, arguments.device, None), Theirs(cohort), copies_of(cohort)
    clusters, _ = ours.kmeans()
    print(
        f"{shape[0]} x {shape[1]}, {arguments.threads} threads, {arguments.device}, {arguments.repeats} repeats",
        flush=True,
    )

    def votes(banks: NDArray) -> Callable[[Any, Any], str]:
        return lambda a, b: same_votes(cohort, banks, a, b)

    rows: list[tuple[str, Callable[[], Any], Callable[[], Any], Callable[[Any, Any], str], bool]] = [
        ("k-NN, 6 banks", lambda: ours.knn(copies), lambda: theirs.knn(copies), votes(copies), True),
        ("  of these the whole one", lambda: ours.knn(None), lambda: theirs.knn(None), votes(copies[:1]), False),
        ("K-Means, 20 starts", ours.kmeans, theirs.kmeans, no_worse, True),
        ("probe, 5 strengths", ours.probe, theirs.probe, lambda a, b: same_optimum(cohort, a, b), True),
        ("Davies-Bouldin x 2", lambda: ours.dbi(clusters), lambda: theirs.dbi(clusters), close, True),
        ("AMI", lambda: ours.ami(clusters), lambda: theirs.ami(clusters), close, True),
        ("PCA (theirs: full)", ours.pca, theirs.pca, same_components, True),
        ("  theirs: covariance", ours.pca, lambda: theirs.pca("covariance_eigh"), same_components, False),
        ("cosines of all pairs", ours.cosines, theirs.cosines, close, True),
        ("retrieval in slides", ours.retrieval, theirs.retrieval, close, True),
    ]  # fmt: skip
    total = np.zeros((2, arguments.repeats, 2))  # side, repeat, wall and processor seconds
    for name, mine, other, check, counted in rows:
        seconds = np.empty_like(total)
        for repeat in range(arguments.repeats):
            found = []
            for side, call in enumerate((mine, other)):
                begin = clocks()
                found.append(call())
                seconds[side, repeat] = clocks() - begin
        print(line(name, seconds), "  ", check(*found), flush=True)
        total += counted * seconds
    print(line("together", total), flush=True)
    print(line("paper's probe, 5 runs", paper(cohort, arguments)), "   (theirs: torch.nn.Linear and torch.optim.Adam)")


def clocks() -> NDArray[np.float64]:
    """Wall and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def line(name: str, seconds: NDArray[np.float64]) -> str:
    """Medians of seconds [side, repeat, clock] and of the ratios, with the extremes of that of wall time."""
    mine, other = np.median(seconds, axis=1)
    ratios = seconds[1] / seconds[0]
    wall, processor = np.median(ratios, axis=0)
    return (
        f"{name:26} mad {mine[0]:8.2f} s ({mine[1]:.2f})   scikit-learn {other[0]:8.2f} s ({other[1]:.2f})   "
        f"{wall:.2f} x, {ratios[:, 0].min():.2f}-{ratios[:, 0].max():.2f} ({processor:.2f} x)"
    )


def paper(cohort: Cohort, arguments: argparse.Namespace) -> NDArray[np.float64]:
    """Seconds of the paper's probe, by `mad` (runs side by side) and by a plain loop (one after the other)."""
    rows, codes = cohort.features[cohort.train], cohort.codes[cohort.train]
    begin = clocks()
    paper_probe(
        rows,
        codes,
        num_classes=CLASSES,
        seeds=list(range(CONFIG.runs)),
        steps=arguments.probe_steps,
        device=arguments.device,
    )
    middle = clocks()
    data, target = torch.from_numpy(rows), torch.from_numpy(codes)
    for _ in range(CONFIG.runs):
        layer = torch.nn.Linear(rows.shape[1], CLASSES)
        optimiser = torch.optim.Adam(layer.parameters(), lr=CONFIG.probe_lr)
        for _ in range(arguments.probe_steps):
            index = torch.randint(len(codes), (CONFIG.probe_batch,))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(layer(data[index]), target[index]).backward()
            optimiser.step()
    return np.stack([middle - begin, clocks() - middle])[:, None]


def large(shape: tuple[int, int], arguments: argparse.Namespace) -> None:
    """Time and memory of `mad` on memory-mapped embeddings."""
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mad-evaluation-"))
    path = folder / f"embeddings-{shape[0]}-{shape[1]}.npy"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            fill(np.lib.format.open_memmap(partial, "w+", np.float32, shape))
            partial.rename(path)
        cohort = Cohort(np.load(path, mmap_mode="r"))
        ours, copies = Ours(cohort, arguments.device, arguments.queries), copies_of(cohort)
        print(f"{shape[0]} x {shape[1]} memory-mapped, {arguments.threads} threads, {arguments.device}")
        clusters = cohort.codes  # until K-Means has run
        steps: dict[str, Callable[[], Any]] = {
            "K-Means, 20 starts": ours.kmeans, "Davies-Bouldin x 2": lambda: ours.dbi(clusters),
            "AMI": lambda: ours.ami(clusters), "PCA": ours.pca, "probe, 5 strengths": ours.probe,
            "cosines of all pairs": ours.cosines, "retrieval in slides": ours.retrieval,
            f"k-NN, 6 banks, {len(ours.queries)} queries": lambda: ours.knn(copies),
        }  # fmt: skip
        total = 0.0
        for name, call in ((name, call) for name, call in steps.items() if name.startswith(arguments.only)):
            with Memory() as memory:
                begin = time.perf_counter()
                found = call()
                seconds = time.perf_counter() - begin
            clusters = found[0] if name.startswith("K-Means") else clusters
            total += seconds
            print(f"{name:34} {seconds:8.1f} s, memory {memory.before:.2f} -> {memory.peak:.2f} GiB", flush=True)
        print(f"{'together':34} {total:8.1f} s")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


class Memory:
    """Largest anonymous memory of this process in GiB while a block runs, read twenty times a second."""

    def __enter__(self) -> "Memory":
        self.before = self.peak = self._now()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watch.join()

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 2**20


def verdict(equal: bool, text: str) -> str:
    return f"{'equal' if equal else 'DIFFERENT'}: {text}"


def close(mine: Any, other: Any) -> str:
    mine, other = np.array(mine), np.array(other)
    return verdict(
        bool(np.allclose(mine, other, rtol=1e-4, atol=1e-6)), f"{mine.round(6).tolist()} and {other.round(6).tolist()}"
    )


def no_worse(mine: Any, other: Any) -> str:
    return verdict(mine[1] <= other[1] * 1.001, f"inertia {mine[1]:.1f} and {other[1]:.1f}")


def same_components(mine: Any, other: Any) -> str:
    angle = np.abs((mine[0] * other[0]).sum(1)).min()
    difference = np.abs(mine[1] / other[1] - 1).max()
    return verdict(
        bool(angle > 1 - 1e-4 and difference < 1e-4), f"cosine of the axes {angle:.7f}, shares to {difference:.1e}"
    )


def same_votes(cohort: Cohort, copies: NDArray, mine: NDArray, other: NDArray) -> str:
    """Of the predictions that differ, those whose class has fewer votes among scikit-learn's neighbours than another."""
    wrong, bank, codes = 0, cohort.features[cohort.train], cohort.codes[cohort.train]
    for times, a, b in zip(copies, mine, other, strict=True):
        differ = np.flatnonzero(a != b)
        if len(differ):
            model = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(
                np.repeat(bank, times, axis=0), np.repeat(codes, times)
            )
            votes = model.predict_proba(cohort.features[cohort.test][differ])
            wrong += int((votes[np.arange(len(differ)), a[differ]] < votes.max(1) - 1e-9).sum())
    return verdict(
        wrong <= 1e-4 * mine.size,
        f"{(mine != other).mean():.2%} differ by a tie, {wrong} of {mine.size} else (rounding)",
    )


def same_optimum(cohort: Cohort, mine: Any, other: Any) -> str:
    """Objectives in float64 at what both sides found."""
    rows = StandardScaler().fit_transform(cohort.features[cohort.train].astype(np.float64))
    codes, strength = cohort.codes[cohort.train], other[2]

    def objective(weight: NDArray, bias: NDArray, _: float) -> float:
        logits = torch.from_numpy(rows @ weight.T.astype(np.float64) + bias)
        return float(
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(codes))
            + strength / 2 * (weight.astype(np.float64) ** 2).sum()
        )

    a, b = objective(*mine), objective(*other)
    return verdict(
        mine[2] == other[2] and a <= b + 1e-6, f"strengths {mine[2]:g}, {other[2]:g}, objectives {a:.8f}, {b:.8f}"
    )


if __name__ == "__main__":
    main()
