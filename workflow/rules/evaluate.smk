rule evaluate_encoder:
    input:
        embeddings=f"{RESULTS}/embed/{{encoder}}/audit.json",
        compared=results(
            "embed/{encoder}/audit.json",
            encoder=filter(None, (CFG.evaluate.reference, CFG.evaluate.against)),
        ),
        cohort=f"{RESULTS}/cohort/slides.parquet",
        tiles=results("tile/{slide}.parquet", slide=SLIDES),
        shards=results("shard/{slide}.parquet", slide=SLIDES),
    output:
        [f"{RESULTS}/evaluate/{{encoder}}/{name}" for name in EVALUATIONS],
    log:
        f"{RESULTS}/logs/evaluate/{{encoder}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate/{{encoder}}.tsv"
    conda:
        "../../envs/mad.yaml"
    threads: CFG.evaluate.threads
    resources:
        mem_mb=more_each_try(12000),
        runtime=more_each_try(240),
        gpu=int(CFG.evaluate.device == "cuda"),
    params:
        settings=section("evaluate", exclude={"threads"}),
        label=section("label"),
        seed=CFG.seed,
    shell:
        "OMP_NUM_THREADS={threads} python -m mad evaluate {wildcards.encoder} >> {log} 2>&1"


rule evaluate:
    input:
        results("evaluate/{encoder}/{file}", encoder=ENCODERS, file=EVALUATIONS),
    localrule: True
