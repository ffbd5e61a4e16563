"""What chapters share: data, models, training, comparison, explorers. Papers' files never import it.

Import what a chapter needs from its module, for example `from lowrank_ref.lab.explore import explore`; importing
`lowrank_ref.lab` loads nothing else.

    data     real data out of pip packages            train    one plain loop, resumable
    models   small networks, one pretrained encoder   compare  methods at their own best learning rates
    svg      charts and images as SVG                 claims   the table of verdicts
    explore  figures with sliders, without a kernel   check    a reader's function against the reference
    plots    colours and helpers for matplotlib       table    text and HTML tables
    photo    one photograph at every rank             source   an equation beside its code
    beds     test beds that chapters share            results  what was measured on a GPU
    adversarial  training against several attacks
"""
