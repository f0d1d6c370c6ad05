"""Every conv-bearing model of timm and torchvision: expanded, trained a step, collapsed, compared.

`building` makes a model, `values` gives it weights, `inputs` finds what it takes, `counting` counts
its convs and norms, `checks` compares, `examining` makes a model's row of it, `running` goes over
all models in processes of their own, `report` writes the table.
"""
