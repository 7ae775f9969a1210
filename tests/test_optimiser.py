"""Parameter groups, frozen backbones, accumulation, activation checkpointing, and the memory that a step needs."""

import copy

import fakes
import pytest
import torch

from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.heads import Network, build_network
from mad.models.masked import patch_grid
from mad.models.vit import build_backbone
from mad.training import loop, memory, parallel
from mad.training.data import TrainingSet, batches
from mad.training.health import choose_health_set
from mad.training.index import load_index
from mad.training.method import SelfDistillation
from mad.training.objective import Numerics, step_loss, teach
from mad.training.optimiser import build_optimiser, describe_rates, parameter_groups, set_schedules

ARGS = {"depth": 2, "embed_dim": 24, "patch_size": 8, "reg_tokens": 1, "init_values": 1e-5}
TWO_BLOCKS = {"model": "vit_tiny_patch16_224", "args": ARGS}

# Name (blocks share theirs), whether it decays, learning rate with layer_decay .5, patch_embed_lr .2 and backbone_lr .5:
# patches and tokens lie 3 layers below the head, block 0 two, block 1 and the final norm one.
TABLE = """
cls_token                yes .0625
reg_token                yes .0625
pos_embed                yes .0625
patch_embed.proj.weight  yes .0125
patch_embed.proj.bias    no  .0125
blocks.N.norm1.weight    no  N
blocks.N.norm1.bias      no  N
blocks.N.attn.qkv.weight yes N
blocks.N.attn.qkv.bias   no  N
blocks.N.attn.proj.weight yes N
blocks.N.attn.proj.bias  no  N
blocks.N.ls1.gamma       no  N
blocks.N.norm2.weight    no  N
blocks.N.norm2.bias      no  N
blocks.N.mlp.fc1.weight  yes N
blocks.N.mlp.fc1.bias    no  N
blocks.N.mlp.fc2.weight  yes N
blocks.N.mlp.fc2.bias    no  N
blocks.N.ls2.gamma       no  N
norm.weight              no  .25
norm.bias                no  .25
"""


def network(run: RunConfig) -> Network:
    backbone = build_backbone(run.backbone, fakes.TILE_PX)
    return build_network(backbone, run)


def wanted_rates() -> dict[str, tuple[bool, float]]:
    wanted = {}
    for name, decays, rate in (line.split() for line in TABLE.strip().splitlines()):
        for block, block_rate in enumerate((0.125, 0.25)) if "N" in name else [(0, 0.0)]:
            value = block_rate if rate == "N" else float(rate)
            wanted["backbone." + name.replace("N", str(block))] = (decays == "yes", value)
    for layer in (0, 2, 4):
        wanted |= {f"head.mlp.{layer}.weight": (True, 1.0), f"head.mlp.{layer}.bias": (False, 1.0)}
    return wanted | {"head.prototypes": (True, 1.0)}


def test_groups_of_a_vit_are_those_of_the_table():
    rates = {"layer_decay": 0.5, "patch_embed_lr": 0.2, "backbone_lr": 0.5}
    run = RunConfig(**fakes.tiny_run(backbone=TWO_BLOCKS, lr=1.0, warmup=0, **rates))
    student = network(run)
    names = {id(p): name for name, p in student.named_parameters()}
    optimiser = build_optimiser(student, run)
    assert set_schedules(optimiser, run, 0) == 1.0
    found = {
        names[id(p)]: (group["weight_decay"] > 0, pytest.approx(group["lr"]))
        for group in optimiser.param_groups
        for p in group["params"]
    }
    assert found == wanted_rates()
    assert "0.0125 to 1" in describe_rates(optimiser, run)


def test_by_default_there_are_two_groups_and_all_learn_alike():
    run = RunConfig(**fakes.tiny_run(backbone=TWO_BLOCKS))
    student = network(run)
    decayed, plain = parameter_groups(student, run)
    assert [group["lr_scale"] for group in (decayed, plain)] == [1.0, 1.0]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(student.parameters()))
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])


