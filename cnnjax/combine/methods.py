"""The methods by which trained networks are combined."""

METHODS = {
    "best": "the run of the highest validation accuracy, the baseline",
    "ensemble": "the mean of all runs' probabilities",
    "ensemble-logits": "the mean of all runs' logits",
    "uniform": "the average of all runs' parameters",
    "greedy": "the average of runs, added from best to worst and kept if they do not lower "
    "validation accuracy",
    "learned": "the average with coefficients learned on the validation images, one per run",
    "learned-by-layer": "the same, one per run and layer",
    "snapshot": "the mean of the probabilities of one run's checkpoints, with "
    "schedule.name=restarts those at the cycles' ends",
    "polyak": "the average of one run's checkpoints, or the moving average that the run kept "
    "(ema_decay)",
}
# Methods that choose by the accuracy or the loss on validation images.
SELECTING = ("best", "greedy", "learned", "learned-by-layer")
# Methods that average outputs; the others make one network.
ENSEMBLES = ("ensemble", "ensemble-logits", "snapshot")
# Methods that average parameters.
AVERAGES = ("uniform", "greedy", "learned", "learned-by-layer", "polyak")
# Methods that combine the checkpoints of one run.
OF_ONE_RUN = ("snapshot", "polyak")
