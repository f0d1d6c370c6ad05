"""Every conv-bearing model of timm and torchvision: expanded, trained a step, collapsed, compared.

`building` makes a model, `values` gives it weights, `inputs` finds what it takes, `counting` counts
its convs and norms, `checks` runs the checks and `comparing` compares outputs. `examining` makes
one model's row of it, `running` goes over all models in processes of their own, `results` keeps the
rows, `report` writes the page.
"""
