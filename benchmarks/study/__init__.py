"""Does it help? Paired runs on real images: python -m benchmarks.study, and docs/evidence.md.

`data` and `nets` are what is trained, `arms` the forms that are compared, `runs` one training and
its line on disk, `training` the loop, `questions` what is asked, `cells` which runs a question
needs, `statistics` what they say, `report`, `budget` and `figures` the page.
"""
