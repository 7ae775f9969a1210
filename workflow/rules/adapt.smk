# Only the summary is declared: it is written last, and vouches for the head beside it.
rule adapt_encoder:
    input:
        lambda wildcards: f"{RESULTS}/embed/{ADAPTERS[wildcards.adapter].encoder}/audit.json",
        cohort=f"{RESULTS}/cohort/slides.parquet",
        shards=results("shard/{slide}.parquet", slide=SLIDES),
    output:
        f"{RESULTS}/adapt/{{adapter}}/summary.json",
    log:
        f"{RESULTS}/logs/adapt/{{adapter}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/adapt/{{adapter}}.tsv"
    conda:
        "../../envs/mad.yaml"
    threads: 2
    resources:
        mem_mb=more_each_try(8000),
        runtime=more_each_try(120),
    params:
        entry=lambda wildcards: digest(
            ADAPTERS[wildcards.adapter].model_dump(mode="json")
        ),
        seed=CFG.seed,
    shell:
        "OMP_NUM_THREADS={threads} exec python -m mad adapt {wildcards.adapter} >> {log} 2>&1"


rule adapt:
    input:
        results("adapt/{adapter}/summary.json", adapter=ADAPTERS),
    localrule: True
