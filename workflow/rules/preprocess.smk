if CFG.cohort.sheet is None:

    rule synth_slide:
        output:
            slide=f"{RESULTS}/synthetic/{{slide}}.tiff",
            annotation=f"{RESULTS}/synthetic/{{slide}}.geojson",
        params:
            settings=section("synthetic", exclude={"patients"}),
        log:
            f"{RESULTS}/logs/synth/{{slide}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/synth/{{slide}}.tsv"
        conda:
            "../../envs/mad.yaml"
        shell:
            "python -m mad synth --slide {wildcards.slide} --config {CONFIG} >> {log} 2>&1"

    rule synth_check:
        input:
            slides=results("synthetic/{slide}.tiff", slide=SLIDES),
        output:
            f"{RESULTS}/synthetic/check.json",
        params:
            settings=section("synthetic"),
        log:
            f"{RESULTS}/logs/synth/check.log",
        benchmark:
            f"{RESULTS}/benchmarks/synth/check.tsv"
        conda:
            "../../envs/mad.yaml"
        shell:
            "python -m mad synth --check --config {CONFIG} >> {log} 2>&1"


rule cohort:
    input:
        sheet=[CFG.cohort.sheet] if CFG.cohort.sheet else [],
    output:
        f"{RESULTS}/cohort/slides.parquet",
    params:
        slides=digest([str(row) for row in SLIDES.values()]),
        settings=section("cohort"),
    log:
        f"{RESULTS}/logs/cohort.log",
    benchmark:
        f"{RESULTS}/benchmarks/cohort/cohort.tsv"
    conda:
        "../../envs/mad.yaml"
    shell:
        "python -m mad cohort --config {CONFIG} >> {log} 2>&1"


rule tile_slide:
    input:
        slide=slide_file,
        annotation=annotation_file,
    output:
        table=f"{RESULTS}/tile/{{slide}}.parquet",
        facts=f"{RESULTS}/tile/{{slide}}.json",
        picture=report(
            f"{RESULTS}/tile/{{slide}}.png",
            caption="../report/tile.rst",
            category="Quality control",
            labels={"slide": "{slide}"},
        ),
    params:
        row=lambda wildcards: digest(SLIDES[wildcards.slide].tiling()),
        tile=section("tile"),
        label=section("label"),
        on_bad_slide=CFG.on_bad_slide,
    log:
        f"{RESULTS}/logs/tile/{{slide}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tile/{{slide}}.tsv"
    conda:
        "../../envs/mad.yaml"
    shell:
        "python -m mad tile --slide {wildcards.slide} --config {CONFIG} >> {log} 2>&1"


rule tile:
    localrule: True
    input:
        results("tile/{slide}.parquet", slide=SLIDES),


rule sample:
    input:
        results("tile/{slide}.parquet", slide=SLIDES),
    output:
        results("sample/{slide}.parquet", slide=SLIDES),
    params:
        settings=section("sample"),
        splits=digest({slide: row.split for slide, row in SLIDES.items()}),
        cohort=section("cohort", exclude={"sheet"}),
        seed=CFG.seed,
    log:
        f"{RESULTS}/logs/sample.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample/sample.tsv"
    conda:
        "../../envs/mad.yaml"
    shell:
        "python -m mad sample --config {CONFIG} >> {log} 2>&1"


rule shard_slide:
    input:
        selection=f"{RESULTS}/sample/{{slide}}.parquet",
        slide=slide_file,
    output:
        f"{RESULTS}/shard/{{slide}}.parquet",
    params:
        row=lambda wildcards: digest({**SLIDES[wildcards.slide].tiling(), "annotation": None}),
        tile=section("tile"),
        settings=section("shard"),
    log:
        f"{RESULTS}/logs/shard/{{slide}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/shard/{{slide}}.tsv"
    conda:
        "../../envs/mad.yaml"
    shell:
        "python -m mad shard --slide {wildcards.slide} --config {CONFIG} >> {log} 2>&1"


rule shard:
    localrule: True
    input:
        results("shard/{slide}.parquet", slide=SLIDES),
