# A slide's pyramid takes long and depends on the slide alone; layers and pages are made again with every prediction.
rule viewer_slide:
    input:
        slide=slide_file,
    output:
        directory(f"{RESULTS}/report/viewer/pyramids/{{slide}}"),
    log:
        f"{RESULTS}/logs/viewer/{{slide}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/viewer/{{slide}}.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(2000),
        runtime=more_each_try(120),
    params:
        row=lambda wildcards: digest(
            {**SLIDES[wildcards.slide].tiling(), "annotation": None}
        ),
        icc=CFG.tile.icc,
        settings=section("viewer", exclude={"slides"}),
        on_bad_slide=CFG.on_bad_slide,
    shell:
        "VIPS_CONCURRENCY={threads} python -m mad viewer {wildcards.slide} >> {log} 2>&1"


rule viewer:
    input:
        pyramids=results("report/viewer/pyramids/{slide}", slide=VIEWED),
        tiles=results("tile/{slide}.parquet", slide=VIEWED),
        annotations=viewed_annotations,
        maps=results(
            "evaluate/{encoder}/segmentation.{format}",
            encoder=ENCODERS,
            format=["json", "parquet"],
        ),
    output:
        f"{RESULTS}/report/viewer/index.html",
        directory(results("report/viewer/{part}", part=["pages", "layers", "assets"])),
    log:
        f"{RESULTS}/logs/viewer.log",
    benchmark:
        f"{RESULTS}/benchmarks/viewer/viewer.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(4000),
        runtime=more_each_try(60),
    params:
        magnifications=CFG.evaluate.segmentation_magnifications,
        label=section("label"),
    shell:
        "python -m mad viewer >> {log} 2>&1"
