"""The configuration, checked, and the names of files. Nothing heavy is imported here: every cluster job parses it again."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from huggingface_hub import get_token
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from mad.config import parse_config, read_config
from mad.config.recipe import freeze_recipe
from mad.config.regions import region_magnifications
from mad.config.weights import weights_file
from mad.files import MadError, digest, is_there, read_json, write_json_if_changed
from mad.slides.sheet import cohort_rows
from mad.slides.shown import viewed_slides

# Rules call `python`: the one that runs Snakemake, unless a rule's own environment comes first. It finds `mad` here.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
    PYTHONPATH=os.pathsep.join(
        filter(None, [workflow.basedir, os.environ.get("PYTHONPATH")])
    ),
)


try:
    for path in workflow.configfiles:
        read_config(Path(path))  # refuses keys that stand there twice
    CFG = parse_config(config, source="config.yaml or a --configfile")
    SLIDES = {row.slide_id: row for row in cohort_rows(CFG)}
    VIEWED = viewed_slides(SLIDES.values(), CFG)
except MadError as error:
    raise WorkflowError(str(error)) from None

if not any(is_there(row.path) for row in SLIDES.values()) and CFG.cohort.sheet:
    raise WorkflowError(
        f"{CFG.cohort.sheet}: none of its {len(SLIDES)} slides is there, the first being "
        f"{next(iter(SLIDES.values())).path}; is their disk mounted?"
    )

RESULTS = CFG.results
RUNS = {run.name: run for run in CFG.runs}
ENCODERS = {encoder.name: encoder for encoder in CFG.encoders}
ADAPTERS = {adapter.name: adapter for adapter in CFG.adapters}
MIXERS = {mixer.name: mixer for mixer in CFG.mixers}
TARGETS = {target.name: target for target in CFG.biomarkers.targets}
AGGREGATORS = {entry.name: entry for entry in CFG.biomarkers.aggregators}
EVALUATIONS = [f"{protocol}.json" for protocol in CFG.evaluate.protocols] + [
    "pca.parquet",
    "segmentation.parquet",
    "patients.npz",
]

# What the commands read, by way of the environment, in a file named by its content: a dry run with other settings never
# changes what running jobs read. Rules name what they depend on as parameters, so that a change reruns just what it concerns.
SETTINGS = CFG.model_dump(mode="json")
validate(SETTINGS, "../schemas/config.schema.json", set_default=False)
settings_file = f"{RESULTS}/.config/{digest(SETTINGS)}.json"
write_json_if_changed(settings_file, SETTINGS)
os.environ.update(MAD_CONFIG=settings_file)
for name in RUNS:
    write_json_if_changed(
        f"{RESULTS}/train/{name}/recipe.json", freeze_recipe(CFG, name)
    )


envvars:
    "MAD_CONFIG",


wildcard_constraints:
    slide="[A-Za-z0-9][A-Za-z0-9_-]*",
    run="[A-Za-z0-9][A-Za-z0-9_-]*",
    encoder="[A-Za-z0-9][A-Za-z0-9_-]*",
    mixer="[A-Za-z0-9][A-Za-z0-9_-]*",
    adapter="[A-Za-z0-9][A-Za-z0-9_-]*",


def results(pattern, **wildcards):
    """Paths under the results folder, one per combination of wildcards."""
    return expand(f"{RESULTS}/{pattern}", **wildcards)


def section(name, **kwargs):
    """A section of the configuration as a parameter."""
    return digest(getattr(CFG, name).model_dump(mode="json", **kwargs))


def more_each_try(amount):
    """A resource for Slurm (MB, minutes) that grows with `--retries`: a job that was killed for want of it may do then."""
    return lambda wildcards, attempt: amount * attempt


def training_threads(wildcards):
    """Of all training processes of a run and of those that load their data."""
    runtime = RUNS[wildcards.run].runtime
    return runtime.processes * ((runtime.threads or 2) + runtime.workers)


def training_memory(wildcards):
    """MB of main memory, network and optimiser on a GPU; the same at each try, for most are resumptions.

    Each process indexes the shards: 590 bytes a row, where a table has 49 on the disk. Snakemake asks again once they are made.
    """
    runtime = RUNS[wildcards.run].runtime
    tables = [Path(path) for path in results("shard/{slide}.parquet", slide=SLIDES)]
    index = 12 * sum(path.stat().st_size for path in tables if path.exists())
    return runtime.processes * (8000 + 1000 * runtime.workers + index // 10**6)


def cohort_row(row):
    """What the cohort table holds of a line of the sheet; the synthetic cohort has no sheet whose columns could change alone."""
    return replace(row, targets={}) if CFG.cohort.sheet else row


def slide_file(wildcards):
    """The slide, where it is there: a missing one is the tile job's to report, not the end of the cohort."""
    path = SLIDES[wildcards.slide].path
    return [path] if CFG.cohort.sheet is None or is_there(path) else []


