# Slide-level targets: a job per target and aggregator, then one that compares them. Nothing is made without `biomarkers.targets`.
AGGREGATED = [
    "{aggregator}.json",
    "{aggregator}.parquet",
    "attention/{aggregator}.parquet",
]


rule biomarkers_aggregator:
    input:
        tokens=aggregator_inputs,
        tiles=results("tile/{slide}.parquet", slide=SLIDES),
    output:
        [f"{RESULTS}/biomarkers/{{target}}/{file}" for file in AGGREGATED],
    log:
        f"{RESULTS}/logs/biomarkers/{{target}}/{{aggregator}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/biomarkers/{{target}}/{{aggregator}}.tsv"
    wildcard_constraints:
        target="[A-Za-z0-9][A-Za-z0-9_-]*",
        aggregator="[A-Za-z0-9][A-Za-z0-9_-]*",
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(8000),
        runtime=more_each_try(240),
        gpu=lambda wildcards: int(
            AGGREGATORS[wildcards.aggregator].finetune is not None
        ),
    params:
        target=lambda wildcards: digest(
            TARGETS[wildcards.target].model_dump(mode="json")
        ),
        cells=target_cells,
        entry=lambda wildcards: digest(AGGREGATORS[wildcards.aggregator].identity()),
        settings=section(
            "biomarkers",
            exclude={"targets", "aggregators", "baseline", "map_slides", "map_target"},
        ),
        resamples=CFG.evaluate.bootstrap_resamples,
        min_patients=CFG.evaluate.min_patients,
        seed=CFG.seed,
    shell:
        "OMP_NUM_THREADS={threads} python -m mad biomarkers {wildcards.target} {wildcards.aggregator} >> {log} 2>&1"


if TARGETS:
    MAPPED = [
        entry.name
        for entry in AGGREGATORS.values()
        if entry.head == "attention" and CFG.biomarkers.map_slides
    ]

    rule biomarkers:
        input:
            [
                results(
                    f"biomarkers/{{target}}/{file}",
                    target=TARGETS,
                    aggregator=AGGREGATORS,
                )
                for file in AGGREGATED
            ],
        output:
            f"{RESULTS}/report/biomarkers.json",
            results(
                "report/tables/{table}.{format}",
                table=["biomarkers", "biomarkers_tiles"],
                format=["csv", "md", "tex"],
            ),
            [
                report(
                    f"{RESULTS}/report/tables/{table}.html",
                    caption="../report/biomarkers.rst",
                    category="Slide-level targets",
                    labels={"table": title},
                )
                for table, title in {
                    "biomarkers": "Aggregators",
                    "biomarkers_tiles": "Tile count against accuracy",
                }.items()
            ],
            [
                report(
                    f"{RESULTS}/report/figures/{figure}.png",
                    caption="../report/biomarkers.rst",
                    category="Slide-level targets",
                    labels={"figure": title},
                )
                for figure, title in {
                    "biomarkers": "Aggregators",
                    "biomarkers_tiles": "Tile count against accuracy",
                }.items()
            ],
            [
                report(
                    f"{RESULTS}/report/figures/attention_{name}.png",
                    caption="../report/attention.rst",
                    category="Slide-level targets",
                    labels={"figure": f"Attention of {name}"},
                )
                for name in MAPPED
            ],
        log:
            f"{RESULTS}/logs/biomarkers/report.log",
        benchmark:
            f"{RESULTS}/benchmarks/report/biomarkers.tsv"
        conda:
            "../../envs/mad.yaml"
        resources:
            mem_mb=more_each_try(4000),
            runtime=more_each_try(60),
        params:
            settings=section("biomarkers"),
            icc=CFG.tile.icc,
        shell:
            "python -m mad biomarker-report >> {log} 2>&1"
