"""The small world's own models: a tiny text-to-image pipeline and tiny reward models, made from nothing.

`python -m trainers.world_models` trains them all and writes `weights/`. Belongs here: architectures, training and the
printed checks of the tiny models. Does not belong here: preference training (`trainers.loop`), scoring of stores.
"""
