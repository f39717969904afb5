"""Training, but for the loop, which is `train.py`.

config       what a run is made of
tasks        what it trains: opens files, draws batches, exports
objective    what it minimises
step         one step; optimizer
checkpoints  what survives it
monitor      what it reports
"""
