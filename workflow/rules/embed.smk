# Only the audit is declared: embeddings of slides that did not change survive a rerun.
rule embed_encoder:
    input:
        encoder=encoder_inputs,
        cohort=f"{RESULTS}/cohort/slides.parquet",
        tiles=results("tile/{slide}.parquet", slide=SLIDES),
        shards=results("shard/{slide}.parquet", slide=SLIDES),
    output:
        f"{RESULTS}/embed/{{encoder}}/audit.json",
    log:
        f"{RESULTS}/logs/embed/{{encoder}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/embed/{{encoder}}.tsv"
    conda:
        "../../envs/mad.yaml"
    threads: CFG.evaluate.threads
    resources:
        mem_mb=more_each_try(16000),
        runtime=more_each_try(480),
        gpu=lambda wildcards: int(
            ENCODERS[wildcards.encoder].spec.partition(":")[0]
            not in ("colour", "adapter")
        ),
    params:
        entry=lambda wildcards: digest(
            ENCODERS[wildcards.encoder].model_dump(mode="json")
        ),
        regions=lambda wildcards: region_magnifications(CFG, wildcards.encoder),
        access=lambda wildcards: weights_access(ENCODERS[wildcards.encoder]),
        maps=digest(
            CFG.evaluate.model_dump(
                mode="json",
                include={
                    "segmentation_slides",
                    "segmentation_num_slides",
                    "segmentation_magnifications",
                },
            )
        ),
    shell:
        "OMP_NUM_THREADS={threads} python -m mad embed {wildcards.encoder} >> {log} 2>&1"


rule embed:
    input:
        results("embed/{encoder}/audit.json", encoder=ENCODERS),
    localrule: True