def annotations(slides):
    """The annotations of slides, of those for which the sheet names one that is there."""
    paths = filter(None, (SLIDES[slide].annotation for slide in slides))
    return [p for p in paths if CFG.cohort.sheet is None or is_there(p)]


def annotation_file(wildcards):
    """The annotation of a job's slide, if it has one."""
    return annotations([wildcards.slide])


def viewed_annotations(wildcards):
    """Those of the slides that are shown."""
    return annotations(VIEWED)


def is_settled(name):
    """Whether a run is trained by its recipe of today, and nobody asks for it again with -R.

    Snakemake looks for no reason to run a job whose `ancient` input is about to be made: a changed recipe, or -R, would be passed
    over where the data change as well.
    """
    summary = Path(f"{RESULTS}/train/{name}/summary.json")
    wanted = workflow.dag_settings
    forced = {*wanted.forcerun, *(wanted.targets if wanted.forcetargets else ())}
    if wanted.forceall or forced & {"train_run", str(summary)}:
        return False
    recipe = digest(freeze_recipe(CFG, name))
    return summary.exists() and read_json(summary).get("recipe_digest") == recipe


def run_inputs(wildcards):
    """The frozen recipe, the weights that the run starts from, and the shards, whose later changes do not retrain it."""
    run = RUNS[wildcards.run]
    unless_settled = ancient if is_settled(wildcards.run) else str
    kind, _, target = run.init.partition(":")
    start = {"run": f"{RESULTS}/train/{target}/summary.json", "file": run.init_file}
    return {
        "recipe": f"{RESULTS}/train/{wildcards.run}/recipe.json",
        "shards": unless_settled(f"{RESULTS}/shard/cohort.json"),
        # The synthetic cohort is checked before anything trains on it.
        **(
            {}
            if CFG.cohort.sheet
            else {"check": unless_settled(f"{RESULTS}/synthetic/check.json")}
        ),
        **({"init": start[kind]} if kind in start else {}),
        **(teacher_inputs(run.distill, unless_settled) if run.distill else {}),
    }


def teacher_inputs(distill, unless_settled):
    """The weights of a frozen teacher, and its embeddings where those are read; more slides alone retrain nothing."""
    audit = f"{RESULTS}/embed/{distill.teacher}/audit.json"
    return {
        "teacher": encoder_files(ENCODERS[distill.teacher]),
        **({"features": unless_settled(audit)} if distill.cache else {}),
    }


def encoder_inputs(wildcards):
    """What the encoder of a job is made of."""
    return encoder_files(ENCODERS[wildcards.encoder])


def encoder_files(encoder):
    """The files that hold an encoder, where they are on a disk; of an adapter its head and the embeddings that it adapts."""
    kind, _, target = encoder.spec.partition(":")
    made = {"run": "summary.json", "random": "recipe.json"}
    if kind in made:
        return [f"{RESULTS}/train/{target}/{made[kind]}"]
    if kind == "adapter":
        base = f"{RESULTS}/embed/{ADAPTERS[target].encoder}/audit.json"
        return [f"{RESULTS}/adapt/{target}/summary.json", base]
    named = target if kind == "local-dir" else encoder.weights
    files = [weights_file(named)] if named else []
    if kind == "local-dir":
        files.append(Path(target) / "config.json")
    return [str(path) for path in files if path.is_file()]


def weights_access(encoder):
    """Changes where an encoder that is absent so far should be tried again; None where it is there."""
    audit = Path(f"{RESULTS}/embed/{encoder.name}/audit.json")
    if not audit.exists() or read_json(audit).get("status") != "absent":
        return None
    return [bool(get_token()), CFG.on_missing_encoder]


def print_quality():
    """How many slides failed, from the QC page's numbers where they are newer than the slides' own."""
    numbers = Path(f"{RESULTS}/report/qc.json")
    facts = [Path(path) for path in results("tile/{slide}.json", slide=SLIDES)]
    if numbers.exists() and all(
        path.exists() and path.stat().st_mtime <= numbers.stat().st_mtime
        for path in facts
    ):
        print(read_json(numbers)["line"], file=sys.stderr)


def aggregator_inputs(wildcards):
    """What vouches for the tokens: the encoder's audit, or the mixer's summary (and its encoder's, whose tiles it mixes)."""
    entry = AGGREGATORS[wildcards.aggregator]
    encoder = entry.encoder or MIXERS[entry.mixer].encoder
    mixer = [f"{RESULTS}/mix/{entry.mixer}/summary.json"] if entry.mixer else []
    return [f"{RESULTS}/embed/{encoder}/audit.json", *mixer]


def target_cells(wildcards):
    """What a target reads of the cohort: whose each slide is, and the cell of its column."""
    column = TARGETS[wildcards.target].column
    rows = [{**vars(row), **row.targets} for row in SLIDES.values()]
    return digest(
        [[row["slide_id"], row["patient_id"], row.get(column)] for row in rows]
    )
