if CFG.cohort.sheet is None:

    rule synth_slide:
        output:
            slide=f"{RESULTS}/synthetic/{{slide}}.tiff",
            annotation=f"{RESULTS}/synthetic/{{slide}}.geojson",
        log:
            f"{RESULTS}/logs/synth/{{slide}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/synth/{{slide}}.tsv"
        conda:
            "../../envs/mad.yaml"
        resources:
            mem_mb=more_each_try(2000),
            runtime=more_each_try(15),
        params:
            settings=section(
                "synthetic", exclude={"patients", "val_patients", "test_patients"}
            ),
        shell:
            "python -m mad synth {wildcards.slide} >> {log} 2>&1"

    rule synth_check:
        input:
            slides=results("synthetic/{slide}.tiff", slide=SLIDES),
        output:
            f"{RESULTS}/synthetic/check.json",
        log:
            f"{RESULTS}/logs/synth/check.log",
        benchmark:
            f"{RESULTS}/benchmarks/synth/check.tsv"
        conda:
            "../../envs/mad.yaml"
        resources:
            mem_mb=more_each_try(4000),
            runtime=more_each_try(60),
        params:
            settings=section("synthetic"),
        shell:
            "python -m mad synth --check >> {log} 2>&1"


# What the sheet says counts, not its time: a column that the table lacks is a matter of the heads that want it (target_cells).
rule cohort:
    input:
        sheet=ancient([CFG.cohort.sheet]) if CFG.cohort.sheet else [],
    output:
        f"{RESULTS}/cohort/slides.parquet",
    log:
        f"{RESULTS}/logs/cohort.log",
    benchmark:
        f"{RESULTS}/benchmarks/cohort/cohort.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(2000),
        runtime=more_each_try(10),
    params:
        slides=digest([str(cohort_row(row)) for row in SLIDES.values()]),
        settings=section("cohort"),
    shell:
        "python -m mad cohort >> {log} 2>&1"


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
    log:
        f"{RESULTS}/logs/tile/{{slide}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tile/{{slide}}.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(2000),
        runtime=more_each_try(60),
    params:
        row=lambda wildcards: digest(SLIDES[wildcards.slide].tiling()),
        tile=section("tile"),
        label=section("label"),
        on_bad_slide=CFG.on_bad_slide,
    shell:
        "python -m mad tile {wildcards.slide} >> {log} 2>&1"


rule tile:
    input:
        results("tile/{slide}.parquet", slide=SLIDES),
    localrule: True


# Stands for all tables of tiles before `sample`: Snakemake writes down each input for each output of a job, and a table and a
# selection per slide are gigabytes of that at thousands of slides. It is temporary, so that tables which are missing are made
# again where slides are selected anew, and holds the time, so that tables which changed are known even if it was left lying.
rule tiled:
    input:
        results("tile/{slide}.parquet", slide=SLIDES),
    output:
        temp(f"{RESULTS}/tile/all.txt"),
    log:
        f"{RESULTS}/logs/tiled.log",
    localrule: True
    conda:
        "../../envs/mad.yaml"
    shell:
        "date +%s%N | tee {output} >> {log} 2>&1"


rule sample:
    input:
        f"{RESULTS}/tile/all.txt",
    output:
        results("sample/{slide}.parquet", slide=SLIDES),
    log:
        f"{RESULTS}/logs/sample.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample/sample.tsv"
    conda:
        "../../envs/mad.yaml"
    threads: 4
    resources:
        mem_mb=more_each_try(4000),
        runtime=more_each_try(60),
    params:
        settings=section("sample"),
        splits=digest({slide: row.split for slide, row in SLIDES.items()}),
        cohort=section("cohort", exclude={"sheet"}),
        seed=CFG.seed,
    shell:
        "OMP_NUM_THREADS={threads} python -m mad sample >> {log} 2>&1"


rule shard_slide:
    input:
        selection=f"{RESULTS}/sample/{{slide}}.parquet",
        slide=slide_file,
    output:
        f"{RESULTS}/shard/{{slide}}.parquet",
    log:
        f"{RESULTS}/logs/shard/{{slide}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/shard/{{slide}}.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(2000),
        runtime=more_each_try(120),
    params:
        row=lambda wildcards: digest(
            {**SLIDES[wildcards.slide].tiling(), "annotation": None}
        ),
        tile=section("tile", exclude={"tissue", "min_tissue"}),
        settings=section("shard"),
    shell:
        "python -m mad shard {wildcards.slide} >> {log} 2>&1"


rule shard:
    input:
        results("shard/{slide}.parquet", slide=SLIDES),
    localrule: True
