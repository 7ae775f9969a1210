rule evaluate_encoder:
    input:
        embeddings=f"{RESULTS}/embed/{{encoder}}/audit.json",
        cohort=f"{RESULTS}/cohort/slides.parquet",
        tiles=results("tile/{slide}.parquet", slide=SLIDES),
        shards=results("shard/{slide}.parquet", slide=SLIDES),
    output:
        [f"{RESULTS}/evaluate/{{encoder}}/{protocol}.json" for protocol in PROTOCOLS],
    params:
        settings=section("evaluate"),
        label=section("label"),
        seed=CFG.seed,
    log:
        f"{RESULTS}/logs/evaluate/{{encoder}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate/{{encoder}}.tsv"
    threads: 2
    conda:
        "../../envs/mad.yaml"
    shell:
        "OMP_NUM_THREADS={threads} python -m mad evaluate --encoder {wildcards.encoder} --config {CONFIG} >> {log} 2>&1"


rule evaluate:
    localrule: True
    input:
        results("evaluate/{encoder}/{protocol}.json", encoder=ENCODERS, protocol=PROTOCOLS),