def test_a_mask_token_learns_with_the_patches_and_adds_no_layer():
    run = RunConfig(**fakes.tiny_run(backbone=TWO_BLOCKS, layer_decay=0.5, ibot={"weight": 1.0}))
    student = network(run)
    names = {id(p): name for name, p in student.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in parameter_groups(student, run) for p in group["params"]}
    assert scales["mask_token"] == scales["backbone.cls_token"] == 0.125
    assert scales["backbone.norm.weight"] == 0.5


def test_averaged_patches_have_the_layers_of_the_class_token():
    scales = {}
    for pooling in ("cls", "avg"):
        run = RunConfig(**fakes.tiny_run(backbone={**TWO_BLOCKS, "pooling": pooling}, layer_decay=0.5))
        student = network(run)
        names = {id(p): name for name, p in student.named_parameters()}
        scales[pooling] = {names[id(p)]: g["lr_scale"] for g in parameter_groups(student, run) for p in g["params"]}
    assert scales["avg"]["backbone.fc_norm.weight"] == scales["cls"]["backbone.norm.weight"] == 0.5
    same = scales["cls"].keys() & scales["avg"].keys()
    assert {name: scales["avg"][name] for name in same} == {name: scales["cls"][name] for name in same}


def test_a_convolutional_network_has_layers_too_but_no_patch_embedding():
    backbone = {"model": "test_efficientnet_gn", "pooling": "avg"}
    run = RunConfig(**fakes.tiny_run(backbone=backbone, layer_decay=0.5))
    assert len({group["lr_scale"] for group in parameter_groups(network(run), run)}) > 3
    run = RunConfig(**fakes.tiny_run(backbone=backbone, patch_embed_lr=0.2))
    with pytest.raises(MadError, match=r"patch_embed_lr.*no patch embedding"):
        parameter_groups(network(run), run)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


def parts(results, **changes):
    entry = RunConfig(**fakes.tiny_run(**changes))
    index = load_index(results / "shard", "train", entry.children)
    student, teacher = loop.build_networks(entry, fakes.TILE_PX, 0)
    state = loop.Run(student, teacher, build_optimiser(student, entry), {}, "float32", entry.batch)
    numerics = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)
    grid = patch_grid(student.backbone, fakes.TILE_PX) if entry.ibot.weight else None
    data = TrainingSet(index, entry, fakes.TILE_PX, 16, 0, grid)
    return state, data, choose_health_set({"train": index}, fakes.TILE_PX, 8), numerics


def bytes_of(module):
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def test_a_frozen_backbone_stays_bit_for_bit_while_the_head_learns(results, tmp_path, monkeypatch):
    batch_norm = {"model": "test_efficientnet", "pooling": "avg"}  # its running statistics must not move either
    state, data, health, numerics = parts(
        results, backbone=batch_norm, steps=6, warmup=2, freeze_backbone=4, freeze_last_layer=0
    )
    networks = (state.student, state.teacher)
    start = [bytes_of(net.backbone) for net in networks], [bytes_of(net.head) for net in networks]
    seen, rates, original = [], [], loop.optimise

    def spy(*arguments):
        value = original(*arguments)
        seen.append(([bytes_of(net.backbone) for net in networks], [bytes_of(net.head) for net in networks]))
        rates.append({group["waits"]: group["lr"] for group in state.optimiser.param_groups})
        return value

    monkeypatch.setattr(loop, "optimise", spy)
    loop.train(state, data, SelfDistillation(data.run, numerics, health), tmp_path)
    for backbones, heads in seen[:4]:
        assert backbones == start[0]
        assert heads[0] != start[1][0] and heads[1] != start[1][1]
    for step in (4, 5):
        assert seen[step][0][0] != seen[step - 1][0][0] and seen[step][0][1] != seen[step - 1][0][1]
    assert rates[4][True] == pytest.approx(rates[4][False] / 2) and rates[5][True] == rates[5][False]
    assert state.student.backbone.training


def gradients(network):
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


