rule shard_cohort:
    input:
        results("shard/{slide}.parquet", slide=SLIDES),
    output:
        f"{RESULTS}/shard/cohort.json",
    log:
        f"{RESULTS}/logs/shard/cohort.log",
    benchmark:
        f"{RESULTS}/benchmarks/shard/cohort.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(2000),
        runtime=more_each_try(60),
    shell:
        "python -m mad shard-cohort >> {log} 2>&1"


# Only the summary is declared: Snakemake deletes declared outputs before a rerun, and a training that fails must keep its
# checkpoints and weights. `exec`, so that a SIGTERM reaches the trainer, which saves and leaves with code 75: under a profile with
# `retries` the next try resumes. A GPU per process is what it asks a cluster for; where there are none, `gpu: 0` in the profile.
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
    threads: training_threads
    resources:
        mem_mb=training_memory,
        runtime=1440,
        gpu=lambda wildcards: RUNS[wildcards.run].runtime.processes,
    shell:
        "OMP_NUM_THREADS={threads} exec python -m mad train {wildcards.run} >> {log} 2>&1"


rule train:
    input:
        results("train/{run}/summary.json", run=RUNS),
    localrule: True
