# As in training, only the summary is declared: weights, checkpoints and tokens survive a rerun. `exec`, so that a SIGTERM
# reaches the trainer, which saves and leaves.
rule mix_regions:
    input:
        lambda wildcards: f"{RESULTS}/embed/{MIXERS[wildcards.mixer].encoder}/audit.json",
        tiles=results("tile/{slide}.parquet", slide=SLIDES),
        cohort=f"{RESULTS}/cohort/slides.parquet",
    output:
        f"{RESULTS}/mix/{{mixer}}/summary.json",
    log:
        f"{RESULTS}/logs/mix/{{mixer}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/mix/{{mixer}}.tsv"
    conda:
        "../../envs/mad.yaml"
    threads: lambda wildcards: MIXERS[wildcards.mixer].runtime.threads or 2
    resources:
        mem_mb=more_each_try(8000),
        runtime=more_each_try(480),
        gpu=lambda wildcards: int(MIXERS[wildcards.mixer].steps > 0),
    params:
        entry=lambda wildcards: digest(
            MIXERS[wildcards.mixer].model_dump(mode="json", exclude={"runtime"})
        ),
        seed=CFG.seed,
    shell:
        "OMP_NUM_THREADS={threads} exec python -m mad mix {wildcards.mixer} >> {log} 2>&1"


rule mix:
    input:
        results("mix/{mixer}/summary.json", mixer=MIXERS),
    localrule: True
