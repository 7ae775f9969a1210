"""The embedded synthetic neuropathology cohort: slides that hold what the method claims to learn, and nothing easier.

`cohort.sheet_rows` names the slides (standard library only), `slide.write_slide` writes one slide with its annotation,
`layout.layout` gives the truth behind its pixels, `checks.check_cohort` proves that colour gives neither class nor place away.
"""
