TABLES = {
    "table2": "Table 2: Dataset composition",
    "table3": "Table 3: Classification and clustering",
    "table4": "Table 4: Cross-magnification consistency",
    "table5": "Table 5: Cross-magnification generalisation",
    "scales": "Every magnification to every other; magnification in the embedding",
    "sites": "A site or scanner never seen in training",
    "maps": "Segmentation maps: tiles, pixels, shapes",
    "slides": "Slides",
    "training": "Health of the trainings",
    "time": "Time budget",
}
if CFG.evaluate.reference:
    TABLES["noninferiority"] = (
        "Students at a coarse magnification against their teacher"
    )
FIGURES = {
    "figure3_pca": "Figure 3: parents and children in one embedding",
    "figure4_segmentation": "Figure 4: segmentation maps",
    "scale_matrix": "Every magnification to every other",
    "confusion": "What is taken for what, by the sound probe",
    "confusion_linear": "What is taken for what, by the paper's linear probe",
}

if any(run.distill for run in CFG.runs):
    FIGURES["fields"] = "What a distillation aligns"


rule qc:
    input:
        cohort=f"{RESULTS}/cohort/slides.parquet",
        facts=results("tile/{slide}.json", slide=SLIDES),
        tiles=results("tile/{slide}.parquet", slide=SLIDES),
        pictures=results("tile/{slide}.png", slide=SLIDES),
        shards=results("shard/{slide}.parquet", slide=SLIDES),
    output:
        page=report(
            f"{RESULTS}/report/qc.html",
            caption="../report/qc.rst",
            category="Quality control",
            labels={"slide": "all slides"},
        ),
        numbers=f"{RESULTS}/report/qc.json",
    log:
        f"{RESULTS}/logs/qc.log",
    benchmark:
        f"{RESULTS}/benchmarks/report/qc.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(4000),
        runtime=more_each_try(60),
    shell:
        "python -m mad qc >> {log} 2>&1"


# Time stamps of the benchmarks are read but not declared: a stage that ran again has changed its own output already.
rule report:
    input:
        cohort=f"{RESULTS}/cohort/slides.parquet",
        evaluations=results(
            "evaluate/{encoder}/{file}", encoder=ENCODERS, file=EVALUATIONS
        ),
        trainings=results("train/{run}/summary.json", run=RUNS),
        tiles=results("tile/{slide}.json", slide=SLIDES),
        shards=results("shard/{slide}.parquet", slide=SLIDES),
        pictures=results("tile/{slide}.png", slide=SLIDES),
        check=[] if CFG.cohort.sheet else f"{RESULTS}/synthetic/check.json",
    output:
        directory(f"{RESULTS}/report/maps"),
        f"{RESULTS}/report/provenance.json",
        report(
            f"{RESULTS}/report/provenance.html",
            caption="../report/provenance.rst",
            category="Provenance",
            labels={"page": "what made this report"},
        ),
        results(
            "report/tables/{table}.{format}", table=TABLES, format=["csv", "md", "tex"]
        ),
        [
            report(
                f"{RESULTS}/report/tables/{table}.html",
                caption=f"../report/{table}.rst",
                category="Tables",
                labels={"table": title},
            )
            for table, title in TABLES.items()
        ],
        [
            report(
                f"{RESULTS}/report/figures/{figure}.png",
                caption=f"../report/{figure}.rst",
                category="Figures",
                labels={"figure": title},
            )
            for figure, title in FIGURES.items()
        ],
        [
            report(
                f"{RESULTS}/report/figures/curves_{run}.png",
                caption="../report/curves.rst",
                category="Trainings",
                labels={"run": run},
            )
            for run in RUNS
        ],
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report/report.tsv"
    conda:
        "../../envs/mad.yaml"
    resources:
        mem_mb=more_each_try(8000),
        runtime=more_each_try(120),
    params:
        encoders=digest([encoder.model_dump(mode="json") for encoder in CFG.encoders]),
        label=section("label"),
    shell:
        "python -m mad report >> {log} 2>&1"
