"""Slides in, magnification-robust encoders and their tables out. `snakemake --cores 2` makes everything of `config.yaml`;
a stage's name makes that stage: `snakemake --cores 2 shard`. Another cohort: `--configfile configs/own-slides.yaml`.
"""

from snakemake.utils import min_version

min_version("9.20")


configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/preprocess.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/embed.smk"
include: "workflow/rules/adapt.smk"
include: "workflow/rules/mix.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/viewer.smk"
include: "workflow/rules/evidence.smk"
include: "workflow/rules/biomarkers.smk"


onstart:
    write_json_if_changed(
        f"{RESULTS}/config.json", SETTINGS
    )  # for people: `mad … --config results/config.json`


onsuccess:
    print_quality()


onerror:
    print_quality()


rule all:
    default_target: True
    input:
        rules.qc.output,
        rules.report.input,
        rules.report.output,
        rules.viewer.output,
        rules.mix.input,
        rules.evidence.output if CFG.evidence.groups else [],
        rules.biomarkers.output if CFG.biomarkers.targets else [],
    localrule: True
