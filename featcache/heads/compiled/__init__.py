"""The training step of a head on a CPU.

In: normalised batches of features. Out: moved weights. Begin with ``training_step.TrainableHead``.
"""