MASKED = {"ibot": {"weight": 1.0, "head": "shared"}}
UNEVEN = {"mix": {}, "mix_mode": "within", "batch": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"centring": "ema"},
        UNEVEN | MASKED,
        UNEVEN | MASKED | {"method": "mad_global"},
        UNEVEN | MASKED | {"method": "dinov2", "pair_tiles": "all"},
    ],
)
def test_an_accumulated_step_is_the_step_at_once(results, changes):
    """Targets are balanced over the whole step: without the regulariser two passes and one give one gradient, and one centre."""
    found, size = [], changes.get("batch", 4)
    for micro in (2, size):
        state, data, _, numerics = parts(
            results, **{"runtime": {"micro_batch": micro}, "mix": {"10x-40x": 1}, "koleo": 0} | changes
        )
        passes = parallel.num_passes(data.run, 1)
        assert passes == size // micro

        def teach_all(step, state=state, data=data, numerics=numerics):
            return teach(state.student, state.teacher, step, data.run, numerics, 0.05)

        def loss_of(model, batch, targets, state=state, data=data, numerics=numerics):
            return step_loss(model, state.teacher, batch, data.run, numerics, 0.05, targets)

        loader = batches(data, start=3, rank=0, world=1, workers=0, passes=passes)
        seen = loop.accumulate(state.student, state, loader, passes, teach_all, loss_of)
        centre = dict(state.student.named_buffers()).get("centre", torch.zeros(1))
        found.append((gradients(state.student), seen.losses["total"], centre, seen.tiles, seen.images))
    (several, several_loss, *several_rest), (once, once_loss, *once_rest) = found
    torch.testing.assert_close(several, once, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(several_loss, once_loss)
    torch.testing.assert_close(several_rest[0], once_rest[0])
    assert several_rest[1:] == once_rest[1:]


def test_the_regulariser_sees_one_pass(results):
    state, data, _, numerics = parts(results, runtime={"micro_batch": 2}, mix={"10x-40x": 1})
    two = [data.__getitems__(numbers) for numbers in ([12, 13], [14, 15])]
    targets = teach(state.student, state.teacher, two, data.run, numerics, 0.05)
    losses = [
        step_loss(state.student, state.teacher, batch, data.run, numerics, 0.05, taught)
        for batch, taught in zip(two, targets, strict=True)
    ]
    whole = step_loss(state.student, state.teacher, data.__getitems__(list(range(12, 16))), data.run, numerics, 0.05)
    assert whole.dino.item() == pytest.approx(sum(loss.dino.item() for loss in losses) / 2)
    assert whole.spread.item() != pytest.approx(sum(loss.spread.item() for loss in losses) / 2, rel=1e-3)


def test_passes_hold_the_same_samples_on_any_number_of_processes(results):
    _, data, _, _ = parts(results, batch=8, steps=4)

    def tiles(world, passes):
        loaders = [batches(data, start=2, rank=r, world=world, workers=0, passes=passes) for r in range(world)]
        return [[tile for loader in loaders for tile in next(loader).tiles] for _ in range(2 * passes)]

    assert tiles(1, 2) == tiles(2, 2) == tiles(4, 2)
    assert [tile for part in tiles(2, 2) for tile in part] == [tile for part in tiles(1, 1) for tile in part]


def test_passes_must_fit_and_fewer_samples_per_pass_are_told():
    run = RunConfig(**fakes.tiny_run(batch=12, runtime={"micro_batch": 4}))
    assert (parallel.num_passes(run, 1), parallel.num_passes(run, 3)) == (3, 1)
    assert parallel.spread_over(run, 1) == 4 and parallel.spread_over(run, 3) == 12
    assert "sees 4 samples at a time, not the 12" in parallel.spread_note(run, 1)
    assert parallel.spread_note(run, 3) is None
    alone = run.model_copy(update={"koleo": 0.0})
    assert parallel.spread_over(alone, 1) == 12 and parallel.spread_note(alone, 1) is None
    with pytest.raises(MadError, match=r"micro_batch: 6 samples per process.*take one of 1, 2, 3, 6"):
        parallel.num_passes(run, 2)


@pytest.mark.parametrize("backbone", [TWO_BLOCKS, {"model": "test_efficientnet_gn", "pooling": "avg"}])
def test_checkpointed_activations_change_no_gradient_and_keep_less(results, backbone):
    state, data, _, numerics = parts(results, backbone=backbone)
    batch = data.__getitems__(list(range(4)))

    def measure(student):
        kept = memory.saved_bytes(student, state.teacher, lambda: loss(student))
        loss(student).backward()
        return kept, gradients(student)

    def loss(student):
        torch.manual_seed(0)
        return step_loss(student, state.teacher, batch, data.run, numerics, 0.05).total

    plain, sparing = copy.deepcopy(state.student), state.student
    parallel.checkpoint_activations(sparing.backbone)
    (kept, expected), (kept_sparing, found) = measure(plain), measure(sparing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert kept_sparing < 0.8 * kept
    with parallel.first_block_kept(sparing.backbone):  # as when its gradient is computed
        at_block = memory.saved_bytes(sparing, state.teacher, lambda: loss(sparing))
    assert kept_sparing < at_block < kept
    if backbone is TWO_BLOCKS:  # of one size
        assert at_block == pytest.approx((kept + kept_sparing) / 2, rel=0.02)
    assert memory.saved_bytes(sparing, state.teacher, lambda: loss(sparing)) == kept_sparing
    trial = [data.__getitems__([0] * count) for count in (1, 2)]
    estimate = memory.estimate_memory(
        sparing,
        state.teacher,
        [trial],
        lambda part: step_loss(sparing, state.teacher, part, data.run, numerics, 0.05).total,
        4,
    )
    assert estimate.activations > 1.1 * kept_sparing
    assert bytes_of(plain).keys() == bytes_of(sparing).keys()


def test_running_statistics_are_not_counted_twice():
    run = RunConfig(**fakes.tiny_run(backbone={"model": "test_efficientnet", "pooling": "avg"}))
    with pytest.raises(MadError, match="batch norms, whose statistics would count twice"):
        parallel.checkpoint_activations(network(run).backbone)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_equal_losses(results, checkpointing):
    """By the backend that traces and differentiates as inductor does, without its minute of C++."""
    state, data, _, numerics = parts(results, backbone=TWO_BLOCKS)
    batch = data.__getitems__(list(range(4)))
    compiled = copy.deepcopy(state.student)
    if checkpointing:
        parallel.checkpoint_activations(compiled.backbone)
    parallel.compile_blocks(compiled, backend="aot_eager")
    assert compiled.state_dict().keys() == state.student.state_dict().keys()
    losses = [step_loss(net, state.teacher, batch, data.run, numerics, 0.05).total for net in (compiled, state.student)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(compiled), gradients(state.student), rtol=1e-3, atol=1e-5)


def test_the_estimate_counts_what_torch_holds(results):
    state, data, _, numerics = parts(results)

    def loss(batch):
        return step_loss(state.student, state.teacher, batch, data.run, numerics, 0.05).total

    trials = memory.trial_batches(data)
    assert len(trials) == 3
    before = bytes_of(state.student)
    generator = torch.get_rng_state()
    estimate = memory.estimate_memory(state.student, state.teacher, trials, loss, samples=4)
    assert torch.equal(generator, torch.get_rng_state()) and bytes_of(state.student) == before
    loss(data.__getitems__(list(range(4)))).backward()
    state.optimiser.step()
    grads = sum(p.grad.nbytes for p in state.student.parameters())
    moments = sum(v.nbytes for s in state.optimiser.state.values() for k, v in s.items() if k != "step")
    assert (estimate.weights, estimate.gradients, estimate.moments) == (grads, grads, moments)
    four = [memory.saved_bytes(state.student, state.teacher, lambda b=b: loss(b)) for b in
            (data.__getitems__([n] * 4) for n in range(0, 24, 4))]  # fmt: skip
    assert estimate.activations == pytest.approx(max(four), rel=0.05)


def test_the_images_of_both_networks_are_counted_once_each():
    student, teacher = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    mine, theirs = torch.rand(5, 8), torch.rand(3, 8)

    def forward(*images):
        with torch.no_grad():
            teacher(images[0])
        return student(images[-1]).sum()

    assert memory.saved_bytes(student, teacher, lambda: forward(theirs, mine)) == theirs.nbytes + mine.nbytes
    assert memory.saved_bytes(student, teacher, lambda: forward(mine, mine)) == mine.nbytes
    assert not student._forward_pre_hooks and not teacher._forward_pre_hooks


def test_the_pixels_of_all_passes_are_counted(results):
    state, data, _, numerics = parts(results, method="dinov2", mix={"10x-40x": 1})
    trials = memory.trial_batches(data)

    def loss(batch):
        return step_loss(state.student, state.teacher, batch, data.run, numerics, 0.05).total

    estimate = memory.estimate_memory(state.student, state.teacher, trials, loss, samples=4, passes=3)
    ((one, _),) = trials
    side, local = fakes.TILE_PX, 16
    assert estimate.pixels == 12 * 3 * (2 * side**2 + 2 * local**2) == 12 * memory.pixel_bytes(one)
    assert estimate.total == estimate.weights * 4 + estimate.teacher + estimate.activations + estimate.pixels


def test_where_targets_fill_the_memory_fewer_prototypes_are_advised():
    def advice(targets, **changes):
        run = RunConfig(**fakes.tiny_run(**changes))
        return memory.remedies(
            run, memory.MemoryEstimate(1, 1, 1, 1, fixed=10, per_sample=10, samples=4, targets=targets)
        )

    assert "micro_batch" in advice(10) and "prototypes" in advice(10) and "resumes" in advice(10)
    assert "micro_batch" not in advice(100) and "activation_checkpointing" not in advice(100)
    assert "runtime.processes" in advice(100) and "ibot.prototypes" not in advice(100)
    assert "head.prototypes or ibot.prototypes, or a smaller batch" in advice(100, ibot={"weight": 1})
    estimate = memory.MemoryEstimate(1, 1, 1, 1, fixed=10, per_sample=10, samples=4, targets=100)
    with (
        pytest.raises(MadError, match="runtime.processes"),
        memory.memory_errors(RunConfig(**fakes.tiny_run()), torch.device("cpu")) as estimates,
    ):
        estimates.append(estimate)
        raise MemoryError
    only = advice(10, runtime={"micro_batch": 1, "activation_checkpointing": True})
    assert only == "train another run with a smaller backbone or fewer head.prototypes"


def test_exhausted_memory_names_what_to_lower(results, tmp_path):
    state, data, health, numerics = parts(results, runtime={"micro_batch": 2})
    state.student.backbone.register_forward_hook(lambda *_: torch.empty(1 << 52, dtype=torch.uint8))
    with pytest.raises(
        MadError, match=r"not enough memory on cpu.*micro_batch \(now 2\).*activation_checkpointing: true"
    ):
        loop.train(state, data, SelfDistillation(data.run, numerics, health), tmp_path)
    run = data.run
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(MadError, match="not enough memory"), memory.memory_errors(run, numerics.device):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory.memory_errors(run, numerics.device):
        raise RuntimeError("shapes differ")


def test_the_estimate_counts_the_targets_of_all_passes(results):
    state, data, _, numerics = parts(results, method="mad_global", mix={"10x-40x": 1}, batch=32, **MASKED)
    trials, held = memory.trial_batches(data), 0
    for targets in teach(state.student, state.teacher, [data.__getitems__(range(n, n + 4)) for n in range(0, 32, 4)],
                         data.run, numerics, 0.05):  # fmt: skip
        held += sum(part.nbytes for part in targets.probabilities)
    counted = memory.target_bytes(data.run, trials, 32)
    assert counted == pytest.approx(held, rel=0.25)  # masks are drawn

    def estimate(targets):
        return memory.MemoryEstimate(1, 1, 1, 1, fixed=10, per_sample=10, samples=4, targets=targets)

    assert [estimate(n).total for n in (0, 10, 100)] == [54, 64, 404]
    assert "targets of all passes 0.0001 MB" in str(estimate(100))
    assert "targets" not in str(estimate(0))
