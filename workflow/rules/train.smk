def run_inputs(wildcards):
    """The frozen recipe, the encoder that the run starts from, and the shards, whose later changes do not retrain it."""
    kind, _, target = RUNS[wildcards.run].init.partition(":")
    return {
        "recipe": f"{RESULTS}/train/{wildcards.run}/recipe.json",
        "shards": ancient(f"{RESULTS}/shard/cohort.json"),
        # The synthetic cohort is checked before anything trains on it.
        **(
            {}
            if CFG.cohort.sheet
            else {"check": ancient(f"{RESULTS}/synthetic/check.json")}
        ),
        **({"init": f"{RESULTS}/train/{target}/summary.json"} if kind == "run" else {}),
    }


rule shard_cohort:
    input:
        results("shard/{slide}.parquet", slide=SLIDES),
    output:
        f"{RESULTS}/shard/cohort.json",
    log:
        f"{RESULTS}/logs/shard/cohort.log",
    localrule: True
    conda:
        "../../envs/mad.yaml"
    shell:
        "python -m mad shard-cohort --config {CONFIG} >> {log} 2>&1"


# Only the summary is declared: Snakemake deletes declared outputs before a rerun, and a training that fails must keep its
# checkpoints and weights. `exec`, so that a SIGTERM reaches the trainer, which saves and leaves.
rule train_run:
    input:
        unpack(run_inputs),
    output:
        f"{RESULTS}/train/{{run}}/summary.json",
    log:
        f"{RESULTS}/logs/train/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{{run}}.tsv"
    conda:
        "../../envs/mad.yaml"
    threads: lambda wildcards: RUNS[wildcards.run].runtime.threads or 2
    shell:
        "OMP_NUM_THREADS={threads} exec python -m mad train --run {wildcards.run} --config {CONFIG} >> {log} 2>&1"


rule train:
    input:
        results("train/{run}/summary.json", run=RUNS),
    localrule: True
