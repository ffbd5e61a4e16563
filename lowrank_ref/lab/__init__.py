"""What chapters share: data, models, training, comparison, explorers. Papers' files never import it.

Four rooms, each with a face that exports what chapters use, for example `from lowrank_ref.lab.draw import explore`:

    data     real data out of pip packages            beds     test beds that chapters share
    models   small networks, one pretrained encoder   draw     charts, explorers, tables, an equation beside its code

and single files. Importing `lowrank_ref.lab` loads nothing else.

    train    one plain loop, resumable                check    a reader's function against the reference
    compare  methods at their own best learning rates results  what was measured on a GPU
    claims   the table of verdicts                    adversarial  training against several attacks
    budgets  many methods at one size                 grade    points for a student's work, with reasons
"""
