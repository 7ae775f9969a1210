# Methods over seeds: there is a table only where `evidence.groups` is given or runs have `seeds`.
if CFG.evidence.groups:

    rule evidence:
        input:
            results(
                "evaluate/{encoder}/{file}",
                encoder=sorted(
                    {e for group in CFG.evidence.groups.values() for e in group}
                ),
                file=["consistency.json", "patients.npz"],
            ),
        output:
            f"{RESULTS}/report/evidence.json",
            results(
                "report/tables/{table}.{format}",
                table=["evidence", "evidence_slides"],
                format=["csv", "md", "tex"],
            ),
            [
                report(
                    f"{RESULTS}/report/tables/{table}.html",
                    caption="../report/evidence.rst",
                    category="Evidence",
                    labels={"table": title},
                )
                for table, title in {
                    "evidence": "Methods over seeds",
                    "evidence_slides": "Slide by slide, without labels",
                }.items()
            ],
            report(
                f"{RESULTS}/report/figures/evidence.png",
                caption="../report/evidence.rst",
                category="Evidence",
                labels={"figure": "Methods over seeds"},
            ),
        log:
            f"{RESULTS}/logs/evidence.log",
        benchmark:
            f"{RESULTS}/benchmarks/report/evidence.tsv"
        conda:
            "../../envs/mad.yaml"
        resources:
            mem_mb=more_each_try(4000),
            runtime=more_each_try(60),
        params:
            settings=section("evidence"),
            resamples=CFG.evaluate.bootstrap_resamples,
            min_patients=CFG.evaluate.min_patients,
            seed=CFG.seed,
        shell:
            "python -m mad evidence >> {log} 2>&1"
