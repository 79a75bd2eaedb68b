"""Training and prediction on Lightning: the task, its data and the command line behind ``train.py``."""
