"""Training, but for the loop, which is `train.py`.

config       what a run is made of
job          what the loop sees of what it trains
tasks        which task opens how: dit_task, vae_task; networks
objective    what it minimises
step         one step; optimizer
checkpoints  what survives it
monitor      what it reports
"""
